"""A release as an OCI image layout, one blob a file, which `oras` and `skopeo` push to a registry.

    oras cp --from-oci-layout bundle:1.0.0 registry.example/quickstart:1.0.0
    oras pull registry.example/quickstart:1.0.0

Layers carry their path as title, so that `oras pull` writes the release folder. See the image-layout and the artifact
guidance of the OCI image specification 1.1.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any, Final

from qyolo_deploy.artifact import canonical_json, sha256_file
from qyolo_deploy.atomic import atomic_dir
from qyolo_deploy.errors import InputError
from qyolo_deploy.release.pack import release_paths
from qyolo_deploy.release.verify import VerifiedRelease

ARTIFACT_TYPE: Final = "application/vnd.qyolo.release.v1+json"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_EMPTY = b"{}"
_TITLE = "org.opencontainers.image.title"
_MEDIA_TYPES = {".json": "application/json", ".html": "text/html", ".yaml": "application/yaml", ".xml": "text/xml"}


def pack_oci(release: VerifiedRelease, out: Path) -> Path:
    """Write a verified release as an OCI image layout; its tag is the release's version.

    Raises:
        InputError: `out` is there already, or cannot be written.
    """
    if out.exists():
        raise InputError(f"{out}: is there already, expected the name of a new folder")
    with atomic_dir(out) as folder:
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        layers = [_add_file(blobs, release.path / path, path) for path in release_paths(release)]
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": _add(blobs, _EMPTY, _EMPTY_TYPE),
            "layers": layers,
            "annotations": {
                _TITLE: release.manifest.name,
                "org.opencontainers.image.version": release.manifest.version,
                "org.opencontainers.image.licenses": release.manifest.licenses.get("model", "NOASSERTION"),
            },
        }
        entry = _add(blobs, canonical_json(manifest).encode(), _MANIFEST_TYPE)
        tag = {"org.opencontainers.image.ref.name": release.manifest.version}
        index = {
            "schemaVersion": 2,
            "mediaType": _INDEX_TYPE,
            "manifests": [{**entry, "artifactType": ARTIFACT_TYPE, "annotations": tag}],
        }
        (folder / "index.json").write_text(canonical_json(index), encoding="utf-8")
        (folder / "oci-layout").write_text(canonical_json({"imageLayoutVersion": "1.0.0"}), encoding="utf-8")
    return out


def _add_file(blobs: Path, file: Path, path: str) -> dict[str, Any]:
    digest = sha256_file(file)
    shutil.copyfile(file, blobs / digest)
    media_type = _MEDIA_TYPES.get(file.suffix, "application/octet-stream")
    return {
        "mediaType": media_type,
        "digest": f"sha256:{digest}",
        "size": file.stat().st_size,
        "annotations": {_TITLE: path},
    }


def _add(blobs: Path, content: bytes, media_type: str) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}
