"""JWE (RFC 7516) of layer keys, as ocicrypt and go-jose write it: JSON serialisation, flattened for one recipient.

Written: RSA-OAEP for RSA keys, ECDH-ES+A256KW for P-256, P-384 and P-521, content under A256GCM. Read: the allow-lists
below and no header parameter besides those named, so `none`, `dir`, RSA1_5, PBES2, `zip` and `crit` are refused by not
being there.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from jwcrypto.common import JWException
from jwcrypto.jwe import JWE
from jwcrypto.jwk import JWK

from snapshotter.crypto import encoding
from snapshotter.crypto.encoding import b64url_encode
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import InvalidArgument, KeyDenied, LimitExceeded, MalformedImage

RSA_ALGORITHMS: Final = ("RSA-OAEP", "RSA-OAEP-256")
EC_ALGORITHMS: Final = ("ECDH-ES+A128KW", "ECDH-ES+A192KW", "ECDH-ES+A256KW")
CONTENT_ALGORITHMS: Final = ("A128GCM", "A192GCM", "A256GCM", "A128CBC-HS256", "A192CBC-HS384", "A256CBC-HS512")
_HEADER: Final = frozenset(("alg", "enc", "epk", "kid", "typ", "cty", "apu", "apv"))
_CURVES: Final = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
_WHAT = "JWE packet"
_PACKET_BYTES = 1 << 20  # callers bound annotations far below; this is for everybody else
_KEY_FILE_BYTES = 64 << 10
_MIN_RSA_BITS = 2048


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """A decryption key. `kid` is its RFC 7638 thumbprint: public, and what errors and logs name it by."""

    kid: str
    algorithms: tuple[str, ...]
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey = field(repr=False, compare=False)

    @classmethod
    def load(cls, pem: bytes) -> "PrivateKey":
        """From unencrypted PEM: PKCS#8, PKCS#1 or SEC1. Raises InvalidArgument, which says nothing of the content."""
        if len(pem) > _KEY_FILE_BYTES:
            raise InvalidArgument("private key: not a PEM file of one key")
        try:
            key = load_pem_private_key(pem, password=None)
        except TypeError:
            raise InvalidArgument("private key: is encrypted; only unencrypted PEM is read") from None
        except (ValueError, UnsupportedAlgorithm):
            raise InvalidArgument("private key: not PEM of PKCS#8, PKCS#1 or SEC1") from None
        algorithms = _algorithms(key.public_key())
        assert isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
        return cls(JWK.from_pyca(key).thumbprint(), algorithms, key)


@dataclass(frozen=True, slots=True)
class _Recipient:
    """One wrapped content key: the merged header and the wrapped bytes (base64url)."""

    header: dict[str, Any]
    flattened: dict[str, Any]


def wrap(payload: SecretBytes, recipients: Sequence[bytes]) -> bytes:
    """Encrypt `payload` for every recipient (SPKI PEM). Raises InvalidArgument naming the recipient by position."""
    if not recipients:
        raise InvalidArgument("JWE: no recipient")
    cek = secrets.token_bytes(32)
    wrapped = [_wrap_key(cek, _public_key(pem, number)) for number, pem in enumerate(recipients, 1)]
    protected = {"enc": "A256GCM"} if len(wrapped) > 1 else dict(sorted((wrapped[0][0] | {"enc": "A256GCM"}).items()))
    packet: dict[str, Any] = {"protected": b64url_encode(encoding.json_bytes(protected))}
    if len(wrapped) > 1:
        packet["recipients"] = [{"header": header, "encrypted_key": b64url_encode(key)} for header, key in wrapped]
    # go-jose writes the first recipient's key here in the general form too; RFC 7516 readers ignore or refuse neither.
    packet["encrypted_key"] = b64url_encode(wrapped[0][1])
    iv = secrets.token_bytes(12)
    sealed = AESGCM(cek).encrypt(iv, payload.expose(), packet["protected"].encode())
    packet |= {"iv": b64url_encode(iv), "ciphertext": b64url_encode(sealed[:-16]), "tag": b64url_encode(sealed[-16:])}
    return encoding.json_bytes(packet)


def unwrap(packet: bytes, keys: Sequence[PrivateKey], *, max_recipients: int = 64) -> SecretBytes:
    """The payload, by the first key that opens it.

    Raises MalformedImage for a packet outside the allow-lists (whoever it is for), LimitExceeded, and KeyDenied
    (no-key) naming the ids of the keys tried.
    """
    recipients = list(_recipients(packet, max_recipients))
    for key in keys:
        for recipient in recipients:
            if recipient.header["alg"] in key.algorithms:
                payload = _open(recipient, key)
                if payload is not None:
                    return payload
    raise KeyDenied(no_key(keys))


def no_key(keys: Sequence[PrivateKey]) -> str:
    if not keys:
        return "layer key: no private key is configured"
    return f"layer key: none of {len(keys)} private keys opens it (kid {', '.join(key.kid for key in keys)})"


def _open(recipient: _Recipient, key: PrivateKey) -> SecretBytes | None:
    jwe = JWE(algs=[recipient.header["alg"], recipient.header["enc"]])
    try:
        jwe.deserialize(json.dumps(recipient.flattened), JWK.from_pyca(key.key))
        return SecretBytes(jwe.payload)
    except JWException:  # its text may quote the packet; that the key does not fit is all there is to know
        return None


