"""Every way to change a stored chunk or the tables around it ends in IntegrityError, never in other plaintext."""

import os
from typing import NamedTuple

import pytest
from blake3 import blake3

from snapshotter.crypto import chunk
from snapshotter.errors import DecryptError, IntegrityError

S = os.urandom(32)


class Sealed(NamedTuple):
    plain: bytes
    stored: bytes
    secret: bytes
    codec: int

    def read(self, **changes: object) -> bytes:
        arguments = {
            "digest": blake3(self.plain).digest(),
            "size": len(self.plain),
            "codec": self.codec,
            "sealed_secret": self.secret,
        }
        stored = changes.pop("stored", self.stored)
        return chunk.decode(stored, **(arguments | changes))  # type: ignore[arg-type]


def seal(plain: bytes, codec: int) -> Sealed:
    secret = chunk.derive(S, blake3(plain).digest())
    packed, used = chunk.compress(plain, codec)
    assert used == codec
    return Sealed(plain, chunk.seal(secret, packed, len(plain), codec), secret, codec)


@pytest.fixture(params=[chunk.CODEC_NONE, chunk.CODEC_LZ4, chunk.CODEC_ZSTD], ids=["none", "lz4", "zstd"])
def one(request: pytest.FixtureRequest) -> Sealed:
    return seal(b"a chunk of text, a chunk of text, " * 8 + os.urandom(16), request.param)


@pytest.mark.parametrize("bit", range(8))
def test_every_bit_of_nonce_ciphertext_and_tag(one: Sealed, bit: int) -> None:
    for at in range(len(one.stored)):
        changed = bytearray(one.stored)
        changed[at] ^= 1 << bit
        with pytest.raises(DecryptError) as caught:
            one.read(stored=changed)
        assert caught.value.reason == "chunk-tag"
    assert one.read() == one.plain


def test_every_byte_of_a_chunk_that_is_not_sealed() -> None:
    plain = b"a chunk of text, a chunk of text, " * 8
    for codec in (chunk.CODEC_NONE, chunk.CODEC_LZ4, chunk.CODEC_ZSTD):
        packed, _ = chunk.compress(plain, codec)
        for at in range(len(packed)):
            changed = bytearray(packed)
            changed[at] ^= 0x55
            try:  # a few header bits of zstd say nothing about the content; then the content is still right
                result = chunk.decode(
                    changed, digest=blake3(plain).digest(), size=len(plain), codec=codec, sealed_secret=None
                )
            except IntegrityError:
                continue
            assert result == plain


def test_cut_and_extended(one: Sealed) -> None:
    for length in range(len(one.stored)):
        with pytest.raises(IntegrityError):
            one.read(stored=one.stored[:length])
    for more in (b"\0", one.stored):
        with pytest.raises(IntegrityError):
            one.read(stored=one.stored + more)


def test_chunks_swapped_within_an_image() -> None:
    """Same length, same codec, same domain: only the key tells them apart."""
    first, second = seal(b"A" * 4096, chunk.CODEC_ZSTD), seal(b"B" * 4096, chunk.CODEC_ZSTD)
    assert len(first.stored) == len(second.stored)
    with pytest.raises(DecryptError):
        first.read(stored=second.stored)
    with pytest.raises(DecryptError):
        first.read(sealed_secret=second.secret)
    with pytest.raises(IntegrityError) as caught:
        first.read(digest=blake3(second.plain).digest())
    assert caught.value.reason == "chunk-digest"


def test_parts_of_two_variants_of_one_chunk_do_not_mix() -> None:
    plain = bytes(range(256)) * 64
    secret = chunk.derive(S, blake3(plain).digest())
    one, other = (chunk.seal(secret, chunk.compress(plain, 3, level)[0], len(plain), 3) for level in (1, 19))
    for nonce in (one, other):
        for body in (one, other):
            for tag in (one, other):
                mixed = nonce[:12] + body[12:-16] + tag[-16:]
                if mixed in (one, other):
                    continue
                with pytest.raises(IntegrityError):
                    chunk.decode(mixed, digest=blake3(plain).digest(), size=len(plain), codec=3, sealed_secret=secret)


def test_another_codec_or_length_in_the_tables(one: Sealed) -> None:
    for codec in range(256):
        if codec != one.codec:
            with pytest.raises(IntegrityError):
                one.read(codec=codec)
    for size in (1, len(one.plain) - 1, len(one.plain) + 1, 2 * len(one.plain), chunk.MAX_SEALED_CHUNK):
        with pytest.raises(IntegrityError):
            one.read(size=size)


def test_a_sealed_chunk_is_not_read_as_a_plain_one(one: Sealed) -> None:
    with pytest.raises(IntegrityError):
        one.read(sealed_secret=None)
    with pytest.raises(IntegrityError):
        one.read(sealed_secret=None, size=len(one.stored))


def test_every_bit_of_the_key(one: Sealed) -> None:
    for at in range(32):
        changed = bytearray(one.secret)
        changed[at] ^= 0x80
        with pytest.raises(DecryptError):
            one.read(sealed_secret=bytes(changed))
