"""The writer: what it refuses, what it promises, how much it needs."""

import stat
import struct
import time
import tracemalloc
from array import array
from dataclasses import replace

import pytest

from snapshotter.errors import InvalidArgument
from snapshotter.formats import rafs6
from snapshotter.formats.blobmeta import ChunkInfo, ChunkTable
from snapshotter.formats.blobtable import CIPHER_SEALED, SEALED_FEATURES, BlobEntry
from snapshotter.formats.rafs6 import Bootstrap
from snapshotter.formats.rafs6_write import BlobTable, Node, write_bootstrap
from snapshotter.formats.sealed import KeysFile
from tests import trees
from tests.trees import LIMITS, Blob, directory, symlink

FILE = stat.S_IFREG | 0o644


def regular(**fields: object) -> Node:
    return Node(FILE, **fields)  # type: ignore[arg-type]


REFUSED = {
    "no name": directory({b"": regular()}),
    "a dot": directory({b".": regular()}),
    "two dots": directory({b"..": directory()}),
    "a slash": directory({b"a/b": regular()}),
    "a NUL": directory({b"a\0b": regular()}),
    "a name that is too long": directory({b"n" * 256: regular()}),
    "no directory at the top": regular(),
    "a directory without children": Node(stat.S_IFDIR | 0o755),
    "a file with children": directory({b"f": regular(children={})}),
    "no type": directory({b"f": Node(0o644)}),
    "an impossible mode": directory({b"f": Node(FILE | 1 << 20)}),
    "a negative size": directory({b"f": regular(size=-1)}),
    "a size without chunks": directory({b"f": regular(size=1)}),
    "chunks without size": directory({b"f": regular(chunks=array("Q", [0]))}),
    "a chunk that does not exist": directory({b"f": regular(size=1, chunks=array("Q", [7]))}),
    "a blob that does not exist": directory({b"f": regular(size=1, chunks=array("Q", [1 << 32]))}),
    "an empty symlink": directory({b"l": symlink(b"")}),
    "a NUL in a symlink": directory({b"l": symlink(b"a\0b")}),
    "an owner that is too large": directory({b"f": regular(uid=1 << 32)}),
    "a device that is too large": directory({b"f": Node(stat.S_IFCHR, rdev=1 << 32)}),
    "a time that is too large": directory({b"f": regular(mtime_ns=1 << 100)}),
    "an attribute of no namespace": directory({b"f": regular(xattrs={b"a": b""})}),
    "an attribute without name": directory({b"f": regular(xattrs={b"user.": b""})}),
    "an attribute name that is too long": directory({b"f": regular(xattrs={b"user." + b"n" * 256: b""})}),
    "an attribute value that is too long": directory({b"f": regular(xattrs={b"user.a": bytes(65536)})}),
    "more attributes than fit": directory({b"f": regular(xattrs={b"user.%d" % i: bytes(60000) for i in range(5)})}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_cannot_hold_is_refused(name: str) -> None:
    blob = Blob()
    blob.add(b"x")
    with pytest.raises(InvalidArgument):
        trees.write(REFUSED[name], blob)


def test_a_directory_has_one_name() -> None:
    inner = directory()
    with pytest.raises(InvalidArgument, match="two names"):
        trees.write(directory({b"a": inner, b"b": inner}))


def test_blobs_must_fit_their_tables() -> None:
    blob = Blob()
    blob.add(b"x")
    table = blob.finish()[0]
    bad = [
        [replace(table, digests=b"")],
        [replace(table, chunks=ChunkTable(), digests=b"")],
        [replace(table, entry=replace(table.entry, blob_index=1))],
        [replace(table, entry=replace(table.entry, blob_index=index)) for index in range(255)],
    ]
    for blobs in bad:
        with pytest.raises(InvalidArgument):
            write_bootstrap(directory(), blobs, chunk_size=4096, flags=0)


def test_a_file_to_prefetch_must_be_in_the_tree() -> None:
    with pytest.raises(InvalidArgument):
        trees.write(directory(), prefetch=[regular()])


def test_files_to_prefetch_keep_their_order() -> None:
    blob = Blob()
    files = [blob.file(b"%d" % number) for number in range(5)]
    root = directory({b"%d" % number: file for number, file in enumerate(files)})
    found = trees.read(trees.write(root, blob, prefetch=[files[3], files[0]]), blob)
    nids = {entry.path: entry.nid for entry in found.walk()}
    assert found.prefetch == (nids[b"/3"], nids[b"/0"])


@pytest.mark.parametrize("count", [0, 1, 21, 22, 254])
def test_fixed_structures(count: int) -> None:
    """Where things lie, which stock readers insist on."""
    blobs = [Blob(index) for index in range(count)]
    root = directory({b"%d" % blob.index: blob.file(b"x%d" % blob.index) for blob in blobs})
    raw = trees.write(root, *blobs)
    found = trees.read(raw, *blobs)
    assert (found.root_nid, len(raw) % 4096) == (128, 0)
    position = len(raw)
    for index, blob in enumerate(blobs):
        tag, blocks, unified = struct.unpack_from("<64sII", raw, 1408 + 128 * index)
        assert (tag.decode(), blocks) == (found.blobs[index].blob_id, len(blob.device) // 4096)
        position = -(-position // 0x80000) * 0x80000
        assert unified * 4096 == position
        position += len(blob.device)
    digests = [record.digest for record in found.chunk_records()]
    assert digests == sorted(digests)


def test_flags_say_whether_there_are_attributes() -> None:
    plain, with_attributes = directory(), directory(xattrs={b"user.a": b"b"})
    assert not Bootstrap.parse(trees.write(plain), LIMITS).flags & rafs6.FLAG_HAS_XATTR
    assert Bootstrap.parse(trees.write(with_attributes), LIMITS).flags & rafs6.FLAG_HAS_XATTR


def test_keys_are_32_bytes() -> None:
    for record in ((bytes(31), bytes(32)), (bytes(32), bytes(33))):
        with pytest.raises(InvalidArgument):
            KeysFile.pack("ab" * 32, [record])


def test_the_order_of_children_and_attributes_does_not_matter() -> None:
    names = [b"b", b"a", b"-", b"c"]
    attributes = [(b"user.b", b"1"), (b"user.a", b"2"), (b"security.x", b"3")]
    one = directory({name: regular(xattrs=dict(attributes)) for name in names})
    other = directory({name: regular(xattrs=dict(attributes[::-1])) for name in names[::-1]})
    assert trees.write(one) == trees.write(other)


def test_a_file_of_8_tib_and_a_crowd_are_quick() -> None:
    size = 8 << 20
    table = ChunkTable()
    for index in range(3):
        table.append(ChunkInfo(index * size, size, index * 100, 100, 9))
    entry = BlobEntry("ab" * 32, 0, size, 3, 3, 0, SEALED_FEATURES, 300, 3 * size, 0, 0, 0, 72, 72)
    blob = BlobTable(replace(entry, cipher_algo=CIPHER_SEALED), table, bytes(96))
    root = directory(
        {
            b"large": regular(size=8 << 40, chunks=array("Q", [1]) * (8 << 40 >> 23)),
            b"crowd": directory({b"%d" % number: regular() for number in range(20_000)}),
        }
    )
    began = time.process_time()
    raw = write_bootstrap(root, [blob], chunk_size=size, flags=trees.flags_of(Blob(sealed=True)))
    found = Bootstrap.parse(raw, LIMITS)
    found.validate([table])
    assert sum(1 for _ in found.walk()) == 20_003
    assert time.process_time() - began < 20
    assert len(raw) < 16 << 20


def test_reading_needs_little_memory() -> None:
    blob = Blob()
    root = directory({b"%d" % number: blob.file(b"%d" % number) for number in range(5000)})
    raw = trees.write(root, blob)
    tracemalloc.start()
    for _ in trees.read(raw, blob).walk():
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(raw)
