"""Damaged and made-up layers: a typed error or a tree, never a traceback, never much memory."""

import contextlib
import gzip
import subprocess
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.build.stream import ByteStream, decompressed
from snapshotter.build.tar import TarReader
from snapshotter.build.tree import Budget, LayerTree, new_directory
from snapshotter.config import Limits
from snapshotter.errors import BadLayer, LimitExceeded
from tests.unit.build.tars import BLOCK, END, header, member, pax, pieces

LIMITS = Limits(tar_entry_header_bytes=20_000, inodes=200, bootstrap_unpacked_bytes=1 << 20)


def read(data: bytes) -> int:
    """Entries of the layer, all content read."""
    tree = LayerTree(new_directory(0), LIMITS, Budget(LIMITS))
    stream = ByteStream(decompressed(pieces(data, 3000)))
    for entry in TarReader(stream, LIMITS):
        if tree.add(entry) is not None and entry.size < 1 << 20:
            for _ in entry.pieces(4096):
                pass
    stream.finish()
    return tree.entries


def sample() -> bytes:
    sparse = pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"9000"})
    return b"".join(
        [
            pax({b"path": b"dir/file", b"mtime": b"1.5", b"SCHILY.xattr.user.a": b"\0\xff"}),
            member(b"f", b"data" * 200),
            header(b"L", b"L", size=5) + b"long\0".ljust(BLOCK, b"\0") + member(b"x", magic=b"ustar  \0"),
            sparse + member(b"s", b"1\n4096\n3\n".ljust(BLOCK, b"\0") + b"abc"),
            header(b"link", b"1", target=b"dir/file") + header(b"dir/.wh.x", b"0") + header(b"n", b"3", device=(1, 3)),
            header(b"big", size=b"\x80" + bytes(10) + b"\x05") + b"12345".ljust(BLOCK, b"\0"),
            END,
        ]
    )  # fmt: skip


SAMPLE = sample()


def test_the_sample_itself_is_right() -> None:
    assert read(SAMPLE) == 7


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(SAMPLE)),
    st.booleans(),
)
def test_damaged_archives(changes: list[tuple[int, int]], cut: int, whole: bool) -> None:
    data = bytearray(SAMPLE)
    for at, value in changes:
        data[at] = value
    for at in {at - at % BLOCK for at, _ in changes}:  # past the checksum, where a block looks like a header
        block = data[at : at + BLOCK]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    with contextlib.suppress(BadLayer, LimitExceeded):
        read(bytes(data) if whole else bytes(data[:cut]))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["gzip", "zstd"]), st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 10_000))
def test_damaged_compression(kind: str, at: int, value: int, cut: int) -> None:
    data = bytearray(gzip.compress(SAMPLE) if kind == "gzip" else zstandard.compress(SAMPLE))
    data[at % len(data)] = value
    with contextlib.suppress(BadLayer, LimitExceeded):
        read(bytes(data)[: max(1, cut)])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000))
def test_any_bytes_as_extension_records(body: bytes) -> None:
    data = header(b"x", b"x", size=len(body)) + body + bytes(-len(body) % BLOCK) + member(b"f") + END
    with contextlib.suppress(BadLayer, LimitExceeded):
        read(data)


def test_a_record_without_a_length_ends_the_header() -> None:
    """It once made the reader stand still."""
    body = b"12 path=abc\n" + b"x" * 40
    data = header(b"x", b"x", size=len(body)) + body + bytes(-len(body) % BLOCK) + member(b"f") + END
    with pytest.raises(BadLayer, match="PAX"):
        read(data)


def test_no_header_makes_the_reader_allocate_what_it_asks_for() -> None:
    asking = [
        header(b"x", kind, size=b"\x80" + bytes(3) + b"\x7f" + bytes(7))
        for kind in (b"x", b"L", b"K", b"S", b"0", b"g")
    ]
    tracemalloc.start()
    try:
        for data in asking:
            with pytest.raises((BadLayer, LimitExceeded)):
                read(data + bytes(5000))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 400_000), st.binary(min_size=1, max_size=50)), max_size=30),
    st.sampled_from(["gnu", "0.0", "0.1", "1.0"]),
)
def test_sparse_files_of_gnu_tar(
    tmp_path_factory: pytest.TempPathFactory, extents: list[tuple[int, bytes]], version: str
) -> None:
    directory: Path = tmp_path_factory.mktemp("sparse")
    path = directory / "file"
    with path.open("wb") as file:
        for offset, data in extents:
            file.seek(offset)
            file.write(data)
        file.truncate(500_000)
    options = ["--format=gnu"] if version == "gnu" else ["--format=pax", f"--sparse-version={version}"]
    tar = subprocess.run(
        ["tar", "-C", directory, "--sparse", *options, "-cf", "-", "file"], check=True, capture_output=True
    ).stdout
    [content] = [
        b"".join(bytes(piece) for piece in entry.pieces(1000)) for entry in TarReader(ByteStream(pieces(tar)), Limits())
    ]
    assert content == path.read_bytes()
