"""Image files: which files are images, how large they are, and their pixels."""

import struct
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from qyolo_deploy.errors import InputError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_PNG_START = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers: 0xC0..0xCF without DHT (C4), JPG (C8) and DAC (CC); ITU-T T.81, table B.1.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HEADER_BYTES = 65536


def list_images(folder: Path) -> list[Path]:
    """All image files in `folder` and below it, sorted by their path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image as uint8 `[H, W, 3]` RGB, turned as its Exif orientation says.

    Raises:
        InputError: The file is missing, empty, cut off or not an image.
    """
    data = _read_bytes(path)
    # OpenCV 4 fills the missing part of a cut JPEG with grey and says nothing. A marker cannot occur within
    # entropy-coded data, so that in a whole file the last scan is followed by an end marker, mostly as its last bytes.
    is_ended = data.endswith(_JPEG_END) or data.rfind(_JPEG_END) > data.rfind(_JPEG_SCAN)
    if data.startswith(_JPEG_START) and not is_ended:
        raise InputError(f"{path}: the image is cut off (a JPEG without its end marker)")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        image = None
    if image is None:
        raise InputError(f"{path}: the image is corrupt or of an unknown format")
    return np.asarray(image, np.uint8)


def read_size(path: Path) -> tuple[int, int]:
    """Width and height in px of what `read_image` gives, from the file's header where that is enough.

    Raises:
        InputError: As for `read_image`.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path}: the image cannot be read ({error.strerror})") from error
    size = _png_size(header) if header.startswith(_PNG_START) else _jpeg_size(header)
    if size is not None and min(size) > 0:
        return size
    height, width = read_image(path).shape[:2]
    return width, height


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the image cannot be read ({error.strerror})") from error
    if not data:
        raise InputError(f"{path}: the image file is empty")
    return data


def _png_size(header: bytes) -> tuple[int, int] | None:
    if len(header) < 24 or b"eXIf" in header:
        return None
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def _jpeg_size(header: bytes) -> tuple[int, int] | None:
    """Size from the frame header, or None where Exif data might turn the image or the header is longer."""
    if not header.startswith(_JPEG_START):
        return None
    at = 2
    while at + 9 <= len(header) and header[at] == 0xFF:
        marker = header[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _JPEG_FRAMES:
            height, width = struct.unpack(">HH", header[at + 5 : at + 9])
            return width, height
        elif marker == 0xE1 and header[at + 4 : at + 8] == b"Exif":
            return None
        else:
            at += 2 + int.from_bytes(header[at + 2 : at + 4], "big")
    return None
