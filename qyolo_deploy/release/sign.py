"""Signatures over a release's manifest, with a key pair that the user holds; nothing goes over a network.

The manifest holds the SHA-256 of every other file, so that a signature over its bytes covers the release. It lies
beside it as `manifest.json.sig`, in base64, and is what other tools check as well, with no more than the public key:

    base64 -d manifest.json.sig > sig && openssl dgst -sha256 -verify public.pem -signature sig manifest.json
    cosign verify-blob --key public.pem --signature manifest.json.sig --insecure-ignore-tlog manifest.json

Keys are PEM: ECDSA on P-256, P-384 or P-521 (with SHA-256, SHA-384, SHA-512), or Ed25519. ECDSA takes its nonce from
the message (RFC 6979), so that signing again gives the same bytes.

`cryptography` does it rather than `model-signing`: that one brings the whole network stack of sigstore (30 packages,
among them tuf, requests and protobuf) even for a local key, and its release 1.1.1 cannot be imported beside today's
sigstore, which no longer brings the pyOpenSSL that it forgets to ask for.
"""

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qyolo_deploy.atomic import write_atomic
from qyolo_deploy.errors import InputError, IntegrityError, RuntimeMissingError
from qyolo_deploy.release.manifest import MANIFEST_NAME, SIGNATURE_NAME

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

PASSWORD_VARIABLE: Final = "QYOLO_SIGN_PASSWORD"
_MAX_KEY_BYTES = 2**16
_MAX_SIGNATURE_BYTES = 4096
_HINT = "openssl ecparam -name prime256v1 -genkey -noout -out private.pem"


def sign_manifest(release: Path, key: Path) -> Path:
    """Write the signature over the manifest of a release, which the caller has verified.

    Args:
        release: The release folder.
        key: PEM file of the private key; `QYOLO_SIGN_PASSWORD` holds its password if it has one.

    Returns:
        The signature file.

    Raises:
        InputError: The key is not usable, or the file cannot be written.
        RuntimeMissingError: `cryptography` is not installed.
    """
    private = read_private_key(key)
    file = release / SIGNATURE_NAME
    signature = _sign(private, (release / MANIFEST_NAME).read_bytes(), key)
    write_atomic(file, base64.b64encode(signature) + b"\n")
    return file


def check_signature(release: Path, content: bytes, key: Path) -> None:
    """Return if the release carries a signature over its manifest's bytes by the holder of a key.

    Args:
        release: The release folder.
        content: The bytes of its manifest, as they were verified.
        key: PEM file of the public key.

    Raises:
        InputError: The key is not usable.
        IntegrityError: There is no signature, or it is not of this key over this manifest.
        RuntimeMissingError: `cryptography` is not installed.
    """
    public = _public_key(key)
    file = release / SIGNATURE_NAME
    try:
        raw = file.read_bytes() if file.stat().st_size <= _MAX_SIGNATURE_BYTES else b""
    except FileNotFoundError as error:
        raise IntegrityError(f"{release} is not signed: it has no {SIGNATURE_NAME}.") from error
    try:
        signature = base64.b64decode(raw.strip(), validate=True)
    except binascii.Error as error:
        raise IntegrityError(f"{file} is not a signature in base64.") from error
    from cryptography.exceptions import InvalidSignature

    try:
        _verify(public, signature, content, key)
    except InvalidSignature as error:
        raise IntegrityError(f"{file} is not a signature of {key} over this {MANIFEST_NAME}.") from error


def _serialization() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        message = "Signatures need the package 'cryptography', which is not installed"
        raise RuntimeMissingError(message, 'pip install "qyolo_deploy[sign]"') from error
    return serialization


def _read_key(key: Path) -> bytes:
    try:
        if key.stat().st_size > _MAX_KEY_BYTES:
            raise InputError(f"{key}: too large for a key, expected a PEM file")
        return key.read_bytes()
    except OSError as error:
        raise InputError(f"{key}: the key cannot be read ({error.strerror})") from error


def read_private_key(key: Path) -> "PrivateKeyTypes":
    """The key to sign with; a build reads it first, so that a wrong one is told before hours of work.

    Raises:
        InputError: The file is no private key in PEM, or its password is missing or wrong.
        RuntimeMissingError: `cryptography` is not installed.
    """
    serialization = _serialization()
    password = os.environ.get(PASSWORD_VARIABLE)
    try:
        private: PrivateKeyTypes = serialization.load_pem_private_key(
            _read_key(key), password.encode() if password else None
        )
    except TypeError as error:  # a password without need, or none where one is needed
        raise InputError(f"{key}: {error}", f"{PASSWORD_VARIABLE} holds the password of an encrypted key.") from error
    except ValueError as error:
        raise InputError(f"{key}: expected an unbroken private key in PEM, and its password", _HINT) from error
    return private


def _public_key(key: Path) -> "PublicKeyTypes":
    try:
        public: PublicKeyTypes = _serialization().load_pem_public_key(_read_key(key))
    except ValueError as error:
        hint = f"openssl pkey -in {key} -pubout gives that of a private key."
        raise InputError(f"{key}: expected a public key in PEM", hint) from error
    return public


def _hash_for(bits: int) -> Any:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256() if bits <= 256 else hashes.SHA384() if bits <= 384 else hashes.SHA512()


def _sign(private: "PrivateKeyTypes", content: bytes, key: Path) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if isinstance(private, ed25519.Ed25519PrivateKey):
        return private.sign(content)
    if isinstance(private, ec.EllipticCurvePrivateKey):
        return private.sign(content, ec.ECDSA(_hash_for(private.key_size), deterministic_signing=True))
    raise InputError(f"{key}: expected an ECDSA or Ed25519 key", _HINT)


def _verify(public: "PublicKeyTypes", signature: bytes, content: bytes, key: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if isinstance(public, ed25519.Ed25519PublicKey):
        public.verify(signature, content)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        public.verify(signature, content, ec.ECDSA(_hash_for(public.key_size)))
    else:
        raise InputError(f"{key}: expected an ECDSA or Ed25519 key", _HINT)
