"""Bootstraps, chunk tables, keys files and identities that lie: refused with a typed error, or harmless."""

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import msgspec
import pytest

from snapshotter.config import Limits
from snapshotter.errors import LimitExceeded, MalformedImage, SnapshotterError
from snapshotter.formats import blobmeta, erofs, rafs6, sealed, toc
from snapshotter.formats.blobmeta import ChunkInfo, ChunkTable
from snapshotter.formats.blobtable import BlobEntry
from snapshotter.formats.rafs6 import Bootstrap
from snapshotter.formats.rafs6_tree import dirents, read_inode
from snapshotter.formats.rafs6_write import Node
from tests import trees
from tests.trees import LIMITS, Blob, directory, symlink

NAME = "ab" * 32


def image(is_sealed: bool = True) -> tuple[bytes, Blob, Node]:
    """A small image: two levels, several chunks, attributes, a hard link."""
    blob = Blob(sealed=is_sealed)
    file = blob.file(b"".join(b"%04d" % i * 1024 for i in range(4)) + b"end", xattrs={b"user.name": b"value"})
    inner = directory({b"again": file, b"two": blob.file(b"2")})
    root = directory({b"file": file, b"link": symlink(b"file"), b"dir": inner, b"null": Node(0o020666, rdev=0x103)})
    return trees.write(root, blob), blob, root


RAW, BLOB, _ = image()
ENTRY = BLOB.finish()[0].entry
META = blobmeta.pack_file(BLOB.chunks, ENTRY)


def check(raw: bytes, blob: Blob = BLOB, limits: Limits = LIMITS) -> Bootstrap:
    """Everything a node does with a bootstrap before the kernel sees it."""
    found = trees.read(raw, blob, limits=limits)
    for index, entry in enumerate(found.blobs):
        found.digests(index, entry.chunk_count)
    assert found.prefetch == ()
    for one in found.walk():
        assert all(0 <= index < len(blob.chunks) for _, index in one.chunks)
    return found


# every byte


def flipped(raw: bytes, at: int, mask: int) -> bytes:
    return raw[:at] + bytes((raw[at] ^ mask,)) + raw[at + 1 :]


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_no_byte_of_a_bootstrap_breaks_the_reader(mask: int) -> None:
    for at in range(1024, len(RAW)):
        if any(RAW[at - 8 : at + 8]):  # padding is the same everywhere
            with suppress(MalformedImage, LimitExceeded):
                check(flipped(RAW, at, mask))


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_byte_of_the_fixed_structures_counts(mask: int) -> None:
    """Superblocks, device slots, blob table and chunk table of a sealed image; informative fields excepted."""
    slot = rafs6.DEVICES_OFFSET
    table = struct.unpack_from("<Q", RAW, rafs6.EXTENDED_OFFSET + 24)[0]
    informative = {*range(1024 + 16, 1024 + 24), *range(1024 + 36, 1024 + 40)}  # counts of inodes and blocks
    informative |= set(range(slot + 68, slot + 72))  # address in the flattened image
    informative |= {1152, *range(4096 + 76, 4096 + 80)}  # codec, which the tag of each chunk covers; has attributes
    for record in range(len(BLOB.chunks)):  # offset in a file: a chunk may stand in several
        informative |= set(range(table + 80 * record + 64, table + 80 * record + 72))
    places = [*range(1024, slot + 128), *range(4096, 4096 + 256), *range(table, table + 80 * len(BLOB.chunks))]
    accepted = []
    digests = Bootstrap.parse(RAW, LIMITS).digests(0, len(BLOB.chunks))
    for at in set(places) - informative:
        try:
            found = check(flipped(RAW, at, mask))
            blobmeta.parse_file(META, found.blobs[0], LIMITS)
        except SnapshotterError:
            continue
        # A changed digest is seen when it is compared with the keys file, a changed blob id with the manifest.
        if found.digests(0, len(BLOB.chunks)) == digests and found.blobs[0].blob_id == ENTRY.blob_id:
            accepted.append(at)
    assert accepted == []


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_byte_of_sealed_chunk_information_counts(mask: int) -> None:
    for at in range(len(META)):
        with pytest.raises((MalformedImage, LimitExceeded)):
            blobmeta.parse_file(flipped(META, at, mask), ENTRY, LIMITS)