def _recipients(packet: bytes, limit: int) -> Iterator[_Recipient]:
    """Check the whole packet and split it into one flattened JWE for each recipient."""
    value = encoding.json_object(packet, _WHAT, _PACKET_BYTES)
    encoding.members(
        value,
        _WHAT,
        required=("protected", "iv", "ciphertext", "tag"),
        optional=("recipients", "header", "encrypted_key"),
    )
    protected_text = encoding.string(value, "protected", _WHAT)
    raw = encoding.b64url_decode(protected_text, f"{_WHAT}: protected header")
    protected = encoding.json_object(raw, f"{_WHAT}: protected header", len(raw))
    content = {name: encoding.string(value, name, _WHAT) for name in ("protected", "iv", "ciphertext", "tag")}
    for name, text in content.items():
        encoding.b64url_decode(text, f"{_WHAT}: {name}")
    entries = value.get("recipients", [value])
    if not isinstance(entries, list) or not entries:
        raise MalformedImage(f"{_WHAT}: recipients is not a list")
    if len(entries) > limit:
        raise LimitExceeded(f"{_WHAT}: more recipients than limits.recipients")
    for entry in entries:
        if not isinstance(entry, dict):
            raise MalformedImage(f"{_WHAT}: a recipient is not an object")
        own = entry.get("header", {})
        wrapped = encoding.string(entry, "encrypted_key", _WHAT)
        encoding.b64url_decode(wrapped, f"{_WHAT}: encrypted_key")
        yield _Recipient(_merge(protected, own), content | {"header": own, "encrypted_key": wrapped})


def _merge(protected: dict[str, Any], own: Any) -> dict[str, Any]:
    """The JOSE header of one recipient, held against the allow-lists."""
    if not isinstance(own, dict) or own.keys() & protected.keys():
        raise MalformedImage(f"{_WHAT}: header is not an object disjoint from the protected one")
    header = protected | own
    unknown = sorted(header.keys() - _HEADER)
    if unknown:
        raise MalformedImage(f"{_WHAT}: header parameter {unknown[0][:40]!r} is not supported")
    if protected.get("enc") not in CONTENT_ALGORITHMS:
        raise MalformedImage(f"{_WHAT}: enc is not one of {', '.join(CONTENT_ALGORITHMS)}")
    if header.get("alg") not in RSA_ALGORITHMS + EC_ALGORITHMS:
        raise MalformedImage(f"{_WHAT}: alg is not one of {', '.join(RSA_ALGORITHMS + EC_ALGORITHMS)}")
    return header


def _wrap_key(cek: bytes, key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> tuple[dict[str, Any], bytes]:
    """Header and wrapped content key for one recipient (RFC 7518 §4.3, §4.6)."""
    if isinstance(key, rsa.RSAPublicKey):
        oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)  # noqa: S303 - what RSA-OAEP means
        return {"alg": "RSA-OAEP"}, key.encrypt(cek, oaep)
    ephemeral = ec.generate_private_key(key.curve)
    numbers = ephemeral.public_key().public_numbers()
    width = (key.curve.key_size + 7) // 8
    epk = {
        "kty": "EC",
        "crv": _CURVES[key.curve.name],
        "x": b64url_encode(numbers.x.to_bytes(width, "big")),
        "y": b64url_encode(numbers.y.to_bytes(width, "big")),
    }
    kek = concat_kdf(ephemeral.exchange(ec.ECDH(), key), "ECDH-ES+A256KW", 32)
    return {"alg": "ECDH-ES+A256KW", "epk": epk}, keywrap.aes_key_wrap(kek, cek)


def concat_kdf(shared: bytes, algorithm: str, size: int, apu: bytes = b"", apv: bytes = b"") -> bytes:
    """RFC 7518 §4.6.2: Concat KDF over SHA-256, `size` bytes."""
    parts = b"".join(len(part).to_bytes(4, "big") + part for part in (algorithm.encode(), apu, apv))
    return ConcatKDFHash(hashes.SHA256(), size, parts + (size * 8).to_bytes(4, "big")).derive(shared)


def _public_key(pem: bytes, number: int) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    if len(pem) > _KEY_FILE_BYTES or b"-----BEGIN PUBLIC KEY-----" not in pem:
        raise InvalidArgument(f"recipient {number}: not a PEM public key (SubjectPublicKeyInfo)")
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidArgument(f"recipient {number}: not a PEM public key (SubjectPublicKeyInfo)") from None
    try:
        _algorithms(key)
    except InvalidArgument as error:
        raise InvalidArgument(f"recipient {number}: {error}") from None
    assert isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
    return key


def _algorithms(key: object) -> tuple[str, ...]:
    """The key management algorithms of a public key. Raises InvalidArgument for other or weak kinds."""
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MIN_RSA_BITS:
        return RSA_ALGORITHMS
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return EC_ALGORITHMS
    raise InvalidArgument("key: only RSA of at least 2048 bits and the curves P-256, P-384, P-521 are supported")
