"""Sealed and plain chunks: what decode gives and refuses; sealing is deterministic and never reuses (K, N)."""

import hashlib
import hmac
import os
import threading

import lz4.block
import pytest
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from snapshotter.crypto import chunk
from snapshotter.errors import DecryptError, IntegrityError, InvalidArgument

S = bytes(range(32))
TEXT = b"the quick brown fox jumps over the lazy dog\n" * 200
CODECS = pytest.mark.parametrize("codec", [chunk.CODEC_NONE, chunk.CODEC_LZ4, chunk.CODEC_ZSTD])


def sealed(plain: bytes, codec: int, level: int = 3) -> tuple[bytes, bytes, int]:
    """Stored bytes, M and the codec that was used."""
    secret = chunk.derive(S, blake3(plain).digest())
    packed, used = chunk.compress(plain, codec, level)
    return chunk.seal(secret, packed, len(plain), used), secret, used


def read(stored: bytes, plain: bytes, codec: int, secret: bytes | None, **changes: object) -> bytes:
    arguments = {"digest": blake3(plain).digest(), "size": len(plain), "codec": codec, "sealed_secret": secret}
    return chunk.decode(stored, **(arguments | changes))  # type: ignore[arg-type]


@CODECS
@pytest.mark.parametrize(
    "plain", [b"x", TEXT, os.urandom(5000), bytes(1 << 20)], ids=["byte", "text", "random", "zeros"]
)
def test_what_was_sealed_comes_back(plain: bytes, codec: int) -> None:
    stored, secret, used = sealed(plain, codec)
    assert read(stored, plain, used, secret) == plain
    assert read(memoryview(bytearray(stored)), plain, used, secret) == plain  # type: ignore[arg-type]
    assert len(stored) <= len(plain) + chunk.OVERHEAD


@CODECS
@pytest.mark.parametrize("digester", [chunk.DIGEST_BLAKE3, chunk.DIGEST_SHA256])
def test_plain_chunks_are_decompressed_and_their_digest_is_checked(codec: int, digester: int) -> None:
    packed, used = chunk.compress(TEXT, codec)
    assert used == codec
    digest = blake3(TEXT).digest() if digester == chunk.DIGEST_BLAKE3 else hashlib.sha256(TEXT).digest()
    assert read(packed, TEXT, codec, None, digest=digest, digester=digester) == TEXT
    with pytest.raises(IntegrityError) as caught:
        read(packed, TEXT, codec, None, digest=digest, digester=1 - digester)
    assert caught.value.reason == "chunk-digest"


def test_data_that_does_not_shrink_is_stored_as_it_is() -> None:
    noise = os.urandom(4096)
    for codec in (chunk.CODEC_LZ4, chunk.CODEC_ZSTD):
        assert chunk.compress(noise, codec) == (noise, chunk.CODEC_NONE)


def test_the_construction_is_the_documented_one() -> None:
    """Built a second time from other primitives: HKDF of the library, AES-GCM from its parts."""
    plain, codec = TEXT, chunk.CODEC_ZSTD
    digest = blake3(plain).digest()
    secret = HKDF(hashes.SHA256(), 32, None, b"sealed-rafs/1 chunk" + digest).derive(S)
    assert chunk.derive(S, digest) == secret
    packed, _ = chunk.compress(plain, codec)
    aad = b"sealed-rafs/1" + len(plain).to_bytes(4, "little") + bytes([codec])
    nonce = hmac.new(secret, b"nonce" + aad + packed, hashlib.sha256).digest()[:12]
    key = hmac.new(secret, b"key", hashlib.sha256).digest()
    encryptor = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(aad)
    expected = nonce + encryptor.update(packed) + encryptor.finalize() + encryptor.tag
    assert chunk.seal(secret, packed, len(plain), codec) == expected
    name = hmac.new(secret, b"id" + bytes([codec]) + len(expected).to_bytes(4, "little"), hashlib.sha256).digest()
    assert chunk.chunk_id(secret, codec, len(expected)) == name
    assert chunk.open_(secret, expected, len(plain), codec) == packed
    assert chunk.domain_secret_public() == hashlib.sha256(b"sealed-rafs/1 public").digest()


def test_sealing_is_deterministic_inside_a_domain_and_different_outside() -> None:
    first, second = sealed(TEXT, chunk.CODEC_ZSTD), sealed(TEXT, chunk.CODEC_ZSTD)
    assert first == second
    other = chunk.derive(bytes(32), blake3(TEXT).digest())
    assert chunk.seal(other, *_packed(TEXT)) != first[0]


