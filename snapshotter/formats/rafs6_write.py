"""RAFS v6 bootstrap writer: a tree of `Node`s and the tables of its blobs become one EROFS metadata image.

Deterministic: equal input gives equal bytes. Inodes are extended and keep nanosecond mtimes (Python recompiles every
module when they are lost). What it writes is read by the kernel (≥ 5.16) and, for plain images, by stock Nydus tools.
"""

import stat
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from snapshotter.errors import InvalidArgument
from snapshotter.formats import rafs6
from snapshotter.formats.blobmeta import ChunkTable
from snapshotter.formats.blobtable import BLOCK, ENTRY_SIZE, BlobEntry
from snapshotter.formats.rafs6_tree import (
    DIRENT,
    EXTENDED_INODE,
    FILE_TYPES,
    INDEX,
    LAYOUT_CHUNK,
    LAYOUT_INLINE,
    LAYOUT_PLAIN,
    XATTR_PREFIXES,
)

INODE_SIZE = 64
ROOT_NID = BLOCK // 32  # so that no inode has number 0, which readdir would hide
_UNIADDR_ALIGNMENT = 0x80000
_PREFIXES = {name: index for index, name in XATTR_PREFIXES.items()}


@dataclass(slots=True, eq=False)
class Node:
    """A file system object. The same node under several names is a hard link.

    `chunks`: for each chunk_size piece of a regular file, blob index << 32 | chunk index. `xattrs`: full names.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    size: int = 0
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    chunks: "array[int]" = field(default_factory=lambda: array("Q"))
    children: "dict[bytes, Node] | None" = None


@dataclass(frozen=True, slots=True)
class BlobTable:
    """A blob as the bootstrap describes it. `digests`: 32 bytes per chunk."""

    entry: BlobEntry
    chunks: ChunkTable
    digests: bytes


def write_bootstrap(
    root: Node, blobs: Sequence[BlobTable], *, chunk_size: int, flags: int, prefetch: Sequence[Node] = ()
) -> bytes:
    """Raises InvalidArgument for what the format cannot hold (names, attributes, sizes)."""
    devices_end = rafs6.DEVICES_OFFSET + rafs6.SLOT_SIZE * len(blobs)
    blob_table = _align(devices_end, BLOCK)
    prefetch_table = blob_table + ENTRY_SIZE * len(blobs)
    meta = _align(prefetch_table + 4 * len(prefetch), BLOCK)
    layout = _Layout(root, meta)
    out = bytearray(layout.end)
    for placed in layout.placed.values():
        _write_inode(out, placed, layout, blobs, chunk_size)
    chunk_table = _align(len(out), BLOCK)
    records = _chunk_records(blobs)
    out += bytes(chunk_table - len(out)) + records
    out += bytes(-len(out) % BLOCK)
    has_xattrs = any(placed.xattrs for placed in layout.placed.values())
    flags |= rafs6.FLAG_HAS_XATTR if has_xattrs else 0
    device_blocks = sum(blob.entry.uncompressed_size for blob in blobs) // BLOCK
    rafs6.SUPERBLOCK.pack_into(
        out,
        rafs6.SUPERBLOCK_OFFSET,
        rafs6.EROFS_MAGIC,
        0,
        rafs6.COMPAT_RAFS6,
        12,
        0,
        ROOT_NID,
        layout.names,
        0,
        0,
        device_blocks & 0xFFFFFFFF,
        meta // BLOCK,
        0,
        bytes(16),
        bytes(16),
        rafs6.INCOMPAT,
        0,
        len(blobs),
        rafs6.DEVICE_SLOT_OFFSET,
    )
    rafs6.EXTENDED.pack_into(
        out,
        rafs6.EXTENDED_OFFSET,
        flags,
        blob_table if blobs else 0,
        ENTRY_SIZE * len(blobs),
        chunk_size,
        chunk_table if records else 0,
        len(records),
        prefetch_table if prefetch else 0,
        4 * len(prefetch),
        0,
    )
    _write_devices(out, blobs, blob_table)
    for index, node in enumerate(prefetch):
        nid = layout.placed[id(node)].nid
        out[prefetch_table + 4 * index : prefetch_table + 4 * index + 4] = nid.to_bytes(4, "little")
    return bytes(out)


def _align(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _write_devices(out: bytearray, blobs: Sequence[BlobTable], blob_table: int) -> None:
    position = len(out)
    for index, blob in enumerate(blobs):
        position = _align(position, _UNIADDR_ALIGNMENT)
        blocks = blob.entry.uncompressed_size // BLOCK
        at = rafs6.DEVICES_OFFSET + rafs6.SLOT_SIZE * index
        rafs6.SLOT.pack_into(out, at, blob.entry.blob_id.encode(), blocks, position // BLOCK & 0xFFFFFFFF)
        position += blocks * BLOCK
        at = blob_table + ENTRY_SIZE * index
        out[at : at + ENTRY_SIZE] = blob.entry.pack()


def _chunk_records(blobs: Sequence[BlobTable]) -> bytes:
    """All chunks, sorted by digest, then blob. `file_offset` is 0: a chunk may stand in several files."""
    keyed: list[tuple[bytes, int, int]] = []
    for number, blob in enumerate(blobs):
        keyed += [(blob.digests[32 * i : 32 * i + 32], number, i) for i in range(len(blob.chunks))]
    keyed.sort()
    out = bytearray()
    for digest, number, index in keyed:
        info = blobs[number].chunks[index]
        flags = info.flags & 1 | (4 if info.flags & 8 else 0)
        out += rafs6.RECORD.pack(
            digest,
            number,
            flags,
            info.compressed_size,
            info.uncompressed_size,
            info.compressed_offset,
            info.uncompressed_offset,
            0,
            index,
            0,
        )
    return bytes(out)


@dataclass(slots=True)
class _Placed:
    """Where an inode lies. `blocks`: byte offset of its full data blocks, `inline`: how many bytes follow it."""

    node: Node
    at: int
    nid: int
    number: int
    xattrs: bytes
    parent: int = 0
    nlink: int = 1
    size: int = 0
    blocks: int = 0
    inline: int = 0


class _Layout:
    """Gives every node its place: inodes first, in walk order, then the data blocks of large directories."""

    def __init__(self, root: Node, meta: int) -> None:
        self.meta = meta
        self.placed: dict[int, _Placed] = {}
        self.names = 0
        self._cursor = meta + BLOCK
        self._place_directory(root)
        blocks = _align(self._cursor, BLOCK)
        for placed in self.placed.values():
            full = placed.size - placed.inline
            if full and not stat.S_ISREG(placed.node.mode):
                placed.blocks = blocks
                blocks = _align(blocks + full, BLOCK)
        self.end = blocks

    def _place_directory(self, root: Node) -> None:
        pending = [(root, root)]
        while pending:
            node, parent = pending.pop()
            children = _children(node)
            placed = self._place(node, _directory_size(children))
            placed.parent = id(parent)
            directories = []
            for _, child in sorted(children.items()):
                if stat.S_ISDIR(child.mode):
                    directories.append(child)
                    placed.nlink += 1
                elif id(child) in self.placed:
                    self.placed[id(child)].nlink += 1
                    self.names += 1
                else:
                    self._place(child, _content_size(child))
            placed.nlink += 1
            pending += [(child, node) for child in reversed(directories)]

    def _place(self, node: Node, size: int) -> _Placed:
        if id(node) in self.placed:
            raise InvalidArgument("a directory has two names")
        self.names += 1
        xattrs = _pack_xattrs(node.xattrs)
        head = INODE_SIZE + len(xattrs)
        inline = size % BLOCK if not stat.S_ISREG(node.mode) else 0
        at = _align(self._cursor, 32)
        if inline and head + inline > BLOCK:
            inline = 0
        elif inline and (at + head) % BLOCK + inline > BLOCK:
            # The inline part may not cross a block: begin where it ends up at the start of the next one.
            at = _align(_align(at + head, BLOCK) - head, 32)
            if (at + head) % BLOCK + inline > BLOCK:
                at = _align(at + head, BLOCK)
        end = at + head + inline
        if stat.S_ISREG(node.mode):
            end = _align(at + head, 8) + 8 * len(node.chunks)
        self._cursor = end
        placed = _Placed(node, at, (at - self.meta) // 32, len(self.placed) + 1, xattrs, size=size, inline=inline)
        self.placed[id(node)] = placed
        return placed


def _children(node: Node) -> Mapping[bytes, Node]:
    for name in node.children or ():
        if not name or len(name) > 255 or b"/" in name or b"\0" in name or name in (b".", b".."):
            raise InvalidArgument(f"file name {name[:40]!r} cannot be stored")
    return node.children or {}


def _content_size(node: Node) -> int:
    if stat.S_ISLNK(node.mode):
        return len(node.target)
    return node.size if stat.S_ISREG(node.mode) else 0


def _blocks_of_names(names: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Sorted names, packed greedily into blocks; an entry never straddles two."""
    block: list[bytes] = []
    used = 0
    for name in names:
        need = DIRENT.size + len(name)
        if used + need > BLOCK:
            yield block
            block, used = [], 0
        block.append(name)
        used += need
    yield block


