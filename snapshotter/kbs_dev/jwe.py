"""Answers encrypted to an attested key, byte for byte as a KBS writes them (flattened JWE, A256GCM)."""

import secrets
from typing import Any

from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snapshotter.crypto import encoding
from snapshotter.crypto.encoding import b64url_encode
from snapshotter.errors import MalformedImage
from snapshotter.keys import eckey, teekey
from snapshotter.keys.jwe import concat_kdf

_WHAT = "tee-pubkey"


def encrypt(jwk: Any, payload: bytes) -> bytes:
    """`payload` for the holder of the private half of `jwk`. Raises MalformedImage for a key that is not supported."""
    cek, iv = secrets.token_bytes(32), secrets.token_bytes(12)
    extra, wrapped = _wrap(_public_key(jwk), cek)
    # Clients rebuild this string to authenticate it: alg, enc, then the rest sorted, without white space.
    header = {"alg": jwk["alg"], "enc": "A256GCM"} | extra
    protected = b64url_encode(encoding.json_bytes(header))
    sealed = AESGCM(cek).encrypt(iv, payload, protected.encode())
    answer = {
        "protected": protected,
        "encrypted_key": b64url_encode(wrapped),
        "iv": b64url_encode(iv),
        "ciphertext": b64url_encode(sealed[:-16]),
        "tag": b64url_encode(sealed[-16:]),
    }
    return encoding.json_bytes(answer)


def check_key(jwk: Any) -> None:
    """Raises MalformedImage unless `encrypt` could use it."""
    _public_key(jwk)


def _wrap(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, cek: bytes) -> tuple[dict[str, Any], bytes]:
    if isinstance(key, rsa.RSAPublicKey):
        return {}, key.encrypt(cek, padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None))
    ephemeral = ec.generate_private_key(key.curve)
    kek = concat_kdf(ephemeral.exchange(ec.ECDH(), key), teekey.EC_ALGORITHM, 32)
    curve = "P-256" if isinstance(key.curve, ec.SECP256R1) else "P-521"
    epk = {"crv": curve, "kty": "EC"} | eckey.coordinates(ephemeral.public_key())
    return {"epk": epk}, keywrap.aes_key_wrap(kek, cek)


def _public_key(jwk: Any) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    if not isinstance(jwk, dict):
        raise MalformedImage(f"{_WHAT}: not an object")
    if jwk.get("kty") != "RSA":
        key = eckey.public_key(jwk, _WHAT, optional=("alg",))
        if jwk.get("alg") != teekey.EC_ALGORITHM:
            raise MalformedImage(f"{_WHAT}: alg is not {teekey.EC_ALGORITHM}")
        return key
    encoding.members(jwk, _WHAT, required=("kty", "alg", "n", "e"))
    if jwk["alg"] != teekey.RSA_ALGORITHM:
        raise MalformedImage(f"{_WHAT}: alg is not {teekey.RSA_ALGORITHM}")
    n, e = (encoding.b64url_decode(encoding.string(jwk, name, _WHAT), f"{_WHAT}: {name}") for name in ("n", "e"))
    if not 256 <= len(n) <= 1024 or len(e) > 4:
        raise MalformedImage(f"{_WHAT}: not an RSA key of 2048 to 8192 bits")
    try:
        return rsa.RSAPublicNumbers(int.from_bytes(e, "big"), int.from_bytes(n, "big")).public_key()
    except ValueError:
        raise MalformedImage(f"{_WHAT}: not an RSA key") from None
