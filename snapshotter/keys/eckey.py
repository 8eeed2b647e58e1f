"""Public EC keys as JWK (RFC 7517), and ES256 signatures by them (RFC 7518 §3.4)."""

from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from snapshotter.crypto import encoding
from snapshotter.errors import MalformedImage

CURVES: Final[dict[str, ec.EllipticCurve]] = {"P-256": ec.SECP256R1(), "P-521": ec.SECP521R1()}


def public_key(
    jwk: Any, what: str, *, optional: tuple[str, ...] = (), padded: bool = True
) -> ec.EllipticCurvePublicKey:
    """An EC public key from kty, crv, x, y (and `optional` members, ignored). Raises MalformedImage.

    A point that is not on its curve is refused, and a coordinate that is not as long as the curve's; not `padded`: one
    that is longer.
    """
    if not isinstance(jwk, dict):
        raise MalformedImage(f"{what}: not an object")
    encoding.members(jwk, what, required=("kty", "crv", "x", "y"), optional=optional)
    curve = CURVES.get(encoding.string(jwk, "crv", what))
    if jwk["kty"] != "EC" or curve is None:
        raise MalformedImage(f"{what}: not an EC key on one of {', '.join(CURVES)}")
    width = (curve.key_size + 7) // 8
    x, y = (encoding.b64url_decode(encoding.string(jwk, name, what), f"{what}: {name}") for name in ("x", "y"))
    if any(len(part) > width or (padded and len(part) < width) for part in (x, y)):
        raise MalformedImage(f"{what}: a coordinate is not {width} bytes")
    try:
        return ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), curve).public_key()
    except ValueError:
        raise MalformedImage(f"{what}: not a point of its curve") from None


def is_signed(signed: bytes, signature: bytes, key: ec.EllipticCurvePublicKey, what: str) -> bool:
    """Whether an ES256 signature (r and s, 32 bytes each) is right. Raises MalformedImage for what cannot be one."""
    if len(signature) != 64 or not isinstance(key.curve, ec.SECP256R1):
        raise MalformedImage(f"{what}: not signed with P-256")
    der = encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
    try:
        key.verify(der, signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def coordinates(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """Members x and y of its JWK."""
    numbers, width = key.public_numbers(), (key.curve.key_size + 7) // 8
    return {"x": uint(numbers.x, width), "y": uint(numbers.y, width)}


def uint(value: int, width: int) -> str:
    """Base64urlUInt of a fixed width in bytes."""
    return encoding.b64url_encode(value.to_bytes(width, "big"))
