"""The ephemeral key of one attestation, and the JWE answers that a KBS encrypts to it.

The public half is bound into the evidence as a JWK; resources come back as flattened JWE of exactly one form:
`alg` of the key (ECDH-ES+A256KW for P-256 and P-521, RSA-OAEP-256 for RSA), `enc` A256GCM, no other header parameter
than `epk`. So `none`, `dir`, RSA1_5, `zip` and `crit` are refused by not being there.
"""

from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snapshotter.crypto import encoding
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import MalformedImage
from snapshotter.keys import eckey
from snapshotter.keys.jwe import concat_kdf

Kind: TypeAlias = Literal["P-256", "P-521", "RSA"]
EC_ALGORITHM: Final = "ECDH-ES+A256KW"
RSA_ALGORITHM: Final = "RSA-OAEP-256"
ANSWER_BYTES: Final = 3 << 20  # a resource of 2 MiB in base64, and the rest
_WHAT = "resource answer"


@dataclass(frozen=True, slots=True)
class TeeKey:
    """A key pair; `jwk` is the public half as the KBS protocol writes it."""

    jwk: dict[str, str]
    private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def generate(cls, kind: Kind) -> "TeeKey":
        """RSA (2048 bits) takes a tenth of a second."""
        if kind == "RSA":
            private = rsa.generate_private_key(65537, 2048)
            numbers = private.public_key().public_numbers()
            jwk = {"kty": "RSA", "alg": RSA_ALGORITHM, "n": eckey.uint(numbers.n, 256), "e": eckey.uint(numbers.e, 3)}
            return cls(jwk, private)
        key = ec.generate_private_key(eckey.CURVES[kind])
        return cls({"kty": "EC", "crv": kind, "alg": EC_ALGORITHM} | eckey.coordinates(key.public_key()), key)

    def open(self, raw: bytes) -> SecretBytes:
        """The resource in an answer. Raises MalformedImage naming the failed check, LimitExceeded."""
        value = encoding.json_object(raw, _WHAT, ANSWER_BYTES)
        encoding.members(value, _WHAT, required=("protected", "encrypted_key", "iv", "ciphertext", "tag"))
        protected = encoding.string(value, "protected", _WHAT)
        header_raw = encoding.b64url_decode(protected, f"{_WHAT}: protected")
        header = encoding.json_object(header_raw, f"{_WHAT}: protected header", 4096)
        parts = {
            name: encoding.b64url_decode(encoding.string(value, name, _WHAT), f"{_WHAT}: {name}")
            for name in ("encrypted_key", "iv", "ciphertext", "tag")
        }
        if len(parts["iv"]) != 12 or len(parts["tag"]) != 16:
            raise MalformedImage(f"{_WHAT}: iv is not 12 bytes or tag not 16")
        cek = self._content_key(header, parts["encrypted_key"])
        try:
            sealed = parts["ciphertext"] + parts["tag"]
            return SecretBytes(AESGCM(cek).decrypt(parts["iv"], sealed, protected.encode()))
        except InvalidTag:
            raise MalformedImage(f"{_WHAT}: does not authenticate") from None

    def _content_key(self, header: dict[str, Any], wrapped: bytes) -> bytes:
        is_rsa = isinstance(self.private, rsa.RSAPrivateKey)
        encoding.members(
            header, f"{_WHAT}: protected header", required=("alg", "enc") if is_rsa else ("alg", "enc", "epk")
        )
        if header["alg"] != self.jwk["alg"] or header["enc"] != "A256GCM":
            raise MalformedImage(f"{_WHAT}: alg is not {self.jwk['alg']} or enc not A256GCM")
        try:
            if isinstance(self.private, rsa.RSAPrivateKey):
                oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
                cek = self.private.decrypt(wrapped, oaep)
            else:
                shared = self.private.exchange(ec.ECDH(), self._peer(header["epk"]))
                cek = keywrap.aes_key_unwrap(concat_kdf(shared, EC_ALGORITHM, 32), wrapped)
        except (ValueError, keywrap.InvalidUnwrap):
            raise MalformedImage(f"{_WHAT}: its content key is not encrypted to this attestation's key") from None
        if len(cek) != 32:
            raise MalformedImage(f"{_WHAT}: content key is not 32 bytes")
        return cek

    def _peer(self, epk: Any) -> ec.EllipticCurvePublicKey:
        key = eckey.public_key(epk, f"{_WHAT}: epk")
        if epk["crv"] != self.jwk["crv"]:
            raise MalformedImage(f"{_WHAT}: epk is not on {self.jwk['crv']}")
        return key
