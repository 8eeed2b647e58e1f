"""One chunk: sealing it, and the whole read path back to plaintext (format: docs/formats.md, "Sealed chunk").

`decode` is the hot path of every read, so it makes no copy it can avoid, keeps one scratch buffer and one zstd context
per thread, and spends its time in primitives that release the GIL.

    d = BLAKE3(p)    M = HKDF-SHA256(S, info = "sealed-rafs/1 chunk" ‖ d)    K = HMAC(M, "key")
    AAD = "sealed-rafs/1" ‖ le32(len p) ‖ u8(codec)    N = HMAC(M, "nonce" ‖ AAD ‖ c)[:12]
    stored = N ‖ AES-256-GCM(K, N, c, AAD)
"""

import hashlib
import hmac
import struct
import threading
from hmac import compare_digest
from typing import TypeAlias

import lz4.block
import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snapshotter.errors import DecryptError, IntegrityError, InvalidArgument

Buffer: TypeAlias = bytes | bytearray | memoryview

CODEC_NONE, CODEC_LZ4, CODEC_ZSTD = 0, 1, 3  # RAFS compression algorithms; gzip (2) is never a chunk codec here
DIGEST_BLAKE3, DIGEST_SHA256 = 0, 1  # RAFS digest algorithms
NONCE_BYTES, TAG_BYTES = 12, 16
OVERHEAD = NONCE_BYTES + TAG_BYTES
MAX_SEALED_CHUNK = 8 << 20  # bytes of plaintext
MAX_PLAIN_CHUNK = 16 << 20

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_MAX_WINDOW = 8 << 20  # what RFC 8878 §3.1.1.1.2 asks every decoder to support
_AAD = struct.Struct("<13sIB")
_LABEL = b"sealed-rafs/1"
_ID = struct.Struct("<2sBI")


class _Thread(threading.local):
    """Per-thread contexts: making one costs more than decoding a small chunk."""

    def __init__(self) -> None:
        self.scratch = bytearray()
        self.zstd = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}


_thread = _Thread()


def domain_secret_public() -> bytes:
    """S of the public convergence domain, 32 bytes known to everybody."""
    return hashlib.sha256(b"sealed-rafs/1 public").digest()


def derive(secret: bytes, digest: bytes) -> bytes:
    """M of the chunk whose plaintext has this BLAKE3 digest; HKDF-SHA256 (RFC 5869) with no salt, L = 32."""
    if len(secret) != 32 or len(digest) != 32:
        raise InvalidArgument("convergence secret and chunk digest are 32 bytes each")
    pseudo_random_key = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(pseudo_random_key, b"sealed-rafs/1 chunk" + digest + b"\x01", "sha256")


def chunk_id(secret: bytes, codec: int, stored_size: int) -> bytes:
    """32-byte name of one stored variant of the chunk with this M: safe to show, and what caches go by."""
    return hmac.digest(secret, _ID.pack(b"id", codec, stored_size), "sha256")


def seal(secret: bytes, compressed: Buffer, size: int, codec: int) -> bytes:
    """The stored form N ‖ ciphertext ‖ tag of `compressed`, which decompresses to `size` bytes. Deterministic."""
    if len(secret) != 32 or not 0 < len(compressed) <= size <= MAX_SEALED_CHUNK:
        raise InvalidArgument("a sealed chunk has a 32-byte secret and 1 byte to 8 MiB that compression did not grow")
    if codec not in (CODEC_NONE, CODEC_LZ4, CODEC_ZSTD):
        raise InvalidArgument(f"{codec} is no codec of sealed chunks")
    aad = _AAD.pack(_LABEL, size, codec)
    nonce = hmac.digest(secret, b"".join((b"nonce", aad, compressed)), "sha256")[:NONCE_BYTES]
    return nonce + AESGCM(hmac.digest(secret, b"key", "sha256")).encrypt(nonce, compressed, aad)


def open_(secret: bytes, stored: Buffer, size: int, codec: int) -> bytes:
    """The compressed bytes of a sealed chunk. Raises DecryptError (chunk-tag), IntegrityError (chunk-size)."""
    return bytes(_open(secret, memoryview(stored), size, codec))