def test_every_byte_of_a_keys_header_counts() -> None:
    keys = sealed.KeysFile.pack(NAME, [(bytes(32), b"\1" * 32)])
    assert sealed.KeysFile.parse(keys, NAME, 1, LIMITS) == (bytes(32), b"\1" * 32)
    for at in range(64):
        with pytest.raises(MalformedImage):
            sealed.KeysFile.parse(flipped(keys, at, 0x40), NAME, 1, LIMITS)


# every length


def test_a_bootstrap_cut_anywhere_is_refused() -> None:
    for size in [*range(0, len(RAW), 97), *range(0, len(RAW), 4096), len(RAW) - 1]:
        with pytest.raises(MalformedImage):
            check(RAW[:size])


def test_chunk_information_of_any_other_length_is_refused() -> None:
    for size in (*range(0, len(META), 89), len(META) - 1):
        with pytest.raises(MalformedImage):
            blobmeta.parse_file(META[:size], ENTRY, LIMITS)
    with pytest.raises(MalformedImage):
        blobmeta.parse_file(META + b"\0", ENTRY, LIMITS)


def test_a_keys_file_of_any_other_length_is_refused() -> None:
    keys = sealed.KeysFile.pack(NAME, [(bytes(32), bytes(32))] * 3)
    for raw, count in ((keys[:-1], 3), (keys + b"\0", 3), (keys, 2), (keys, 4), (b"", 0), (keys[:64], 0)):
        with pytest.raises(MalformedImage):
            sealed.KeysFile.parse(raw, NAME, count, LIMITS)
    with pytest.raises(LimitExceeded):
        sealed.KeysFile.parse(keys, NAME, 3, Limits(chunks=2))


# the tree


class Patch:
    """A bootstrap whose bytes can be set by inode."""

    def __init__(self, raw: bytes = RAW) -> None:
        self.raw = bytearray(raw)
        found = Bootstrap.parse(raw, LIMITS)
        self.meta = found.meta_blkaddr * 4096
        self.nids = {entry.path: entry.nid for entry in found.walk()}
        self.inodes = {path: read_inode(found, nid) for path, nid in self.nids.items()}

    def at(self, path: bytes) -> int:
        return self.inodes[path].at

    def index(self, path: bytes) -> int:
        return erofs.align(self.at(path) + self.inodes[path].head, 8)

    def put(self, form: str, at: int, *values: int) -> None:
        struct.pack_into("<" + form, self.raw, at, *values)

    def dirent(self, path: bytes, name: bytes) -> int:
        """Where the entry of a name lies in a directory that is inline."""
        start = self.at(path) + self.inodes[path].head
        raw = bytes(self.raw[start : start + self.inodes[path].size])
        for index, (found, _, _) in enumerate(dirents(raw, 0)):
            if found == name:
                return start + 12 * index
        raise AssertionError(name)

    def rename(self, path: bytes, old: bytes, new: bytes) -> None:
        start = self.at(path) + self.inodes[path].head
        offset = struct.unpack_from("<H", self.raw, self.dirent(path, old) + 8)[0]
        self.raw[start + offset : start + offset + len(new)] = new


def retarget(path: bytes, name: bytes, to: bytes) -> Callable[[Patch], None]:
    return lambda patch: patch.put("Q", patch.dirent(path, name), patch.nids[to])


def size_of(path: bytes, size: int) -> Callable[[Patch], None]:
    return lambda patch: patch.put("Q", patch.at(path) + 8, size)


