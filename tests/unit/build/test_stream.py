import gzip
import hashlib
import os
import tracemalloc

import pytest
import zstandard

from snapshotter.build.stream import ByteStream, decompressed
from snapshotter.errors import BadLayer
from tests.unit.build.tars import pieces

PLAIN = os.urandom(3000) + bytes(5000) + b"tail"


def packed(kind: str) -> bytes:
    half = len(PLAIN) // 2
    match kind:
        case "plain":
            return PLAIN
        case "gzip":
            return gzip.compress(PLAIN)
        case "gzip-members":
            return gzip.compress(PLAIN[:half]) + gzip.compress(PLAIN[half:])
        case "gzip-padded":
            return gzip.compress(PLAIN) + bytes(700)
        case "zstd":
            return zstandard.compress(PLAIN)
        case "zstd-frames":
            skippable = b"\x50\x2a\x4d\x18\x05\0\0\0hello"
            return skippable + zstandard.compress(PLAIN[:half]) + skippable + zstandard.compress(PLAIN[half:])
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["plain", "gzip", "gzip-members", "gzip-padded", "zstd", "zstd-frames"])
@pytest.mark.parametrize("step", [1, 7, 4096])
def test_every_compression_yields_the_plain_bytes_and_their_digest(kind: str, step: int) -> None:
    stream = ByteStream(decompressed(pieces(packed(kind), step)))
    assert stream.read(10) == PLAIN[:10]
    stream.skip(100)
    assert stream.read(3000) == PLAIN[110:3110]
    assert not stream.at_end()
    assert stream.finish() == "sha256:" + hashlib.sha256(PLAIN).hexdigest()


def test_an_empty_layer_is_an_empty_stream() -> None:
    stream = ByteStream(decompressed(iter([])))
    assert stream.at_end()
    with pytest.raises(BadLayer):
        stream.read(1)


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_truncated_gzip_stream_is_refused(cut: int) -> None:
    with pytest.raises(BadLayer, match="cut short"):
        ByteStream(decompressed(pieces(gzip.compress(PLAIN)[:-cut]))).finish()


def test_garbage_behind_a_gzip_member_is_refused() -> None:
    with pytest.raises(BadLayer, match="damaged"):
        ByteStream(decompressed(pieces(gzip.compress(PLAIN) + b"garbage"))).finish()


def test_a_damaged_zstd_stream_is_refused() -> None:
    data = bytearray(zstandard.compress(os.urandom(300) * 9))
    data[20] ^= 0xFF
    with pytest.raises(BadLayer):
        ByteStream(decompressed(pieces(bytes(data)[:4] + b"\xff" * 40))).finish()


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_decompression_bomb_needs_little_memory(pack: object) -> None:
    bomb = pack(bytes(200 << 20))  # type: ignore[operator]
    tracemalloc.start()
    try:
        stream = ByteStream(decompressed(iter([bomb])))
        stream.skip(200 << 20)
        assert stream.at_end()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