def _directory_size(children: Mapping[bytes, Node]) -> int:
    size = 0
    for block in _blocks_of_names(sorted([*children, b".", b".."])):
        size = _align(size, BLOCK) + sum(DIRENT.size + len(name) for name in block)
    return size


def _directory_data(placed: _Placed, layout: _Layout) -> bytes:
    children = placed.node.children or {}
    targets = {b".": placed, b"..": layout.placed[placed.parent]}
    out = bytearray()
    for block in _blocks_of_names(sorted([*children, b".", b".."])):
        out += bytes(-len(out) % BLOCK)
        offset = DIRENT.size * len(block)
        for name in block:
            target = targets.get(name) or layout.placed[id(children[name])]
            out += DIRENT.pack(target.nid, offset, FILE_TYPES[stat.S_IFMT(target.node.mode)], 0)
            offset += len(name)
        out += b"".join(block)
    return bytes(out)


def _pack_xattrs(xattrs: Mapping[bytes, bytes]) -> bytes:
    if not xattrs:
        return b""
    out = bytearray(12)
    for name, value in sorted(xattrs.items()):
        index, rest = _xattr_name(name)
        if len(rest) > 255 or len(value) > 65535:
            raise InvalidArgument(f"extended attribute {name[:60]!r} cannot be stored")
        out += bytes((len(rest), index)) + len(value).to_bytes(2, "little") + rest + value
        out += bytes(-len(out) % 4)
    return bytes(out)


