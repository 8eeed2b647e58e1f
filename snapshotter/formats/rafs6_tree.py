"""The tree of a RAFS v6 bootstrap: inodes, directories, attributes; walking it, one name after the other.

Every offset is checked against the image and every size against a limit before it is used. Checking the whole tree at
once is `rafs6_check`.
"""

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import lt
from typing import NamedTuple, Protocol, overload

from snapshotter.config import Limits
from snapshotter.errors import LimitExceeded, MalformedImage
from snapshotter.formats import erofs
from snapshotter.formats.erofs import BLOCK

_GIGA = 1_000_000_000


class Image(Protocol):
    """What of a bootstrap its tree needs to know."""

    @property
    def data(self) -> memoryview: ...
    @property
    def meta_blkaddr(self) -> int: ...
    @property
    def root_nid(self) -> int: ...
    @property
    def chunk_size(self) -> int: ...
    @property
    def limits(self) -> Limits: ...


class Inode(NamedTuple):
    """One inode as stored. `at` is its byte offset, `head` the bytes of inode and extended attributes."""

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
    rdev: int = 0  # as os.makedev counts
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    chunks: Sequence[tuple[int, int]] = ()


class ChunkRefs(Sequence[tuple[int, int]]):
    """(blob index, chunk index) pairs, decoded when asked for. A blob index of -1 is the image itself."""

    __slots__ = ("_raw",)

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw

    def __len__(self) -> int:
        return len(self._raw) // erofs.INDEX_ENTRY.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (_reference(entry) for (entry,) in erofs.INDEX_ENTRY.iter_unpack(self._raw))

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return _reference(erofs.INDEX_ENTRY.unpack_from(self._raw, 8 * position)[0])


def _reference(entry: int) -> tuple[int, int]:
    return (entry >> 16 & 0xFF) - 1, entry & 0xFFFF | entry >> 8 & 0xFF0000


def read_inode(image: Image, nid: int) -> Inode:
    """Raises MalformedImage if the inode or its attributes lie outside of the image, or it is of no known format."""
    data = image.data
    at = image.meta_blkaddr * BLOCK + nid * erofs.SLOT
    if at + erofs.COMPACT_INODE.size > len(data):
        raise MalformedImage(f"inode {nid}: lies outside")
    extended = data[at] & 1
    if not extended:
        form, icount, mode, nlink, size, _, raw, _, uid, gid = erofs.COMPACT_INODE.unpack_from(data, at)
        mtime = 0
    elif at + erofs.EXTENDED_INODE.size > len(data):
        raise MalformedImage(f"inode {nid}: lies outside")
    else:
        form, icount, mode, _, size, raw, _, uid, gid, seconds, nanos, nlink = erofs.EXTENDED_INODE.unpack_from(
            data, at
        )
        if nanos >= _GIGA:
            raise MalformedImage(f"inode {nid}: {nanos} nanoseconds in its time")
        mtime = seconds * _GIGA + nanos
    layout = form >> 1
    if layout not in (erofs.LAYOUT_PLAIN, erofs.LAYOUT_INLINE, erofs.LAYOUT_CHUNK):
        raise MalformedImage(f"inode {nid}: unknown format {form:#x}")
    area = erofs.xattr_area(icount)
    head = (erofs.EXTENDED_INODE.size if extended else erofs.COMPACT_INODE.size) + area
    if at + head > len(data):
        raise MalformedImage(f"inode {nid}: extended attributes lie outside")
    if area > image.limits.xattr_bytes:
        raise LimitExceeded(f"inode {nid}: extended attributes larger than limits.xattr_bytes")
    if size >= 1 << 63 or not nlink:
        raise MalformedImage(f"inode {nid}: bad size or link count")
    return Inode(at, head, layout, mode, nlink, size, raw, uid, gid, mtime, icount)


def content(image: Image, nid: int, inode: Inode, limit: int) -> bytes:
    """Bytes of a directory or symlink, at most `limit`. Raises MalformedImage, LimitExceeded."""
    size = inode.size
    if size > limit:
        raise LimitExceeded(f"inode {nid}: its {size} bytes are more than {limit}")
    if inode.layout == erofs.LAYOUT_CHUNK:
        raise MalformedImage(f"inode {nid}: has chunks but is no regular file")
    tail = size % BLOCK if inode.layout == erofs.LAYOUT_INLINE else 0
    full = size - tail
    data = image.data
    start, inline = inode.raw * BLOCK, inode.at + inode.head
    if full and start + full > len(data):
        raise MalformedImage(f"inode {nid}: data lies outside")
    if tail and (inline % BLOCK + tail > BLOCK or inline + tail > len(data)):
        raise MalformedImage(f"inode {nid}: inline data crosses a block")
    if not full:
        return bytes(data[inline : inline + tail])
    return b"".join((data[start : start + full], data[inline : inline + tail]))