def _packed(plain: bytes) -> tuple[bytes, int, int]:
    packed, codec = chunk.compress(plain, chunk.CODEC_ZSTD)
    return packed, len(plain), codec


def test_a_key_never_meets_one_nonce_with_two_contents() -> None:
    """One p under many compressors: K is the same, so every different (AAD, c) needs its own N."""
    secret = chunk.derive(S, blake3(TEXT).digest())
    variants = {chunk.compress(TEXT, chunk.CODEC_ZSTD, level) for level in range(1, 20)}
    variants |= {chunk.compress(TEXT, codec) for codec in (chunk.CODEC_NONE, chunk.CODEC_LZ4)}
    assert len(variants) > 3
    nonces = {chunk.seal(secret, packed, len(TEXT), codec)[:12] for packed, codec in variants}
    assert len(nonces) == len(variants)
    packed, codec = next(variant for variant in variants if variant[1] == chunk.CODEC_ZSTD)
    other_size = chunk.seal(secret, packed, len(TEXT) - 1, codec)
    other_codec = chunk.seal(secret, packed, len(TEXT), chunk.CODEC_LZ4)
    assert len({other_size[:12], other_codec[:12], chunk.seal(secret, packed, len(TEXT), codec)[:12]}) == 3


def test_the_chunk_id_names_the_stored_variant() -> None:
    secret = chunk.derive(S, blake3(TEXT).digest())
    names = {chunk.chunk_id(secret, codec, size) for codec in (0, 1, 3) for size in (100, 101, 65536)}
    assert len(names) == 9
    assert not any(secret in name for name in names)


@pytest.mark.parametrize("codec", [2, 4, 255])
def test_codecs_of_other_formats_are_refused(codec: int) -> None:
    """2 is gzip: legal in RAFS, never in a chunk here."""
    with pytest.raises(IntegrityError) as caught:
        read(TEXT, TEXT, codec, None)
    assert caught.value.reason == "chunk-codec"
    for refused in (lambda: chunk.compress(TEXT, codec), lambda: chunk.seal(S, b"x", 1, codec)):
        with pytest.raises(InvalidArgument):
            refused()


