"""Signatures of images: what one says, and whether a key made it. Pure.

A signature signs a *claim*, a JSON document (containers-signature(5)); simple signing wraps it in OpenPGP, cosign puts
it into a layer of a manifest with the tag `sha256-<hex>.sig` and the signature into that layer's annotation.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from snapshotter.crypto import encoding
from snapshotter.digest import Digest
from snapshotter.errors import ConfigError, InvalidArgument, MalformedImage

COSIGN: Final = "cosign container image signature"
SIMPLE: Final = "atomic container signature"
CLAIM_BYTES: Final = 16 << 10
_MIN_RSA_BITS = 2048
_MAX_PEM = 64 << 10

PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Claim:
    """`manifest` is the image `docker_reference`, says whoever signed it."""

    manifest: Digest
    docker_reference: str

    @classmethod
    def parse(cls, payload: bytes, kind: str) -> "Claim":
        """Raises MalformedImage, LimitExceeded. Nothing unknown is allowed where it could limit what is claimed."""
        what = "signature claim"
        value = encoding.json_object(payload, what, CLAIM_BYTES)
        encoding.members(value, what, required=("critical",), optional=("optional",))
        critical = _object(value["critical"], what)
        encoding.members(critical, what, required=("type", "image", "identity"))
        if critical["type"] != kind:
            raise MalformedImage(f"{what}: type is not {kind!r}")
        image = _object(critical["image"], what)
        identity = _object(critical["identity"], what)
        encoding.members(image, what, required=("docker-manifest-digest",))
        encoding.members(identity, what, required=("docker-reference",))
        try:
            manifest = Digest.parse(encoding.string(image, "docker-manifest-digest", what))
        except InvalidArgument as error:
            raise MalformedImage(f"{what}: {error}") from None
        return cls(manifest, encoding.string(identity, "docker-reference", what))

    def pack(self, kind: str) -> bytes:
        """As cosign writes it."""
        text = (
            '{"critical":{"identity":{"docker-reference":%s},"image":{"docker-manifest-digest":%s},"type":%s},'
            '"optional":null}'
        )
        return (text % (_quoted(self.docker_reference), _quoted(self.manifest), _quoted(kind))).encode()


def load_public_key(pem: bytes, name: str) -> PublicKey:
    """A PEM public key that may sign images. Raises ConfigError naming `name`."""
    bad = ConfigError(f"signing key {name}: not a PEM public key (ECDSA, Ed25519, RSA of at least 2048 bits)")
    if len(pem) > _MAX_PEM:
        raise bad
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise bad from None
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MIN_RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1", "secp521r1"):
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    raise bad


def is_signed_by(payload: bytes, signature: bytes, key: PublicKey) -> bool:
    """Whether `key` signed `payload`: SHA-256 with ECDSA (DER) or RSA (PKCS #1 v1.5), or Ed25519, as cosign does."""
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, payload, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, payload, padding.PKCS1v15(), hashes.SHA256())
        else:
            key.verify(signature, payload)
    except InvalidSignature:
        return False
    return True


def _object(value: object, what: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise MalformedImage(f"{what}: not an object where one is needed")
    return value


def _quoted(text: str) -> str:
    """Digests, references and kinds need no escapes."""
    assert '"' not in text
    assert "\\" not in text
    return f'"{text}"'