def dirents(raw: bytes, nid: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, nid, file type) of a directory's content, in stored order, `.` and `..` included.

    Raises MalformedImage unless names ascend strictly by bytes, have 1 to 255 bytes, and hold neither `/` nor NUL.
    """
    last = b""
    for start in range(0, len(raw), BLOCK):
        block = raw[start : start + BLOCK]
        first = int.from_bytes(block[8:10], "little")
        if not erofs.DIRENT.size <= first < len(block) or first % erofs.DIRENT.size:
            raise MalformedImage(f"directory {nid}: bad offset of names")
        nids, offsets, kinds, _ = zip(*erofs.DIRENT.iter_unpack(block[:first]), strict=True)
        text = block.rstrip(b"\0")
        # Each name ends where the next begins: offsets that go back or too far make some name empty.
        names = [text[at:end] for at, end in zip(offsets, (*offsets[1:], len(text)), strict=True)]
        if not all(names) or max(map(len, names)) > erofs.MAX_NAME:
            raise MalformedImage(f"directory {nid}: a name is empty or too long")
        if b"/" in text[first:] or b"\0" in text[first:]:
            raise MalformedImage(f"directory {nid}: a name holds / or NUL")
        if names[0] <= last or not all(map(lt, names, names[1:])):
            raise MalformedImage(f"directory {nid}: names do not ascend")
        last = names[-1]
        yield from zip(names, nids, kinds, strict=True)


def xattrs(image: Image, nid: int, inode: Inode) -> dict[bytes, bytes]:
    """Full names and values. Raises MalformedImage."""
    if not inode.xattr_count:
        return {}
    end = inode.at + inode.head
    raw = bytes(image.data[end - erofs.xattr_area(inode.xattr_count) : end])
    if raw[4]:
        raise MalformedImage(f"inode {nid}: has shared extended attributes")
    found: dict[bytes, bytes] = {}
    at = erofs.XATTR_HEADER
    while at < len(raw):  # both are multiples of 4
        name_size, prefix, value_size = erofs.XATTR_ENTRY.unpack_from(raw, at)
        middle = at + 4 + name_size
        after = middle + value_size
        if prefix not in erofs.XATTR_PREFIXES or (prefix in erofs.XATTR_ACLS) != (not name_size) or after > len(raw):
            raise MalformedImage(f"inode {nid}: bad extended attribute")
        name = erofs.XATTR_PREFIXES[prefix] + raw[at + 4 : middle]
        if name in found or b"\0" in name:
            raise MalformedImage(f"inode {nid}: an extended attribute comes twice or has a NUL in its name")
        found[name] = raw[middle:after]
        at = erofs.align(after, 4)
    return found


def index_of(image: Image, nid: int, inode: Inode) -> memoryview:
    """The 8-byte index entries of a regular file, one per chunk_size piece. Raises MalformedImage."""
    if inode.layout != erofs.LAYOUT_CHUNK:
        if inode.size:
            raise MalformedImage(f"inode {nid}: regular file without chunks")
        return image.data[:0]
    size = -(-inode.size // image.chunk_size) * erofs.INDEX_ENTRY.size
    start = erofs.align(inode.at + inode.head, 8)
    if size and start + size > len(image.data):
        raise MalformedImage(f"inode {nid}: chunk index lies outside")
    if inode.raw & ~0x3F or (size and not inode.raw & erofs.CHUNK_INDEXES):
        raise MalformedImage(f"inode {nid}: bad chunk format {inode.raw:#x}")
    return image.data[start : start + size]


def walk(image: Image) -> Iterator[TreeEntry]:
    """Every name, parents before children, siblings by bytes. Raises MalformedImage and LimitExceeded on the way."""
    root = read_inode(image, image.root_nid)
    yield _entry(image, b"/", image.root_nid, root)
    visited = {image.root_nid}
    todo = [_directory(image, b"", image.root_nid, root)]
    names, room = 0, len(image.data) - root.size
    while todo:
        found = next(todo[-1], None)
        if found is None:
            todo.pop()
            continue
        names += 1
        if names > image.limits.inodes:
            raise LimitExceeded("bootstrap: more names than limits.inodes")
        path, nid = found
        inode = read_inode(image, nid)
        yield _entry(image, path, nid, inode)
        if not stat.S_ISDIR(inode.mode):
            continue
        if nid in visited:
            raise MalformedImage(f"directory {nid}: has two names or contains itself")
        if len(todo) > image.limits.directory_depth:
            raise LimitExceeded("bootstrap: deeper than limits.directory_depth")
        room -= inode.size
        if room < 0:
            raise MalformedImage("bootstrap: directories overlap")
        visited.add(nid)
        todo.append(_directory(image, path, nid, inode))


def _directory(image: Image, path: bytes, nid: int, inode: Inode) -> Iterator[tuple[bytes, int]]:
    """(path, nid) of what is in a directory."""
    if not stat.S_ISDIR(inode.mode):
        raise MalformedImage(f"directory {nid}: is none")
    for name, child, _ in dirents(content(image, nid, inode, image.limits.directory_bytes), nid):
        if name not in (b".", b".."):
            yield path + b"/" + name, child


def _entry(image: Image, path: bytes, nid: int, inode: Inode) -> TreeEntry:
    kind = stat.S_IFMT(inode.mode)
    rdev, target = 0, b""
    chunks: Sequence[tuple[int, int]] = ()
    if kind == stat.S_IFREG:
        chunks = ChunkRefs(index_of(image, nid, inode))
    elif kind == stat.S_IFLNK:
        target = content(image, nid, inode, image.limits.symlink_bytes)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        rdev = inode.raw  # Linux new_encode_dev is os.makedev where 32 bits suffice
    return TreeEntry(
        path, nid, inode.mode, inode.uid, inode.gid, inode.size, inode.mtime_ns, inode.nlink,
        rdev, target, xattrs(image, nid, inode), chunks,
    )  # fmt: skip