def _xattr_name(name: bytes) -> tuple[int, bytes]:
    if name in _PREFIXES and not name.endswith(b"."):
        return _PREFIXES[name], b""
    prefix, dot, rest = name.partition(b".")
    if not rest or prefix + dot not in _PREFIXES:
        raise InvalidArgument(f"extended attribute {name[:60]!r} has no prefix that EROFS knows")
    return _PREFIXES[prefix + dot], rest


def _write_inode(out: bytearray, placed: _Placed, layout: _Layout, blobs: Sequence[BlobTable], chunk_size: int) -> None:
    node, at = placed.node, placed.at
    form, raw, data = LAYOUT_PLAIN, 0, b""
    if stat.S_ISREG(node.mode):
        form, raw = LAYOUT_CHUNK, 0x20 | (chunk_size // BLOCK).bit_length() - 1
        _write_chunks(out, placed, blobs, chunk_size)
    elif stat.S_ISDIR(node.mode):
        data = _directory_data(placed, layout)
    elif stat.S_ISLNK(node.mode):
        data = node.target
    elif stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
        raw = _encode_device(node.rdev)
    if data:
        form = LAYOUT_INLINE if placed.inline else LAYOUT_PLAIN
        raw = placed.blocks // BLOCK
        full = len(data) - placed.inline
        out[placed.blocks : placed.blocks + full] = data[:full]
        inline = at + INODE_SIZE + len(placed.xattrs)
        out[inline : inline + placed.inline] = data[full:]
    seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
    icount = (len(placed.xattrs) - 12) // 4 + 1 if placed.xattrs else 0
    EXTENDED_INODE.pack_into(
        out,
        at,
        1 | form << 1,
        icount,
        node.mode,
        0,
        placed.size,
        raw,
        placed.number,
        node.uid,
        node.gid,
        seconds,
        nanoseconds,
        placed.nlink,
    )
    out[at + INODE_SIZE : at + INODE_SIZE + len(placed.xattrs)] = placed.xattrs


def _write_chunks(out: bytearray, placed: _Placed, blobs: Sequence[BlobTable], chunk_size: int) -> None:
    node = placed.node
    if len(node.chunks) != -(-node.size // chunk_size):
        raise InvalidArgument(f"a file of {node.size} bytes has {len(node.chunks)} chunks")
    at = _align(placed.at + INODE_SIZE + len(placed.xattrs), 8)
    for reference in node.chunks:
        blob, chunk = reference >> 32, reference & 0xFFFFFFFF
        block = blobs[blob].chunks[chunk].uncompressed_offset // BLOCK
        INDEX.pack_into(out, at, chunk & 0xFFFF, blob + 1, chunk >> 16, block)
        at += INDEX.size


def _encode_device(rdev: int) -> int:
    """Linux new_encode_dev of an os.makedev number."""
    major, minor = rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
