import io
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from snapshotter.build import chunker
from snapshotter.build.chunker import Chunker, ChunkStore, Codec, Packed, PlainPacker, SealingPacker
from snapshotter.build.stream import ByteStream
from snapshotter.build.tar import TarReader
from snapshotter.config import Limits
from snapshotter.crypto import chunk
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import InvalidArgument, LimitExceeded, SnapshotterError
from tests.unit.build.tars import END, member, pax, pieces

SIZE = 4096
SECRET = bytes(32)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with (tmp_path / "spool").open("w+b") as spool:
        yield ChunkStore(spool)


def sealing() -> SealingPacker:
    return SealingPacker(Codec.parse("zstd"), SecretBytes(SECRET))


def cut(
    store: ChunkStore, archive: bytes, limits: Limits | None = None, pack: chunker.Packer | None = None
) -> list["array[int]"]:
    limits = limits or Limits()
    with Chunker(store, pack or sealing(), SIZE, limits) as cutter:
        numbers = [cutter.cut(entry) for entry in TarReader(ByteStream(pieces(archive)), limits)]
        cutter.finish()
    return numbers


def content(store: ChunkStore, numbers: "array[int]") -> bytes:
    return b"".join(
        chunk.decode(
            store.read(number),
            digest=store.digest(number),
            size=store.sizes[number],
            codec=store.codecs[number],
            sealed_secret=store.secret(number),
        )
        for number in numbers
    )


def test_files_come_back_from_their_chunks(store: ChunkStore) -> None:
    files = [b"", b"a", os.urandom(SIZE), os.urandom(3 * SIZE + 5), b"text" * 5000, bytes(SIZE * 3 + 1)]
    numbers = cut(store, b"".join(member(b"f", data) for data in files) + END)
    assert [content(store, found) for found in numbers] == files
    assert [len(found) for found in numbers] == [0, 1, 1, 4, 5, 4]


def test_equal_chunks_are_stored_once(store: ChunkStore) -> None:
    data = os.urandom(SIZE)
    numbers = cut(store, member(b"a", data + b"x") + member(b"b", data + data) + member(b"c", b"x") + END)
    assert [list(found) for found in numbers] == [[0, 1], [0, 0], [1]]
    assert len(store) == 2


def test_a_hole_is_one_chunk_of_zeros(store: ChunkStore) -> None:
    size = 1 << 30
    records = {b"GNU.sparse.map": b"5000,3,%d,2" % (size - 2), b"GNU.sparse.size": b"%d" % size}
    [numbers] = cut(store, pax(records) + member(b"f", b"abcde") + END)
    assert len(numbers) == size // SIZE
    assert len(store) == 3
    assert content(store, numbers[1:2]) == bytes(904) + b"abc" + bytes(SIZE - 907)
    assert content(store, numbers[-1:]) == bytes(SIZE - 2) + b"de"
    assert set(numbers[2:-1]) == {numbers[0]}


@pytest.mark.parametrize(
    ("map_text", "size", "data"),
    [
        (b"0,3,10,3,4090,12", 4103, b"abcdefghijklmnopqr"),
        (b"4096,1", 8192, b"a"),
        (b"1,1,8193,1", 8194, b"ab"),
        (b"0,0,5,1,9000,0", 9000, b"z"),
    ],
)
def test_sparse_files_are_cut_like_others(store: ChunkStore, map_text: bytes, size: int, data: bytes) -> None:
    records = {b"GNU.sparse.map": map_text, b"GNU.sparse.size": b"%d" % size}
    expected = bytearray(size)
    rest = io.BytesIO(data)
    values = [int(item) for item in map_text.split(b",")]
    for offset, length in zip(values[::2], values[1::2], strict=True):
        expected[offset : offset + length] = rest.read(length)
    plain, sparse = cut(store, member(b"p", bytes(expected)) + pax(records) + member(b"s", data) + END)
    assert plain == sparse
    assert content(store, sparse) == bytes(expected)


def test_a_file_that_claims_exabytes_is_refused(store: ChunkStore) -> None:
    records = {b"GNU.sparse.map": b"0,0", b"GNU.sparse.size": b"%d" % (1 << 60)}
    with pytest.raises(LimitExceeded, match="bootstrap_unpacked_bytes"):
        cut(store, pax(records) + member(b"f") + END)


def test_chunk_numbers_and_stored_bytes_do_not_depend_on_timing(tmp_path: Path) -> None:
    archive = b"".join(member(b"f%d" % n, os.urandom(n * 37)) for n in range(300)) + END
    seen = set()
    for run in range(3):
        with (tmp_path / f"spool-{run}").open("w+b") as spool:
            store = ChunkStore(spool)
            numbers = cut(store, archive)
            spool.seek(0)
            seen.add((spool.read(), bytes(store.digests), str(numbers)))
    assert len(seen) == 1


def test_many_chunks_find_themselves_again(store: ChunkStore) -> None:
    digests = [blake3(b"%d" % n).digest() for n in range(50_000)]
    assert [store.intern(digest, 1) for digest in digests] == [(n, True) for n in range(50_000)]
    assert [store.intern(digest, 1) for digest in reversed(digests)] == [(n, False) for n in reversed(range(50_000))]


def test_an_error_in_a_thread_reaches_the_caller(store: ChunkStore) -> None:
    def fail(data: bytes, digest: bytes) -> Packed:
        raise SnapshotterError("no")

    with pytest.raises(SnapshotterError, match="no"):
        cut(store, member(b"f", b"x") + END, pack=fail)


def test_plain_chunks_are_compressed_only_where_it_helps(store: ChunkStore) -> None:
    noise = os.urandom(SIZE)
    cut(store, member(b"f", b"a" * SIZE + noise) + END, pack=PlainPacker(Codec.parse("lz4")))
    assert list(store.codecs) == [chunk.CODEC_LZ4, chunk.CODEC_NONE]
    assert store.read(1) == noise
    assert store.secrets == b""


@pytest.mark.parametrize(
    ("text", "expected"),
    [("zstd", Codec(3, 3)), ("zstd:1", Codec(3, 1)), ("zstd:19", Codec(3, 19)), ("lz4", Codec(1)), ("none", Codec(0))],
)
def test_codecs(text: str, expected: Codec) -> None:
    assert Codec.parse(text) == expected


@pytest.mark.parametrize("text", ["", "gzip", "zstd:0", "zstd:20", "zstd:x", "lz4:1", "none:", "zstd:²"])
def test_unknown_codecs_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="codec"):
        Codec.parse(text)


@pytest.mark.parametrize("size", [0, 2048, 4097, 3 << 12, 16 << 20])
def test_impossible_chunk_sizes_are_refused(size: int) -> None:
    with pytest.raises(InvalidArgument, match="chunk size"):
        chunker.check_chunk_size(size)
