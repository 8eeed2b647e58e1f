"""Sealed secrets of Confidential Containers: a signed reference to a secret, safe to pass through untrusted hands.

    sealed.<header>.<payload>.<signature>        base64url without padding, a JWS (RFC 7515) with a prefix

    header   {"alg":"ES256","kid":"kbs:///…"}    the resource is the signer's public key, a P-256 JWK
    payload  {"version":"0.1.0","type":"vault","name":"kbs:///…","provider":"kbs","provider_settings":{},"annotations":{}}

The signature says who chose the name; without it whoever passes the text on could exchange one secret for another. Type
`envelope`, which names a key management service, is refused.
"""

from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from snapshotter.crypto import encoding
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import KeyDenied, MalformedImage
from snapshotter.keys import eckey
from snapshotter.keys.resource import Resources, ResourceUri, denying

TEXT_BYTES: Final = 64 << 10
_WHAT: Final = "sealed secret"


async def unseal(text: str, resources: Resources) -> SecretBytes:
    """The secret that a sealed one refers to; the caller wipes it.

    Raises KeyDenied (no-key) for a text that is none, a signature that is not right, and what is not released;
    Unavailable.
    """
    with denying(_WHAT):
        header, payload, signed, signature = _parts(text)
        signer = ResourceUri.parse(encoding.string(header, "kid", _WHAT))
        name = _vault(payload)
    with await resources.get(signer) as raw, denying(f"{_WHAT}: key {signer}"):
        key = _public_key(raw)
        genuine = eckey.is_signed(signed, signature, key, _WHAT)
    if not genuine:
        raise KeyDenied(f"{_WHAT}: its signature is not by {signer}")
    return await resources.get(name)


def _parts(text: str) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """Header, payload, what is signed, and the signature."""
    pieces = text.strip().split(".")
    if len(text) > TEXT_BYTES or len(pieces) != 4 or pieces[0] != "sealed":
        raise MalformedImage(f"{_WHAT}: not sealed.HEADER.PAYLOAD.SIGNATURE")
    raw = [encoding.b64url_decode(piece, _WHAT) for piece in pieces[1:]]
    header = encoding.json_object(raw[0], f"{_WHAT}: header", TEXT_BYTES)
    encoding.members(header, f"{_WHAT}: header", required=("alg", "kid"))
    if header["alg"] != "ES256":
        raise MalformedImage(f"{_WHAT}: alg is not ES256")
    payload = encoding.json_object(raw[1], f"{_WHAT}: payload", TEXT_BYTES)
    return header, payload, f"{pieces[1]}.{pieces[2]}".encode(), raw[2]


def _vault(payload: dict[str, Any]) -> ResourceUri:
    """The name of the secret."""
    what = f"{_WHAT}: payload"
    if payload.get("type") != "vault":
        raise MalformedImage(f"{what}: type {str(payload.get('type'))[:40]!r} is not supported, only vault")
    names = ("version", "type", "name", "provider", "provider_settings", "annotations")
    encoding.members(payload, what, required=names)
    if payload["version"] != "0.1.0" or payload["provider"] != "kbs":
        raise MalformedImage(f"{what}: version is not 0.1.0, or provider is not kbs")
    if not isinstance(payload["provider_settings"], dict) or not isinstance(payload["annotations"], dict):
        raise MalformedImage(f"{what}: provider_settings or annotations is not an object")
    return ResourceUri.parse(encoding.string(payload, "name", what))


def _public_key(raw: SecretBytes) -> ec.EllipticCurvePublicKey:
    """A P-256 JWK (RFC 7517); members that say nothing about the key itself are let through."""
    what = f"{_WHAT}: key"
    document = encoding.json_object(raw.expose(), what, TEXT_BYTES)
    if document.get("crv") != "P-256" or "d" in document:
        raise MalformedImage(f"{what}: not a public P-256 JWK")
    return eckey.public_key({name: document[name] for name in ("kty", "crv", "x", "y") if name in document}, what)
