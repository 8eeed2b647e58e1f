"""Encryption of a whole layer, AES_256_CTR_HMAC_SHA256, byte for byte as ocicrypt does it.

    C = AES-256-CTR(symkey, initial counter block = nonce)(P)        hmac = HMAC-SHA256(symkey, C)

One MAC covers the layer, so nothing is decrypted before all of it was checked. The public options travel in the
manifest (annotation enc.pubopts), the private ones wrapped for the recipients; JSON as Go's encoding/json writes it.
"""

import hmac
import re
import secrets
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from snapshotter.crypto import encoding
from snapshotter.crypto.secret import SecretBytes
from snapshotter.digest import Digest
from snapshotter.errors import DecryptError, MalformedImage

CIPHER: Final = "AES_256_CTR_HMAC_SHA256"
KEY_BYTES, NONCE_BYTES, HMAC_BYTES = 32, 16, 32
_OPTIONS_BYTES = 4096  # either options object is about 200
_BLOCK = 16
_DIGEST = re.compile(r"([a-z0-9+._-]{1,40}:[A-Za-z0-9=_-]{1,200})?")  # OCI grammar, or absent


@dataclass(frozen=True, slots=True)
class LayerPublic:
    """Public options: the MAC of the encrypted layer, 32 bytes."""

    hmac: bytes

    def pack(self) -> bytes:
        return b'{"cipher":"%b","hmac":"%b","cipheroptions":{}}' % (
            CIPHER.encode(),
            encoding.b64_encode(self.hmac).encode(),
        )

    @classmethod
    def parse(cls, raw: bytes) -> "LayerPublic":
        """Raises MalformedImage. Public cipheroptions would override the wrapped nonce, so they must be empty."""
        what = "public layer options"
        value = encoding.json_object(raw, what, _OPTIONS_BYTES)
        encoding.members(value, what, required=("cipher", "hmac", "cipheroptions"))
        if encoding.string(value, "cipher", what) != CIPHER:
            raise MalformedImage(f"{what}: cipher is not {CIPHER}")
        if value["cipheroptions"] != {}:
            raise MalformedImage(f"{what}: cipheroptions are not empty")
        return cls(encoding.b64_decode(encoding.string(value, "hmac", what), f"{what}: hmac", HMAC_BYTES))


@dataclass(frozen=True, slots=True)
class LayerPrivate:
    """Private options: what a recipient learns. `digest` names the layer before encryption; nobody verifies it.

    `kek` is the name of the key that opened them, for the audit log.
    """

    symkey: SecretBytes
    nonce: bytes = field(repr=False)
    digest: str
    kek: str = field(default="", compare=False)

    def pack(self) -> SecretBytes:
        return SecretBytes(
            b'{"symkey":"%b","digest":"%b","cipheroptions":{"nonce":"%b"}}'
            % (
                encoding.b64_encode(self.symkey.expose()).encode(),
                self.digest.encode(),
                encoding.b64_encode(self.nonce).encode(),
            )
        )

    @classmethod
    def parse(cls, raw: SecretBytes, kek: str = "") -> "LayerPrivate":
        """Raises MalformedImage, which says which check failed and nothing of the content."""
        what = "private layer options"
        value = encoding.json_object(raw.expose() if len(raw) else b"", what, _OPTIONS_BYTES)
        encoding.members(value, what, required=("symkey", "cipheroptions"), optional=("digest",))
        options = value["cipheroptions"]
        if not isinstance(options, dict):
            raise MalformedImage(f"{what}: cipheroptions is not an object")
        encoding.members(options, f"{what}: cipheroptions", required=("nonce",))
        symkey = encoding.b64_decode(encoding.string(value, "symkey", what), f"{what}: symkey", KEY_BYTES)
        nonce = encoding.b64_decode(encoding.string(options, "nonce", what), f"{what}: nonce", NONCE_BYTES)
        digest = encoding.string(value, "digest", what) if "digest" in value else ""
        if not _DIGEST.fullmatch(digest):
            raise MalformedImage(f"{what}: digest is not one")
        return cls(SecretBytes(symkey), nonce, digest, kek)


def encrypt(plain: bytes | bytearray | memoryview) -> tuple[bytes, LayerPublic, LayerPrivate]:
    """Encrypt under a fresh key and nonce."""
    private = LayerPrivate(
        SecretBytes(secrets.token_bytes(KEY_BYTES)), secrets.token_bytes(NONCE_BYTES), Digest.of(plain)
    )
    cipher, public = encrypt_with(plain, private)
    return cipher, public, private


def encrypt_with(plain: bytes | bytearray | memoryview, private: LayerPrivate) -> tuple[bytes, LayerPublic]:
    """Encrypt under given options; a key must never see a second layer."""
    key = private.symkey.expose()
    cipher = Cipher(algorithms.AES(key), modes.CTR(private.nonce)).encryptor().update(plain)
    return cipher, LayerPublic(hmac.digest(key, cipher, "sha256"))


class Mac:
    """The MAC of a layer that comes in pieces."""

    def __init__(self, private: LayerPrivate) -> None:
        self._hmac = hmac.new(private.symkey.expose(), digestmod="sha256")

    def update(self, cipher: bytes) -> None:
        self._hmac.update(cipher)

    def check(self, public: LayerPublic) -> None:
        """Raises DecryptError (layer-hmac)."""
        if not compare_digest(self._hmac.digest(), public.hmac):
            raise _wrong_hmac()


def decryptor(private: LayerPrivate) -> CipherContext:
    """Decrypts a layer from its beginning, piece by piece; only for what `Mac` has accepted."""
    return Cipher(algorithms.AES(private.symkey.expose()), modes.CTR(private.nonce)).decryptor()


def decrypt_verified(cipher: bytes | bytearray | memoryview, private: LayerPrivate, public: LayerPublic) -> bytearray:
    """The plaintext, as long as `cipher`. Raises DecryptError (layer-hmac) before a byte is decrypted."""
    key = private.symkey.expose()
    if not compare_digest(hmac.digest(key, cipher, "sha256"), public.hmac):
        raise _wrong_hmac()
    plain = bytearray(len(cipher) + _BLOCK - 1)  # the slack is what update_into asks for
    written = Cipher(algorithms.AES(key), modes.CTR(private.nonce)).decryptor().update_into(cipher, plain)
    del plain[written:]
    return plain


def _wrong_hmac() -> DecryptError:
    return DecryptError("layer: its HMAC does not match", reason="layer-hmac")
