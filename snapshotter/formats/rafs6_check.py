"""Checking the whole tree of a bootstrap before the kernel sees it: once per bootstrap, at pull.

What is refused: directories that contain themselves or have two names, `.` and `..` that lie, names and attributes the
format does not allow, and index entries whose two halves (blob and chunk for us, device and block for the kernel)
name different bytes. Time and memory are linear in the size of the bootstrap, whatever it says.
"""

import stat
from array import array
from collections.abc import Iterator, Sequence
from typing import Final

from snapshotter.errors import LimitExceeded, MalformedImage
from snapshotter.formats import erofs
from snapshotter.formats.blobmeta import ChunkTable
from snapshotter.formats.erofs import BLOCK
from snapshotter.formats.rafs6_tree import Image, Inode, content, dirents, index_of, read_inode, xattrs

_ENTRY: Final = erofs.INDEX_ENTRY.size


def index_entry(blob_index: int, chunk_index: int, device_offset: int) -> int:
    """The 8 bytes that stand for one chunk: index bits 0..15, device id (blob + 1), index bits 16..23, block."""
    low, high = chunk_index & 0xFFFF, chunk_index >> 16
    return low | (blob_index + 1) << 16 | high << 24 | device_offset // BLOCK << 32


def index_entries(blob_index: int, table: ChunkTable) -> "array[int]":
    """The entry of each chunk of a blob."""
    return array("Q", (index_entry(blob_index, i, offset) for i, offset in enumerate(table.uncompressed_offsets)))


def validate(image: Image, tables: Sequence[ChunkTable]) -> None:
    """`tables`: one per blob, in order. Raises MalformedImage and LimitExceeded."""
    _Check(image, tables).run()


class _Check:
    def __init__(self, image: Image, tables: Sequence[ChunkTable]) -> None:
        self._image = image
        self._limits = image.limits
        self._entries = [index_entries(index, table) for index, table in enumerate(tables)]
        self._sizes = [table.uncompressed_sizes for table in tables]
        # File type by nid of every inode met so far.
        self._met = bytearray(max(0, len(image.data) - image.meta_blkaddr * BLOCK) // erofs.SLOT)
        # Nothing overlaps in an image, so its parts cannot add up to more than it has; hostile ones could make every
        # inode claim the same megabytes.
        self._room = len(image.data)

    def run(self) -> None:
        image, limits = self._image, self._limits
        names = 0
        todo = [(image.root_nid, image.root_nid, 0)]
        self._meet(image.root_nid, erofs.TYPE_DIRECTORY)
        while todo:
            nid, parent, depth = todo.pop()
            if depth > limits.directory_depth:
                raise LimitExceeded("bootstrap: deeper than limits.directory_depth")
            dots = 0
            for name, child, kind in self._names(nid):
                if name in (b".", b".."):
                    if child != (nid if name == b"." else parent) or kind != erofs.TYPE_DIRECTORY:
                        raise MalformedImage(f"directory {nid}: . or .. leads elsewhere")
                    dots += 1
                    continue
                names += 1
                if not self._meet(child, kind):
                    continue
                if kind == erofs.TYPE_DIRECTORY:
                    todo.append((child, nid, depth + 1))
                else:
                    self._check(child, kind)
            if names > limits.inodes:
                raise LimitExceeded("bootstrap: more names than limits.inodes")
            if dots != 2:
                raise MalformedImage(f"directory {nid}: . or .. is missing")

    def _meet(self, nid: int, kind: int) -> bool:
        """True at the first meeting. Only a file may have several names."""
        if nid >= len(self._met):
            raise MalformedImage(f"inode {nid}: lies outside")
        before = self._met[nid]
        if before and (before != kind or kind == erofs.TYPE_DIRECTORY):
            raise MalformedImage(f"inode {nid}: is a directory with two names or a file of two types")
        self._met[nid] = kind
        return not before

    def _names(self, nid: int) -> Iterator[tuple[bytes, int, int]]:
        inode = self._inode(nid, erofs.TYPE_DIRECTORY)
        self._spend(inode.head + inode.size)
        return dirents(content(self._image, nid, inode, self._limits.directory_bytes), nid)

    def _check(self, nid: int, kind: int) -> None:
        """Anything but a directory."""
        inode = self._inode(nid, kind)
        if kind == erofs.TYPE_FILE:
            index = index_of(self._image, nid, inode)
            self._spend(inode.head + len(index))
            if index:
                self._check_index(nid, inode, index)
        elif kind == erofs.TYPE_SYMLINK:
            self._spend(inode.head + inode.size)
            target = content(self._image, nid, inode, self._limits.symlink_bytes)
            if not target or b"\0" in target:
                raise MalformedImage(f"inode {nid}: bad target of a symlink")
        elif inode.size or inode.layout != erofs.LAYOUT_PLAIN:
            raise MalformedImage(f"inode {nid}: a device, fifo or socket with content")

    def _inode(self, nid: int, kind: int) -> Inode:
        inode = read_inode(self._image, nid)
        if erofs.FILE_TYPES.get(stat.S_IFMT(inode.mode)) != kind:
            raise MalformedImage(f"inode {nid}: its directory entry says type {kind}, its mode {inode.mode:#o}")
        if inode.xattr_count:
            xattrs(self._image, nid, inode)
        return inode

    def _spend(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise MalformedImage("bootstrap: its parts overlap")

    def _check_index(self, nid: int, inode: Inode, index: memoryview) -> None:
        chunk_size = self._image.chunk_size
        last = len(index) // _ENTRY - 1
        for number, (entry,) in enumerate(erofs.INDEX_ENTRY.iter_unpack(index)):
            blob, chunk = (entry >> 16 & 0xFF) - 1, entry & 0xFFFF | entry >> 8 & 0xFF0000
            if not 0 <= blob < len(self._entries) or chunk >= len(self._entries[blob]):
                raise MalformedImage(f"inode {nid}: names chunk {chunk} of blob {blob}, which does not exist")
            if entry != self._entries[blob][chunk]:
                raise MalformedImage(f"inode {nid}: chunk {chunk} of blob {blob} does not lie where the index says")
            if self._sizes[blob][chunk] != (chunk_size if number < last else inode.size - last * chunk_size):
                raise MalformedImage(f"inode {nid}: chunk {chunk} of blob {blob} has another size than its place")
        self._check_unit(nid, inode, index)

    def _check_unit(self, nid: int, inode: Inode, index: memoryview) -> None:
        """The kernel counts in units of i_u, everybody else in chunks; a larger unit needs chunks in a row."""
        unit, chunk_size = BLOCK << (inode.raw & 0x1F), self._image.chunk_size
        if unit == chunk_size:
            return
        if unit < inode.size:
            raise MalformedImage(f"inode {nid}: chunk format {inode.raw:#x} does not fit its index")
        place = None
        for (entry,) in erofs.INDEX_ENTRY.iter_unpack(index):
            device, block = entry >> 16 & 0xFF, entry >> 32
            if place is not None and (device, block) != place:
                raise MalformedImage(f"inode {nid}: claims chunks in a row, but they are not")
            place = device, block + chunk_size // BLOCK
