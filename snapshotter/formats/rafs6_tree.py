"""The tree of a RAFS v6 bootstrap: walking it, and checking all of it before the kernel sees it.

Recursion and memory are bounded by limits.inodes and limits.directory_depth; every offset is checked against the file.
"""

import stat
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from snapshotter.errors import LimitExceeded, MalformedImage
from snapshotter.formats.blobmeta import ChunkTable
from snapshotter.formats.blobtable import BLOCK
from snapshotter.formats.rafs6 import Bootstrap

LAYOUT_PLAIN, LAYOUT_INLINE, LAYOUT_CHUNK = 0, 2, 4
INODE_SIZES = (32, 64)
COMPACT = struct.Struct("<HHHHIIIIHH4x")
EXTENDED_INODE = struct.Struct("<HHHHQIIIIqII16x")
DIRENT = struct.Struct("<QHBB")
INDEX = struct.Struct("<HBBI")
XATTR_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


class Inode(NamedTuple):
    """One inode as stored. `at` is its byte offset, `head` the bytes of inode and xattrs."""

    at: int
    head: int
    layout: int
    mode: int
    nlink: int
    size: int
    raw: int
    uid: int
    gid: int
    mtime_ns: int
    xattr_count: int


@dataclass(slots=True)
class TreeEntry:
    """One name of the tree. `chunks`: (blob index, chunk index) per chunk_size piece of a regular file."""

    path: bytes
    nid: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    nlink: int
    rdev: int = 0
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    chunks: Sequence[tuple[int, int]] = ()


def read_inode(bootstrap: Bootstrap, nid: int) -> Inode:
    """Raises MalformedImage if any part of the inode lies outside of the bootstrap."""
    data = bootstrap.data
    at = bootstrap.meta_blkaddr * BLOCK + nid * 32
    if at + 64 > len(data):
        raise MalformedImage(f"inode {nid}: lies outside")
    form = data[at] | data[at + 1] << 8
    extended, layout = form & 1, form >> 1
    if layout not in (LAYOUT_PLAIN, LAYOUT_INLINE, LAYOUT_CHUNK):
        raise MalformedImage(f"inode {nid}: unknown format {form:#x}")
    if extended:
        _, icount, mode, _, size, raw, _, uid, gid, seconds, nanoseconds, nlink = EXTENDED_INODE.unpack_from(data, at)
        if nanoseconds >= 1_000_000_000:
            raise MalformedImage(f"inode {nid}: bad time")
        mtime = seconds * 1_000_000_000 + nanoseconds
    else:
        _, icount, mode, nlink, size, _, raw, _, uid, gid = COMPACT.unpack_from(data, at)
        mtime = 0
    head = INODE_SIZES[extended] + (12 + 4 * (icount - 1) if icount else 0)
    if at + head > len(data) or head > bootstrap.limits.xattr_bytes:
        raise MalformedImage(f"inode {nid}: extended attributes lie outside or are too many")
    if size >= 1 << 63 or not nlink:
        raise MalformedImage(f"inode {nid}: bad size or link count")
    return Inode(at, head, layout, mode, nlink, size, raw, uid, gid, mtime, icount)


def content(bootstrap: Bootstrap, nid: int, inode: Inode, limit: int) -> bytes:
    """Bytes of a directory or symlink."""
    size = inode.size
    if size > limit:
        raise LimitExceeded(f"inode {nid}: {size} bytes are more than {limit}")
    data = bootstrap.data
    if inode.layout == LAYOUT_CHUNK:
        raise MalformedImage(f"inode {nid}: chunks in something that is no regular file")
    tail = size % BLOCK if inode.layout == LAYOUT_INLINE else 0
    full = size - tail
    start, inline = inode.raw * BLOCK, inode.at + inode.head
    if full and start + full > len(data):
        raise MalformedImage(f"inode {nid}: data lies outside")
    if tail and (inline % BLOCK + tail > BLOCK or inline + tail > len(data)):
        raise MalformedImage(f"inode {nid}: inline data crosses a block")
    return bytes(data[start : start + full]) + bytes(data[inline : inline + tail])


