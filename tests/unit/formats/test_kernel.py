"""What the writer writes, mounted by the kernel, is the tree that was given to it."""

import os
import stat
import struct
from pathlib import Path

import pytest

from snapshotter.formats.rafs6_write import Node
from tests import trees
from tests.harness.machine import Work
from tests.trees import Blob, directory, symlink

pytestmark = pytest.mark.root

NS = 1_700_000_000_123_456_789


@pytest.fixture
def disk(work: Work) -> Path:
    """A directory that may back an EROFS mount."""
    path = work.path / "erofs"
    path.mkdir()
    return path


def acl(*entries: tuple[int, int, int]) -> bytes:
    """POSIX ACL as stored in an attribute: tag, permissions, id."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ACCESS = acl(
    (0x01, 7, 0xFFFFFFFF), (0x02, 5, 1234), (0x04, 5, 0xFFFFFFFF), (0x10, 5, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)
)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service=ep


def everything(*blobs: Blob) -> Node:
    """A tree with every kind of thing an image may hold."""
    first, last = blobs[0], blobs[-1]
    size = first.chunk_size
    text = b"".join(b"line %d\n" % i for i in range(size // 2))
    twice = last.file(text, mtime_ns=NS, mode=stat.S_IFREG | 0o4755, uid=1000, gid=4_000_000_000)
    zeros = bytes(5 * size + 1)
    many = {b"%04d" % i + b"n" * (i % 200): first.file(b"%d" % i) for i in range(700)}
    deep = directory()
    for _ in range(40):
        deep = directory({b"d" * 90: deep})
    return directory(
        {
            b"empty": first.file(b""),
            b"one": first.file(b"x", mtime_ns=1),
            b"exact": last.file(os.urandom(size)),
            b"twice": twice,
            b"zeros": first.file(zeros),
            b"old": first.file(b"before 1970", mtime_ns=-1_500_000_001),
            b"\xff\xfe not utf-8": first.file(b"name"),
            b"-x": first.file(b"sorts before the dots"),
            b"n" * 255: first.file(b"longest name"),
            b"attributes": first.file(
                b"a",
                xattrs={
                    b"user.a": b"1",
                    b"user.empty": b"",
                    b"user." + b"n" * 250: b"v" * 3000,
                    b"trusted.t": bytes(range(256)),
                    b"security.capability": CAPABILITY,
                    b"system.posix_acl_access": ACCESS,
                },
                mode=stat.S_IFREG | 0o750,
            ),
            b"large attribute": first.file(b"b", xattrs={b"user.big": b"x" * 60_000}),
            b"char": Node(stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3)),
            b"block": Node(stat.S_IFBLK | 0o660, rdev=os.makedev(4000, 0xABCDE)),
            b"fifo": Node(stat.S_IFIFO | 0o600),
            b"socket": Node(stat.S_IFSOCK | 0o700),
            b"link": symlink(b"one"),
            b"long link": symlink(b"/" + b"t" * 4094),
            b"link with attributes": symlink(b"x" * 3900, xattrs={b"security.x": b"y" * 200}),
            b"many": directory(many, mode=stat.S_IFDIR | 0o1777),
            b"other": directory({b"again": twice, b"sub": directory({b"third": twice})}),
            b"acl": directory(xattrs={b"system.posix_acl_default": ACCESS, b"user.d": b"d"}),
            b"deep": deep,
        },
        mtime_ns=NS,
        xattrs={b"user.root": b"r"},
    )


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("chunk_size", [4096, 65536, 1 << 20])
def test_the_kernel_shows_the_tree(disk: Path, sealed: bool, chunk_size: int) -> None:
    blobs = [Blob(index, chunk_size, trees.ZSTD, sealed) for index in range(2)]
    root = everything(*blobs)
    bootstrap = trees.write(root, *blobs)
    chunk = trees.device_chunk(*blobs)
    expected = trees.nodes(root, chunk)
    assert trees.listing(trees.read(bootstrap, *blobs).walk(), chunk) == expected
    with trees.erofs_mount(disk, bootstrap, [bytes(blob.device) for blob in blobs]) as top:
        assert trees.mounted(top) == expected


def test_more_devices_than_fit_into_the_first_block(disk: Path) -> None:
    blobs = [Blob(index) for index in range(40)]
    root = directory({b"%d" % blob.index: blob.file(b"content %d" % blob.index) for blob in blobs})
    bootstrap = trees.write(root, *blobs)
    with trees.erofs_mount(disk, bootstrap, [bytes(blob.device) for blob in blobs]) as top:
        assert trees.mounted(top) == trees.nodes(root, trees.device_chunk(*blobs))


def test_a_file_over_several_blobs_and_one_that_is_mostly_zeros(disk: Path) -> None:
    blobs = [Blob(index, 65536) for index in range(3)]
    pieces = [bytes((65 + number,)) * 65536 for number in range(6)]
    mixed = Node(stat.S_IFREG | 0o644, size=6 * 65536 - 100)
    for number, piece in enumerate([*pieces[:-1], pieces[-1][:-100]]):
        mixed.chunks.append(blobs[number % 3].add(piece))
    zero = blobs[0].add(bytes(65536))
    sparse = Node(stat.S_IFREG | 0o644, size=64 << 30)
    sparse.chunks.extend([zero] * (sparse.size // 65536))
    root = directory({b"mixed": mixed, b"sparse": sparse})
    bootstrap = trees.write(root, *blobs)
    trees.read(bootstrap, *blobs)
    with trees.erofs_mount(disk, bootstrap, [bytes(blob.device) for blob in blobs]) as top:
        assert (top / "mixed").read_bytes() == b"".join(pieces)[:-100]
        assert (top / "sparse").stat().st_size == 64 << 30
        with (top / "sparse").open("rb") as file:
            file.seek(-5, os.SEEK_END)
            assert file.read() == bytes(5)


def test_a_huge_directory(disk: Path) -> None:
    blob = Blob()
    names = [b"%d" % number + b"-" * (number % 240) for number in range(20_000)]
    root = directory({b"huge": directory({name: blob.file(b"x") for name in names})})
    bootstrap = trees.write(root, blob)
    with trees.erofs_mount(disk, bootstrap, [bytes(blob.device)]) as top:
        huge = os.fsencode(top / "huge")
        assert sorted(os.listdir(huge)) == sorted(names)
        assert all(os.lstat(huge + b"/" + name).st_size == 1 for name in names[::97])
        assert not os.path.exists(huge + b"/absent")


def test_an_image_without_blobs(disk: Path) -> None:
    root = directory({b"d": directory(), b"link": symlink(b"d"), b"empty": Node(stat.S_IFREG | 0o600)})
    with trees.erofs_mount(disk, trees.write(root), []) as top:
        assert trees.mounted(top) == trees.nodes(root, None)
