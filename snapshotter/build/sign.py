"""Signing a converted image, as cosign does: the signature goes next to it, under the tag `sha256-<hex>.sig`."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.crypto import encoding
from snapshotter.digest import Digest
from snapshotter.errors import ConfigError, InvalidArgument, MalformedImage, NotFound
from snapshotter.image import signature, sigstore
from snapshotter.image.signature import Claim
from snapshotter.image.sigstore import CosignSignatures, Found
from snapshotter.registry.reference import Reference
from snapshotter.registry.transport import ImageStore

_MAX_PEM = 64 << 10
_DOCUMENT_BYTES = 4 << 20

SigningKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def load_signing_key(path: Path) -> SigningKey:
    """An unencrypted PEM private key (PKCS#8, PKCS#1, SEC1). Raises InvalidArgument."""
    try:
        with path.open("rb") as file:
            pem = file.read(_MAX_PEM + 1)
    except OSError as error:
        raise InvalidArgument(f"--sign-key {path}: {error.strerror}") from error
    if b"ENCRYPTED" in pem:
        raise InvalidArgument(f"--sign-key {path}: is encrypted", hint="decrypt it, or sign with cosign afterwards")
    try:
        key = load_pem_private_key(pem, None)
        signature.load_public_key(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "")
    except (ValueError, TypeError, UnsupportedAlgorithm, ConfigError):
        raise InvalidArgument(
            f"--sign-key {path}: not a PEM private key (ECDSA, Ed25519, RSA of at least 2048 bits)"
        ) from None
    assert isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey)
    return key


async def sign(
    store: ImageStore, image: Reference, digest: Digest, name: str, keys: Sequence[SigningKey], limits: Limits
) -> None:
    """Store signatures by `keys` of the manifest `digest`, beside those that are there.

    `name`: host/repository under which the image will be asked for. Raises what `store` raises.
    """
    payload = Claim(digest, name).pack(signature.COSIGN)
    there = await CosignSignatures(store, limits).find(image, digest)
    made = []
    for key in keys:
        public = key.public_key()
        if not any(item.payload == payload and signature.is_signed_by(*item, public) for item in there):
            made.append(Found(payload, _signature(payload, key)))
    if not made:
        return
    where = Reference(image.host, image.repository, sigstore.tag_of(digest))
    manifest, blobs = sigstore.manifest(made, *await _present(store, where))
    for blob in dict.fromkeys(blobs):
        await store.upload_blob(where, Digest.of(blob), len(blob), lambda blob=blob: _whole(blob))  # type: ignore[misc]
    await store.put_manifest(where, manifest, labels.MEDIA_OCI_MANIFEST)


async def _present(store: ImageStore, where: Reference) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and config of the signatures that are there; others' layers may hold more than we understand."""
    try:
        raw, _, _ = await store.manifest(where)
    except NotFound:
        return {}, {}
    document = encoding.json_object(raw, f"signatures {where}", _DOCUMENT_BYTES)
    try:
        digest, size = Digest.parse(document["config"]["digest"]), int(document["config"]["size"])
    except (LookupError, TypeError, ValueError, InvalidArgument):
        raise MalformedImage(f"signatures {where}: no manifest with a config") from None
    config = await store.blob(where, digest, size, _DOCUMENT_BYTES)
    return document, encoding.json_object(config, f"signatures {where}: config", _DOCUMENT_BYTES)


def _signature(payload: bytes, key: SigningKey) -> bytes:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(payload, ec.ECDSA(hashes.SHA256()))
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(payload, padding.PKCS1v15(), hashes.SHA256())
    return key.sign(payload)


async def _whole(content: bytes) -> AsyncIterator[bytes]:
    yield content