def dirents(block_data: bytes, nid: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, nid, file type) in stored order. Raises MalformedImage for names out of order, empty, with / or NUL."""
    last = b""
    for start in range(0, len(block_data), BLOCK):
        block = block_data[start : start + BLOCK]
        if len(block) < DIRENT.size:
            raise MalformedImage(f"directory {nid}: part of an entry")
        first = block[8] | block[9] << 8
        if first % DIRENT.size or not DIRENT.size <= first <= len(block):
            raise MalformedImage(f"directory {nid}: bad name offset")
        entries = list(DIRENT.iter_unpack(block[:first]))
        for index, (child, offset, kind, _) in enumerate(entries):
            end = entries[index + 1][1] if index + 1 < len(entries) else len(block)
            if not first <= offset < end <= len(block):
                raise MalformedImage(f"directory {nid}: names overlap")
            name = block[offset:end]
            if index + 1 == len(entries):
                name = name.rstrip(b"\0")
            if not name or len(name) > 255 or b"/" in name or b"\0" in name or name <= last:
                raise MalformedImage(f"directory {nid}: bad or unsorted name {name[:40]!r}")
            last = name
            yield name, child, kind


def xattrs(bootstrap: Bootstrap, nid: int, inode: Inode) -> dict[bytes, bytes]:
    """Full names and values. Raises MalformedImage."""
    if not inode.xattr_count:
        return {}
    start = inode.at + inode.head - (12 + 4 * (inode.xattr_count - 1))
    raw = bytes(bootstrap.data[start : inode.at + inode.head])
    if raw[4]:
        raise MalformedImage(f"inode {nid}: shared extended attributes")
    found: dict[bytes, bytes] = {}
    at = 12
    while at + 4 <= len(raw):
        name_len, prefix, value_size = raw[at], raw[at + 1], raw[at + 2] | raw[at + 3] << 8
        end = at + 4 + name_len + value_size
        if end > len(raw) or prefix not in XATTR_PREFIXES or (prefix in (2, 3)) != (not name_len):
            raise MalformedImage(f"inode {nid}: bad extended attribute")
        name = XATTR_PREFIXES[prefix] + raw[at + 4 : at + 4 + name_len]
        if name in found or b"\0" in name:
            raise MalformedImage(f"inode {nid}: bad or repeated extended attribute name")
        found[name] = raw[at + 4 + name_len : end]
        at = (end + 3) & ~3
    return found


def chunk_array(bootstrap: Bootstrap, nid: int, inode: Inode) -> memoryview:
    """The 8-byte index entries of a regular file, one per chunk_size piece."""
    if inode.layout != LAYOUT_CHUNK:
        if inode.size:
            raise MalformedImage(f"inode {nid}: regular file without chunks")
        return bootstrap.data[:0]
    count = -(-inode.size // bootstrap.chunk_size)
    start = (inode.at + inode.head + 7) & ~7
    if start + 8 * count > len(bootstrap.data):
        raise MalformedImage(f"inode {nid}: chunk index lies outside")
    if inode.raw >> 16 or inode.raw & 0xFFC0 or (inode.size and not inode.raw & 0x20):
        raise MalformedImage(f"inode {nid}: bad chunk format {inode.raw:#x}")
    return bootstrap.data[start : start + 8 * count]


def walk(bootstrap: Bootstrap) -> Iterator[TreeEntry]:
    """Every name, parents first, siblings in byte order. Raises MalformedImage and LimitExceeded as it goes."""
    yield _entry(bootstrap, b"/", bootstrap.root_nid)
    pending = [(b"", bootstrap.root_nid)]
    visited: set[int] = set()
    names = 0
    while pending:
        path, nid = pending.pop()
        if nid in visited:
            raise MalformedImage(f"directory {nid}: has two names")
        visited.add(nid)
        inode = read_inode(bootstrap, nid)
        below = []
        for name, child, _ in dirents(content(bootstrap, nid, inode, bootstrap.limits.directory_bytes), nid):
            if name in (b".", b".."):
                continue
            names += 1
            if names > bootstrap.limits.inodes:
                raise LimitExceeded("bootstrap: more names than limits.inodes")
            entry = _entry(bootstrap, path + b"/" + name, child)
            yield entry
            if stat.S_ISDIR(entry.mode):
                below.append((entry.path, child))
        pending.extend(reversed(below))


def _entry(bootstrap: Bootstrap, path: bytes, nid: int) -> TreeEntry:
    inode = read_inode(bootstrap, nid)
    kind = stat.S_IFMT(inode.mode)
    size, rdev, target = inode.size, 0, b""
    chunks: Sequence[tuple[int, int]] = ()
    if kind == stat.S_IFREG:
        array = chunk_array(bootstrap, nid, inode)
        chunks = [(device - 1, low | high << 16) for low, device, high, _ in INDEX.iter_unpack(array)]
    elif kind == stat.S_IFLNK:
        target = content(bootstrap, nid, inode, bootstrap.limits.symlink_bytes)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        rdev = _decode_device(inode.raw)
    return TreeEntry(
        path,
        nid,
        inode.mode,
        inode.uid,
        inode.gid,
        size,
        inode.mtime_ns,
        inode.nlink,
        rdev,
        target,
        xattrs(bootstrap, nid, inode),
        chunks,
    )


def _decode_device(raw: int) -> int:
    """Linux new_decode_dev, as os.makedev counts."""
    major, minor = raw >> 8 & 0xFFF, raw & 0xFF | raw >> 12 & 0xFFF00
    return (major & 0xFFF) << 8 | minor & 0xFF | (minor & ~0xFF) << 12


def validate(bootstrap: Bootstrap, tables: Sequence[ChunkTable]) -> None:
    """Check the whole tree: structure, limits, and that every index entry is the chunk it names."""
    starts = [array("I", (info.uncompressed_offset // BLOCK for info in table)) for table in tables]
    sizes = [array("I", (info.uncompressed_size for info in table)) for table in tables]
    limits = bootstrap.limits
    files: set[int] = set()
    directories: set[int] = set()
    pending = [(bootstrap.root_nid, bootstrap.root_nid, 0)]
    names = 0
    while pending:
        nid, parent, depth = pending.pop()
        if nid in directories:
            raise MalformedImage(f"directory {nid}: has two names or contains itself")
        if depth > limits.directory_depth:
            raise LimitExceeded("bootstrap: deeper than limits.directory_depth")
        directories.add(nid)
        inode = read_inode(bootstrap, nid)
        if not stat.S_ISDIR(inode.mode):
            raise MalformedImage(f"directory {nid}: is no directory")
        xattrs(bootstrap, nid, inode)
        dots = {}
        for name, child, kind in dirents(content(bootstrap, nid, inode, limits.directory_bytes), nid):
            if name in (b".", b".."):
                dots[name] = child
                continue
            names += 1
            if names > limits.inodes:
                raise LimitExceeded("bootstrap: more names than limits.inodes")
            if kind == 2:
                pending.append((child, nid, depth + 1))
                continue
            if child not in files:
                _check_file(bootstrap, child, kind, starts, sizes)
                files.add(child)
        if dots != {b".": nid, b"..": parent}:
            raise MalformedImage(f"directory {nid}: . and .. do not point to itself and its parent")
    if directories & files:
        raise MalformedImage("bootstrap: an inode is a directory and a file")


def _check_file(
    bootstrap: Bootstrap, nid: int, kind: int, starts: "Sequence[array[int]]", sizes: "Sequence[array[int]]"
) -> None:
    inode = read_inode(bootstrap, nid)
    if FILE_TYPES.get(stat.S_IFMT(inode.mode)) != kind:
        raise MalformedImage(f"inode {nid}: directory entry has type {kind}, inode mode {inode.mode:#o}")
    if inode.xattr_count:
        xattrs(bootstrap, nid, inode)
    if kind == 7:
        target = content(bootstrap, nid, inode, bootstrap.limits.symlink_bytes)
        if not target or b"\0" in target:
            raise MalformedImage(f"inode {nid}: bad symlink")
    elif kind == 1:
        _check_chunks(bootstrap, nid, inode, starts, sizes)


def _check_chunks(
    bootstrap: Bootstrap, nid: int, inode: Inode, starts: "Sequence[array[int]]", sizes: "Sequence[array[int]]"
) -> None:
    """What the kernel will read (device, block) and what the index says (blob, chunk) must be the same bytes."""
    chunk_size, size = bootstrap.chunk_size, inode.size
    array = chunk_array(bootstrap, nid, inode)
    left = size
    blocks = []
    for low, device, high, block in INDEX.iter_unpack(array):
        chunk = low | high << 16
        wanted = min(left, chunk_size)
        if not 0 < device <= len(starts) or chunk >= len(starts[device - 1]):
            raise MalformedImage(f"inode {nid}: names chunk {chunk} of blob {device - 1}, which does not exist")
        if starts[device - 1][chunk] != block or sizes[device - 1][chunk] != wanted:
            raise MalformedImage(f"inode {nid}: block {block} is not where chunk {chunk} of blob {device - 1} lies")
        left -= wanted
        blocks.append((device, block))
    if not blocks:
        return
    effective = BLOCK << (inode.raw & 0x1F)
    if effective > chunk_size:
        # The kernel reads by the first entry alone: all chunks must follow each other on one device.
        step = chunk_size // BLOCK
        device, first = blocks[0]
        if effective < size or any(entry != (device, first + step * i) for i, entry in enumerate(blocks)):
            raise MalformedImage(f"inode {nid}: claims chunks that follow each other, but they do not")
    elif effective != chunk_size:
        raise MalformedImage(f"inode {nid}: chunk format says {effective} bytes")