def first_index(value: int, position: int = 0) -> Callable[[Patch], None]:
    return lambda patch: patch.put("Q", patch.index(b"/file") + 8 * position, value)


def form(path: bytes, value: int) -> Callable[[Patch], None]:
    return lambda patch: patch.put("H", patch.at(path), value)


def unit(value: int) -> Callable[[Patch], None]:
    return lambda patch: patch.put("I", patch.at(b"/file") + 16, value)


def xattr(offset: int, value: int) -> Callable[[Patch], None]:
    return lambda patch: patch.put("B", patch.at(b"/file") + 64 + offset, value)


def no_parent(patch: Patch) -> None:
    entry = patch.dirent(b"/dir", b"..")
    patch.put("Q", entry, patch.nids[b"/dir/two"])
    patch.put("B", entry + 10, erofs.TYPE_FILE)
    patch.rename(b"/dir", b"..", b".a")


ATTACKS: dict[str, tuple[Callable[[Patch], None], str]] = {
    "a directory that holds itself": (retarget(b"/", b"dir", b"/"), "two names"),
    "a directory that holds its parent": (
        lambda p: (p.put("Q", p.dirent(b"/dir", b"two"), p.nids[b"/"]), p.put("B", p.dirent(b"/dir", b"two") + 10, 2)),
        "two names",
    ),
    ". that leads elsewhere": (retarget(b"/dir", b".", b"/"), "leads elsewhere"),
    ".. that leads elsewhere": (retarget(b"/dir", b"..", b"/dir"), "leads elsewhere"),
    "a slash in a name": (lambda p: p.rename(b"/", b"file", b"fi/e"), "holds / or NUL"),
    "a NUL in a name": (lambda p: p.rename(b"/", b"file", b"fi\0e"), "holds / or NUL"),
    "names out of order": (lambda p: p.rename(b"/", b"file", b"aaaa"), "do not ascend"),
    "a name twice": (lambda p: p.rename(b"/", b"link", b"file"), "do not ascend"),
    "no .. at all": (lambda p: p.rename(b"/dir", b"..", b".a"), "two names"),
    "a file instead of ..": (no_parent, "missing"),
    "an entry of another type": (lambda p: p.put("B", p.dirent(b"/", b"file") + 10, 7), "says type 7"),
    "an entry of no type": (lambda p: p.put("B", p.dirent(b"/", b"file") + 10, 0), "says type 0"),
    "an inode outside": (lambda p: p.put("Q", p.dirent(b"/", b"file"), 1 << 40), "lies outside"),
    "an inode far outside": (lambda p: p.put("Q", p.dirent(b"/", b"file"), (1 << 64) - 1), "lies outside"),
    "names that go back": (lambda p: p.put("H", p.dirent(b"/", b"file") + 8, 0), "empty or too long"),
    "a name offset of zero": (lambda p: p.put("H", p.dirent(b"/", b".") + 8, 0), "offset of names"),
    "a name offset of 13": (lambda p: p.put("H", p.dirent(b"/", b".") + 8, 13), "offset of names"),
    "a name offset far away": (lambda p: p.put("H", p.dirent(b"/", b".") + 8, 0xFFF0), "offset of names"),
    "a directory of 2^62 bytes": (size_of(b"/dir", 1 << 62), "overlap"),
    "a directory whose inline part crosses a block": (size_of(b"/dir", 4000), "crosses a block"),
    "a file of 2^63 bytes": (size_of(b"/file", 1 << 63), "bad size"),
    "a file of 2^62 bytes": (size_of(b"/file", 1 << 62), "lies outside"),
    "a file larger than its chunks": (size_of(b"/file", 4 * 4096 + 5), "another size"),
    "a file smaller than its chunks": (size_of(b"/file", 4 * 4096 + 2), "another size"),
    "a chunk in the middle that is short": (first_index(1 << 16 | 4 | 4 << 32), "another size"),
    "a file without link": (lambda p: p.put("I", p.at(b"/file") + 44, 0), "link count"),
    "a time of two seconds of nanoseconds": (lambda p: p.put("I", p.at(b"/file") + 40, 2_000_000_000), "nanoseconds"),
    "a compressed layout": (form(b"/file", 1 | 1 << 1), "unknown format"),
    "a layout of another era": (form(b"/file", 1 | 4 << 1 | 1 << 4), "unknown format"),
    "a regular file with inline data": (form(b"/file", 1 | 2 << 1), "without chunks"),
    "a directory with chunks": (form(b"/dir", 1 | 4 << 1), "no regular file"),
    "a device with content": (size_of(b"/null", 5), "with content"),
    "an empty symlink": (size_of(b"/link", 0), "bad target"),
    "a symlink that is too long": (size_of(b"/link", 4096), "more than"),
    "a NUL in a symlink": (lambda p: p.put("B", p.at(b"/link") + 65, 0), "bad target"),
    "a chunk that does not exist": (first_index(1 << 16 | 99), "does not exist"),
    "a blob that does not exist": (first_index(2 << 16), "does not exist"),
    "the bootstrap as a blob": (first_index(0), "does not exist"),
    "a hole": (first_index(1 << 16 | 0xFFFFFFFF << 32), "where the index says"),
    "another block than the chunk's": (first_index(1 << 16 | 1 << 32), "where the index says"),
    "another chunk than the block's": (first_index(1 << 16 | 1), "where the index says"),
    "a unit the index does not have": (unit(0x20 | 1), "does not fit"),
    "4-byte index": (unit(0), "bad chunk format"),
    "48-bit index": (unit(0x60), "bad chunk format"),
    "a shared attribute": (xattr(4, 1), "shared"),
    "an attribute of no namespace": (xattr(13, 9), "bad extended"),
    "an attribute that is too long": (xattr(15, 200), "bad extended"),
    "an ACL with a name": (xattr(13, 2), "bad extended"),
    "more attributes than there are": (lambda p: p.put("H", p.at(b"/file") + 2, 0xFFFF), "outside|bad extended"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_crafted_tree_is_refused(name: str) -> None:
    change, message = ATTACKS[name]
    patch = Patch()
    change(patch)
    with pytest.raises((MalformedImage, LimitExceeded), match=message):
        check(bytes(patch.raw))


def test_the_larger_unit_that_stock_tools_write_is_read() -> None:
    """A file whose chunks follow each other may be addressed by its first entry alone."""
    patch = Patch()
    unit(0x20 | 3)(patch)  # 32 KiB for 5 chunks of 4 KiB
    check(bytes(patch.raw))
    unit(0x20 | 2)(patch)  # 16 KiB: the kernel would take the second entry for the fifth chunk
    with pytest.raises(MalformedImage, match="does not fit"):
        check(bytes(patch.raw))


def test_a_unit_over_scattered_chunks_is_refused() -> None:
    blob = Blob(sealed=True)
    blob.file(b"a" * 4096 + b"c" * 4096)
    scattered = blob.file(b"c" * 4096 + b"a" * 4096)
    patch = Patch(trees.write(directory({b"file": scattered}), blob))
    unit(0x20 | 1)(patch)
    with pytest.raises(MalformedImage, match="in a row"):
        check(bytes(patch.raw), blob)


def test_parts_that_overlap_are_refused_quickly() -> None:
    """Many inodes that all claim the same large index would cost the product of both."""
    blob = Blob(sealed=True)
    big = blob.file(bytes(4096 * 20_000))
    root = directory({b"big": big, **{b"%d" % i: blob.file(b"x") for i in range(2000)}})
    patch = Patch(trees.write(root, blob))
    for number in range(2000):
        size_of(b"/%d" % number, 4096 * 20_000)(patch)
        # The index of each begins in that of the others' neighbour and runs over the big one.
    began = time.monotonic()
    with pytest.raises(MalformedImage):
        check(bytes(patch.raw), blob)
    assert time.monotonic() - began < 5


def test_directories_that_share_their_content_are_refused() -> None:
    names = {b"%050d" % i: Node(0o100644) for i in range(600)}
    root = directory({b"a": directory(names), b"b": directory({name: Node(0o100644) for name in names})})
    patch = Patch(trees.write(root))
    block = struct.unpack_from("<I", patch.raw, patch.at(b"/a") + 16)[0]
    patch.put("I", patch.at(b"/b") + 16, block)
    with pytest.raises(MalformedImage, match=r"two names|leads elsewhere"):
        trees.read(bytes(patch.raw))


def test_deep_trees_are_read_and_deeper_ones_refused() -> None:
    def chain(depth: int) -> bytes:
        node = directory()
        for _ in range(depth):
            node = directory({b"d": node})
        return trees.write(node)

    assert sum(1 for _ in trees.read(chain(1024)).walk()) == 1025
    with pytest.raises(LimitExceeded, match="directory_depth"):
        trees.read(chain(1025))
    with pytest.raises(LimitExceeded, match="directory_depth"):
        list(Bootstrap.parse(chain(1026), LIMITS).walk())


@pytest.mark.parametrize(
    "limits",
    [
        Limits(inodes=5),
        Limits(directory_bytes=50),
        Limits(xattr_bytes=20),
        Limits(symlink_bytes=3),
        Limits(chunks=3),
        Limits(chunk_bytes=2048),
        Limits(blob_bytes=100),
        Limits(bootstrap_unpacked_bytes=8192),
    ],
    ids=str,
)
def test_limits_are_kept(limits: Limits) -> None:
    with pytest.raises(LimitExceeded):
        check(RAW, limits=limits)


# tables


def test_a_chunk_table_that_contradicts_itself_is_refused() -> None:
    at, size = struct.unpack_from("<QQ", RAW, rafs6.EXTENDED_OFFSET + 24)
    second = RAW[at + 80 : at + 160]
    cases = {
        "comes twice": RAW[:at] + second + RAW[at + 80 :],
        "unknown chunk": RAW[: at + 72] + struct.pack("<I", 77) + RAW[at + 76 :],
    }
    for raw in cases.values():
        with pytest.raises(MalformedImage, match="chunk table"):
            Bootstrap.parse(raw, LIMITS).digests(0, len(BLOB.chunks))
    fewer = bytearray(RAW)
    struct.pack_into("<Q", fewer, rafs6.EXTENDED_OFFSET + 32, size - 80)
    with pytest.raises(MalformedImage, match="has no record"):
        Bootstrap.parse(bytes(fewer), LIMITS).digests(0, len(BLOB.chunks))


def test_a_plain_image_may_leave_out_unused_chunks_which_then_never_verify() -> None:
    raw, blob, _ = image(is_sealed=False)
    fewer = bytearray(raw)
    at, size = struct.unpack_from("<QQ", raw, rafs6.EXTENDED_OFFSET + 24)
    missing = struct.unpack_from("<I", raw, at + size - 80 + 72)[0]
    struct.pack_into("<Q", fewer, rafs6.EXTENDED_OFFSET + 32, size - 80)
    digests = Bootstrap.parse(bytes(fewer), LIMITS).digests(0, len(blob.chunks))
    assert digests[32 * missing : 32 * missing + 32] == bytes(32)


def chunk(device: int, size: int, stored: int, at: int = 0, flags: int = 1) -> ChunkInfo:
    return ChunkInfo(device, size, at, stored, flags)


PLAIN_TABLES = {
    "overlap": [chunk(0, 8192, 9), chunk(4096, 5, 5)],
    "twice the same": [chunk(0, 5, 5), chunk(0, 5, 5)],
    "descending": [chunk(4096, 5, 5), chunk(0, 5, 5)],
    "outside of the device": [chunk(1 << 20, 5, 5)],
    "outside of the blob": [chunk(0, 4096, 4096, at=99_999)],
    "larger than chunk_size": [chunk(0, 8192 + 1, 9)],
    "grown by compression": [chunk(0, 100, 200)],
    "zran": [chunk(0, 100, 50, flags=3)],
    "batch": [chunk(0, 100, 50, flags=4)],
    "encrypted": [chunk(0, 100, 50, flags=9)],
    "raw of another size": [chunk(0, 100, 50, flags=0)],
}


@pytest.mark.parametrize("name", PLAIN_TABLES)
def test_a_plain_chunk_table_that_lies_is_refused(name: str) -> None:
    table = ChunkTable()
    for info in PLAIN_TABLES[name]:
        table.append(info)
    size = 24 * len(table)
    entry = BlobEntry(NAME, 0, 8192, len(table), 3, 0, 0x4000_0005, 50_000, 65_536, 0, 0, 40_000, size, size)
    with pytest.raises(MalformedImage):
        blobmeta.parse_file(blobmeta.pack_file(table, entry), entry, LIMITS)
    payload, header = table.encode_v2(), blobmeta.header_of(entry).pack()
    with pytest.raises(MalformedImage):
        blobmeta.decode_ci(payload, header, entry, LIMITS)


@pytest.mark.parametrize("codec", [1, 3])
def test_chunk_information_is_decompressed_within_bounds(codec: int) -> None:
    """A payload that unpacks to more than the chunk count needs is refused before memory is spent on it."""
    count = 1000
    table = ChunkTable()
    for index in range(count):
        table.append(chunk(4096 * index, 4096, 100, at=100 * index))
    raw = table.encode_v1()
    packed = trees.compress(raw, codec)

    def entry(size: int) -> BlobEntry:
        return BlobEntry(
            NAME, 0, 4096, count, 3, 0, 0x4000_0001, 0, 4096 * count, 0, codec, 100 * count, size, len(raw)
        )

    def decode(payload: bytes) -> ChunkTable:
        given = entry(len(payload))
        return blobmeta.decode_ci(payload, blobmeta.header_of(given).pack(), given, LIMITS)

    assert list(decode(packed)) == list(table)
    bombs = [trees.compress(bytes(64 << 20), codec), packed[:-1], packed + b"\0", b"\xff" * 50]
    tracemalloc.start()
    for bomb in bombs:
        with pytest.raises(MalformedImage):
            decode(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_range_read_of_chunk_information_stays_inside_the_blob() -> None:
    blob = Blob()
    blob.file(b"abc")
    table, stored = blob.finish()
    blobmeta.check_location(table.entry, len(stored), LIMITS)
    for changes in ({"ci_offset": 1 << 60}, {"ci_compressed_size": 1 << 50}, {"ci_offset": 4}):
        with pytest.raises(MalformedImage):
            blobmeta.check_location(replace(table.entry, **changes), len(stored), LIMITS)
    with pytest.raises(MalformedImage):
        blobmeta.check_location(table.entry, len(stored) - 1, LIMITS)


SEALED_TABLES: dict[str, Callable[[list[ChunkInfo]], None]] = {
    "a gap in the blob": lambda c: c.__setitem__(1, c[1]._replace(compressed_offset=c[1].compressed_offset + 1)),
    "a gap in the device": lambda c: c.__setitem__(1, c[1]._replace(uncompressed_offset=1 << 20)),
    "not encrypted": lambda c: c.__setitem__(0, c[0]._replace(flags=0)),
    "a checksum": lambda c: c.__setitem__(0, c[0]._replace(flags=24)),
    "a data word": lambda c: c.__setitem__(0, c[0]._replace(data=1)),
    "no room for a tag": lambda c: c.__setitem__(0, c[0]._replace(compressed_size=28)),
    "raw of another size": lambda c: c.__setitem__(0, c[0]._replace(compressed_size=c[0].compressed_size - 1)),
    "two chunks exchanged": lambda c: c.reverse(),
}


@pytest.mark.parametrize("name", SEALED_TABLES)
def test_a_sealed_chunk_table_that_lies_is_refused(name: str) -> None:
    chunks = list(BLOB.chunks)
    SEALED_TABLES[name](chunks)
    table = ChunkTable()
    for info in chunks:
        table.append(info)
    with pytest.raises(MalformedImage):
        blobmeta.parse_file(blobmeta.pack_file(table, ENTRY), ENTRY, LIMITS)


@pytest.mark.parametrize(
    "changes",
    [
        {"cipher_algo": 1},
        {"cipher_algo": 0},
        {"features": 0x101},
        {"features": 0x1_05 | 8},
        {"meta_digest": b"k" * 32},
        {"cipher_iv": 1},
        {"ci_offset": 5},
        {"toc_size": 5},
        {"chunk_count": 0},
        {"chunk_count": 1 << 31},
        {"uncompressed_size": 0},
        {"uncompressed_size": 5},
        {"uncompressed_size": 1 << 44},
        {"compression_algo": 2},
        {"digest_algo": 1},
        {"blob_id": "AB" * 32},
        {"blob_id": "x" * 64},
        {"blob_id": "../" + "a" * 61},
        {"blob_id": "ab"},
    ],
    ids=str,
)
def test_a_sealed_blob_entry_that_lies_is_refused(changes: dict[str, object]) -> None:
    assert BlobEntry.parse(ENTRY.pack()) == ENTRY
    raw = replace(ENTRY, **changes).pack()  # type: ignore[arg-type]
    with pytest.raises(MalformedImage):
        BlobEntry.parse(raw)


# identity


IDENTITY = sealed.Identity(
    version=1,
    blobs=(sealed.IdentityBlob(digest=f"sha256:{NAME}", size=5),),
    source=f"sha256:{NAME}",
    config_sha256=NAME,
    domain="image",
    epoch="",
    created="2026-01-02T03:04:05Z",
    repository="host/repo",
)


def test_an_identity_is_read_back() -> None:
    raw = IDENTITY.pack()
    assert sealed.Identity.parse(raw, LIMITS) == IDENTITY
    assert json.loads(raw)["blobs"] == [{"digest": f"sha256:{NAME}", "size": 5}]


BAD_IDENTITIES = {
    "nothing": b"",
    "empty": b"{}",
    "deep": b"[" * 100_000,
    "newline": IDENTITY.pack() + b"\n",
    "version": IDENTITY.pack().replace(b'"version":1', b'"version":2'),
    "fraction": IDENTITY.pack().replace(b'"version":1', b'"version":1.0'),
    "unknown member": IDENTITY.pack().replace(b'"version":1', b'"version":1,"extra":0'),
    "member twice": IDENTITY.pack().replace(b'"version":1', b'"version":1,"version":1'),
    "negative size": IDENTITY.pack().replace(b'"size":5', b'"size":-5'),
    "huge size": IDENTITY.pack().replace(b'"size":5', b'"size":99999999999999999999999'),
    "domain": IDENTITY.pack().replace(b"image", b"world"),
    "time": IDENTITY.pack().replace(b"2026-01-02", b"yesterday!"),
    "upper case": IDENTITY.pack().replace(b"sha256:ab", b"sha256:AB"),
    "not UTF-8": IDENTITY.pack().replace(b"host", b"\xff\xfe\xfd\xfc"),
    "another spelling": IDENTITY.pack().replace(b"host", b"\\u0068ost"),
    "surrogate": IDENTITY.pack().replace(b'"epoch":""', b'"epoch":"\\ud800"'),
}


@pytest.mark.parametrize("name", BAD_IDENTITIES)
def test_an_identity_that_is_not_the_canonical_form_of_one_is_refused(name: str) -> None:
    with pytest.raises(MalformedImage):
        sealed.Identity.parse(BAD_IDENTITIES[name], LIMITS)


def test_an_identity_that_is_too_large_is_refused() -> None:
    raw = msgspec.structs.replace(IDENTITY, epoch="x" * (2 << 20)).pack()
    with pytest.raises(LimitExceeded):
        sealed.Identity.parse(raw, LIMITS)


def test_canonical_json_is_that_of_the_rfc() -> None:
    """RFC 8785 §3.2.3, as far as it has no fractions."""
    value = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One",
        "\U0001f600": "Emoji: Grinning Face",
        "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }
    assert list(json.loads(sealed.canonical(value))) == ["\r", "1", "\x80", "ö", "€", "😀", "\ufb33"]
    assert sealed.canonical({"b": [1, True, None, '\x0f\n"\\/\x7f'], "a": -5}) == (
        b'{"a":-5,"b":[1,true,null,"\\u000f\\n\\"\\\\/\x7f"]}'
    )


@pytest.mark.parametrize("value", [1.5, 1 << 53, {1: 2}, {"a": object()}, b"", "\ud800"], ids=str)
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(SnapshotterError):
        sealed.canonical(value)
    with pytest.raises(MalformedImage) as caught:
        sealed.config_sha256({"config": {"x": value}})
    assert caught.value.reason == "config-mismatch"


def test_a_config_nested_without_end_is_refused() -> None:
    value: object = "x"
    for _ in range(5000):
        value = [value]
    with pytest.raises(MalformedImage):
        sealed.config_sha256({"config": value})


# tails of stock blobs


def ustar(name: bytes, size: int) -> bytes:
    header = bytearray(512)
    header[: len(name)] = name
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[257:265] = b"ustar  \0"
    header[148:156] = b"%07o\0" % sum(header)
    return bytes(header)


def toc_entry(name: bytes, offset: int, size: int, plain: int, compressor: int = 1) -> bytes:
    return struct.pack("<II16s32sQQQ48x", compressor, 0, name, bytes(32), offset, size, plain)


@pytest.mark.parametrize(
    "tail",
    [
        toc_entry(b"image.boot", 1 << 63, 5, 5) + ustar(b"rafs.blob.toc", 128),
        toc_entry(b"image.boot", 0, 1 << 40, 5) + ustar(b"rafs.blob.toc", 128),
        toc_entry(b"image.boot", 0, 5, 5) + ustar(b"rafs.blob.toc", 127),
        toc_entry(b"image.boot", 0, 5, 5) + ustar(b"rafs.blob.toc", 4096),
        ustar(b"image.boot", 7 << 30),
    ],
)
def test_a_tail_that_lies_is_refused(tail: bytes) -> None:
    blob = bytes(5000) + tail
    with pytest.raises(MalformedImage):
        toc.sections(blob[-toc.TAIL_SIZE :], len(blob))


def test_a_section_unpacks_to_what_it_says_or_is_refused() -> None:
    bomb = trees.compress(bytes(64 << 20), 3)
    for plain, compressor in ((100, 2), (64 << 20, 4), (len(bomb), 2), (5, 1), (5, 9)):
        (section,) = toc.sections(
            bomb.ljust(8000, b"\0")[-3456:] + toc_entry(b"image.boot", 0, len(bomb), plain, compressor)
            + ustar(b"rafs.blob.toc", 128),
            8640,
        )  # fmt: skip
        with pytest.raises(MalformedImage):
            section.content(bomb, LIMITS)
    twice = toc_entry(b"image.boot", 0, 5, 5) * 2 + ustar(b"rafs.blob.toc", 256)
    with pytest.raises(MalformedImage, match="twice"):
        toc.find(toc.sections(twice, len(twice)), toc.BOOTSTRAP)