def _zstd(plain: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(plain)  # type: ignore[arg-type]


def _streamed(plain: bytes) -> bytes:
    stream = zstandard.ZstdCompressor().compressobj()
    return stream.compress(plain) + stream.flush()


def _wide_window(plain: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=len(plain))
    return stream.compress(plain) + stream.flush()


def _with_dictionary(plain: bytes) -> bytes:
    samples = [os.urandom(20) + b"some shared text %d" % number for number in range(2000)]
    return zstandard.ZstdCompressor(dict_data=zstandard.train_dictionary(4096, samples)).compress(plain)


BIG = TEXT * 2000  # 17 MiB
HOSTILE_ZSTD = {
    "trailing garbage": _zstd(TEXT) + b"\0",
    "two frames": _zstd(TEXT[:100]) + _zstd(TEXT[100:]),
    "a frame too many": _zstd(TEXT) + _zstd(b""),
    "skippable frame in front": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + _zstd(TEXT),
    "skippable frame behind": _zstd(TEXT) + b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",
    "only a skippable frame": b"\x50\x2a\x4d\x18" + len(TEXT).to_bytes(4, "little") + TEXT,
    "unknown content size": _streamed(TEXT),
    "dictionary": _with_dictionary(TEXT),
    "cut short": _zstd(TEXT)[:-1],
    "content too long": _zstd(TEXT + b"!"),
    "content too short": _zstd(TEXT[:-1]),
    "bomb": _zstd(bytes(1 << 26)),
    "empty": b"",
    "not zstd": TEXT,
}


@pytest.mark.parametrize("name", HOSTILE_ZSTD)
def test_hostile_zstd_frames_are_refused(name: str) -> None:
    packed = HOSTILE_ZSTD[name]
    with pytest.raises(IntegrityError):
        read(packed, TEXT, chunk.CODEC_ZSTD, None)
    if 0 < len(packed) <= len(TEXT):  # sealed by somebody who knows the key
        secret = chunk.derive(S, blake3(TEXT).digest())
        stored = chunk.seal(secret, packed, len(TEXT), chunk.CODEC_ZSTD)
        with pytest.raises(IntegrityError):
            read(stored, TEXT, chunk.CODEC_ZSTD, secret)


def test_a_window_larger_than_any_chunk_is_refused() -> None:
    plain = BIG[: chunk.MAX_PLAIN_CHUNK]
    packed = _wide_window(plain)
    assert zstandard.get_frame_parameters(packed).window_size > 8 << 20
    with pytest.raises(IntegrityError, match="contradicts"):
        read(packed, plain, chunk.CODEC_ZSTD, None)


def test_a_frame_with_a_checksum_is_readable_and_a_wrong_checksum_is_not() -> None:
    packed = _zstd(TEXT, write_checksum=True)
    assert read(packed, TEXT, chunk.CODEC_ZSTD, None) == TEXT
    with pytest.raises(IntegrityError):
        read(packed[:-1] + bytes([packed[-1] ^ 1]), TEXT, chunk.CODEC_ZSTD, None)


def test_hostile_lz4_blocks_are_refused() -> None:
    block = lz4.block.compress(TEXT, store_size=False)
    for packed in (
        block + b"\0",
        block[:-1],
        lz4.block.compress(TEXT),
        lz4.block.compress(TEXT[:-1], store_size=False),
        b"",
        b"\xff",
    ):
        with pytest.raises(IntegrityError):
            read(packed, TEXT, chunk.CODEC_LZ4, None)


@pytest.mark.parametrize("size", [-1, 0, chunk.MAX_PLAIN_CHUNK + 1, 1 << 40])
def test_sizes_outside_the_bounds_are_refused_before_anything_is_allocated(size: int) -> None:
    for codec in (0, 1, 3):
        for secret in (None, S):
            with pytest.raises(IntegrityError) as caught:
                read(_zstd(TEXT), TEXT, codec, secret, size=size)
            assert caught.value.reason == "chunk-size"


def test_sealed_chunks_are_at_most_8_mib() -> None:
    with pytest.raises(IntegrityError, match="claims"):
        read(bytes(100), TEXT, 3, S, size=chunk.MAX_SEALED_CHUNK + 1)
    with pytest.raises(InvalidArgument):
        chunk.seal(S, b"x", chunk.MAX_SEALED_CHUNK + 1, 3)


@pytest.mark.parametrize("length", [0, 1, 12, 27, 28])
def test_a_stored_chunk_shorter_than_nonce_and_tag_is_refused(length: int) -> None:
    with pytest.raises(IntegrityError) as caught:
        read(bytes(length), TEXT, 0, S)
    assert caught.value.reason == "chunk-size"


def test_a_failed_decryption_leaves_nothing_in_the_buffer_and_does_not_spoil_the_next() -> None:
    stored, secret, codec = sealed(TEXT, chunk.CODEC_NONE)
    broken = stored[:-1] + bytes([stored[-1] ^ 1])
    with pytest.raises(DecryptError) as caught:
        read(broken, TEXT, codec, secret)
    assert caught.value.reason == "chunk-tag"
    assert not any(chunk._thread.scratch[: len(TEXT)])
    assert read(stored, TEXT, codec, secret) == TEXT


def test_a_wrong_digest_in_the_tables_is_found() -> None:
    stored, secret, codec = sealed(TEXT, chunk.CODEC_ZSTD)
    for digest in (bytes(32), blake3(TEXT).digest()[:31], b""):
        with pytest.raises(IntegrityError) as caught:
            read(stored, TEXT, codec, secret, digest=digest)
        assert caught.value.reason == "chunk-digest"


def test_errors_show_neither_keys_nor_digests_nor_content() -> None:
    stored, secret, codec = sealed(TEXT, chunk.CODEC_ZSTD)
    for act in (
        lambda: read(stored[:-1], TEXT, codec, secret),
        lambda: read(stored, TEXT, codec, secret, digest=bytes(32)),
        lambda: read(stored, TEXT, codec, secret, size=len(TEXT) - 1),
    ):
        with pytest.raises(IntegrityError) as caught:
            act()
        text = f"{caught.value!r} {caught.value} {caught.value.__cause__!r}"
        for canary in (secret, blake3(TEXT).digest(), TEXT[:16]):
            assert canary.hex() not in text
            assert repr(canary)[2:-1] not in text


def test_threads_do_not_share_buffers() -> None:
    plains = [bytes([number]) * 100_000 + os.urandom(1000) for number in range(4)]
    chunks = [sealed(plain, chunk.CODEC_ZSTD) for plain in plains]
    wrong: list[int] = []

    def work(index: int) -> None:
        stored, secret, codec = chunks[index]
        for _ in range(50):
            if read(stored, plains[index], codec, secret) != plains[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("secret", "digest"), [(b"", bytes(32)), (bytes(31), bytes(32)), (bytes(32), bytes(31))])
def test_secrets_of_another_length_are_refused(secret: bytes, digest: bytes) -> None:
    with pytest.raises(InvalidArgument):
        chunk.derive(secret, digest)