def decode(
    stored: Buffer,
    *,
    digest: bytes,
    size: int,
    codec: int,
    sealed_secret: bytes | None,
    digester: int = DIGEST_BLAKE3,
) -> bytes:
    """Exactly `size` bytes of plaintext whose digest is `digest`; nothing else ever comes out of here.

    Order: length bounds → tag (when `sealed_secret`, the chunk's M, is given) → decompress → size → digest.
    Raises DecryptError (reason chunk-tag) or IntegrityError (chunk-size, chunk-codec, chunk-digest).
    """
    if not 0 < size <= (MAX_PLAIN_CHUNK if sealed_secret is None else MAX_SEALED_CHUNK):
        raise IntegrityError(f"chunk: claims {size} bytes of content", reason="chunk-size")
    compressed: Buffer = stored
    if sealed_secret is not None:
        compressed = _open(sealed_secret, memoryview(stored), size, codec)
    plain = _decompress(compressed, size, codec)
    if digester == DIGEST_BLAKE3:
        actual = blake3(plain).digest()
    elif digester == DIGEST_SHA256:
        actual = hashlib.sha256(plain).digest()
    else:
        raise IntegrityError(f"chunk: unknown digest algorithm {digester}", reason="chunk-codec")
    if not compare_digest(actual, digest):
        raise IntegrityError("chunk: content does not have its digest", reason="chunk-digest")
    return plain


def compress(data: Buffer, codec: int, level: int = 3) -> tuple[bytes, int]:
    """`data` in the given codec and that codec; or unchanged and CODEC_NONE when that is not smaller."""
    if codec == CODEC_ZSTD:
        compressor = _thread.compressors.get(level)
        if compressor is None:
            compressor = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
            _thread.compressors[level] = compressor
        packed = compressor.compress(data)
    elif codec == CODEC_LZ4:
        packed = lz4.block.compress(data, store_size=False)
    elif codec == CODEC_NONE:
        return bytes(data), CODEC_NONE
    else:
        raise InvalidArgument(f"{codec} is no codec of chunks")
    return (packed, codec) if len(packed) < len(data) else (bytes(data), CODEC_NONE)


def _open(secret: bytes, stored: memoryview, size: int, codec: int) -> memoryview:
    """Authenticate and decrypt into this thread's scratch buffer, which the next call on this thread overwrites."""
    length = len(stored) - OVERHEAD
    if not 0 < length <= size or (codec == CODEC_NONE and length != size):
        raise IntegrityError(f"chunk: {len(stored)} stored bytes cannot hold {size}", reason="chunk-size")
    if len(_thread.scratch) < length:
        _thread.scratch = bytearray(length)
    out = memoryview(_thread.scratch)[:length]
    cipher = AESGCM(hmac.digest(secret, b"key", "sha256"))
    try:
        cipher.decrypt_into(stored[:NONCE_BYTES], stored[NONCE_BYTES:], _AAD.pack(_LABEL, size, codec), out)
    except InvalidTag:
        out[:] = bytes(length)  # it holds what an attacker chose
        raise DecryptError("chunk: authentication failed", reason="chunk-tag") from None
    return out


def _decompress(data: Buffer, size: int, codec: int) -> bytes:
    """Exactly `size` bytes, allocating no more than that."""
    if codec == CODEC_ZSTD:
        plain = _unzstd(data, size)
    elif codec == CODEC_LZ4:
        try:
            plain = lz4.block.decompress(data, uncompressed_size=size)
        except (lz4.block.LZ4BlockError, ValueError):
            raise IntegrityError("chunk: not a valid lz4 block of its size", reason="chunk-codec") from None
    elif codec == CODEC_NONE:
        plain = bytes(data)
    else:
        raise IntegrityError(f"chunk: codec {codec} is not supported", reason="chunk-codec")
    if len(plain) != size:
        raise IntegrityError(f"chunk: holds {len(plain)} bytes instead of {size}", reason="chunk-size")
    return plain


def _unzstd(data: Buffer, size: int) -> bytes:
    """One zstd frame that states its content size, no dictionary, nothing behind it."""
    try:
        # The header decides how much the library allocates, so it is held against the table first.
        frame = zstandard.get_frame_parameters(data)
        if data[:4] != _ZSTD_MAGIC or frame.content_size != size or frame.dict_id or frame.window_size > _MAX_WINDOW:
            raise IntegrityError("chunk: zstd frame header contradicts the chunk table", reason="chunk-codec")
        return _thread.zstd.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError:
        raise IntegrityError("chunk: not a valid zstd frame", reason="chunk-codec") from None
