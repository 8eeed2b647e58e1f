"""RAFS v6 bootstrap writer: a tree of `Node`s and the tables of its blobs become one EROFS metadata image.

Deterministic: equal input gives equal bytes. Inodes are extended and keep nanosecond mtimes (Python recompiles every
module when they are lost). What it writes is read by the kernel (≥ 5.16) and, for plain images, by stock Nydus tools.

    superblocks, device slots | blob table | prefetch table | an empty block | inodes | data blocks | chunk table

The empty block keeps the root from getting inode number 0, which readdir hides.
"""

import stat
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from snapshotter.errors import InvalidArgument
from snapshotter.formats import erofs, rafs6
from snapshotter.formats.blobmeta import FLAG_COMPRESSED, FLAG_ENCRYPTED, ChunkTable
from snapshotter.formats.blobtable import ENTRY_SIZE, BlobEntry
from snapshotter.formats.erofs import BLOCK, align
from snapshotter.formats.rafs6_check import index_entries

_INODE = erofs.EXTENDED_INODE.size
_ROOT_NID = BLOCK // erofs.SLOT
_UNIFIED_ALIGNMENT = 512 << 10  # of device addresses in the flattened image
_GIGA = 1_000_000_000
_DOTS = (b".", b"..")


@dataclass(slots=True, eq=False)
class Node:
    """A file system object. The same node under several names is a hard link.

    `chunks`: for each chunk_size piece of a regular file, blob index << 32 | chunk index. `xattrs`: full names.
    `rdev` as os.makedev counts. `children` is None for everything but directories.
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
    """The bootstrap, a multiple of 4096 bytes. `flags`: of the extended superblock; HAS_XATTR is added where needed.

    Blobs that no chunk refers to are written too. Raises InvalidArgument for what the format cannot hold.
    """
    _check_blobs(blobs)
    blob_table = align(rafs6.DEVICES_OFFSET + erofs.DEVICE_SLOT.size * len(blobs), BLOCK)
    prefetch_table = blob_table + ENTRY_SIZE * len(blobs)
    meta = align(prefetch_table + 4 * len(prefetch), BLOCK)
    layout = _Layout(root, meta)
    chunk_table = layout.end
    records = _chunk_records(blobs)
    out = bytearray(align(chunk_table + len(records), BLOCK))
    out[chunk_table : chunk_table + len(records)] = records
    entries = [index_entries(index, blob.chunks) for index, blob in enumerate(blobs)]
    for number in range(len(layout.nodes)):
        _write_inode(out, number, layout, entries, chunk_size)
    _write_devices(out, blobs, blob_table)
    try:
        nids = [layout.nid(layout.numbers[id(node)]) for node in prefetch]
    except KeyError:
        raise InvalidArgument("a file to prefetch is not in the tree") from None
    struct.pack_into(f"<{len(nids)}I", out, prefetch_table, *nids)
    erofs.SUPERBLOCK.pack_into(
        out, erofs.SUPERBLOCK_OFFSET,
        erofs.MAGIC, 0, rafs6.COMPAT_RAFS6, erofs.BLOCK_BITS, 0, _ROOT_NID, len(layout.nodes), 0, 0,
        sum(blob.entry.uncompressed_size for blob in blobs) // BLOCK, meta // BLOCK, 0, bytes(16), bytes(16),
        rafs6.INCOMPAT, 0, len(blobs), rafs6.DEVICE_SLOT_OFFSET,
    )  # fmt: skip
    if any(node.xattrs for node in layout.nodes):
        flags |= rafs6.FLAG_HAS_XATTR
    rafs6.EXTENDED.pack_into(
        out, rafs6.EXTENDED_OFFSET,
        flags, blob_table, ENTRY_SIZE * len(blobs), chunk_size,
        chunk_table if records else 0, len(records), prefetch_table if nids else 0, 4 * len(nids), 0, b"",
    )  # fmt: skip
    return bytes(out)


def _check_blobs(blobs: Sequence[BlobTable]) -> None:
    if len(blobs) > rafs6.MAX_BLOBS:
        raise InvalidArgument(f"{len(blobs)} blobs; a bootstrap has room for {rafs6.MAX_BLOBS}")
    for index, blob in enumerate(blobs):
        count = len(blob.chunks)
        # Stock readers refuse a device without blocks.
        if not count or count != blob.entry.chunk_count or len(blob.digests) != 32 * count:
            raise InvalidArgument(f"blob {index}: no chunks, or tables of different lengths")
        if blob.entry.blob_index != index:
            raise InvalidArgument(f"blob {index}: says that it is blob {blob.entry.blob_index}")


def _write_devices(out: bytearray, blobs: Sequence[BlobTable], blob_table: int) -> None:
    position = len(out)
    for index, blob in enumerate(blobs):
        position = align(position, _UNIFIED_ALIGNMENT)
        blocks = blob.entry.uncompressed_size // BLOCK
        if position // BLOCK + blocks >= 1 << 32:
            raise InvalidArgument("all blobs together have more than 16 TiB of content")
        at = rafs6.DEVICES_OFFSET + erofs.DEVICE_SLOT.size * index
        erofs.DEVICE_SLOT.pack_into(out, at, blob.entry.blob_id.encode(), blocks, position // BLOCK, b"")
        at = blob_table + ENTRY_SIZE * index
        out[at : at + ENTRY_SIZE] = blob.entry.pack()
        position += blocks * BLOCK


def _chunk_records(blobs: Sequence[BlobTable]) -> bytes:
    """All chunks, sorted by digest, then blob. `file_offset` is 0: a chunk may stand in several files."""
    records = []
    for number, blob in enumerate(blobs):
        for index, info in enumerate(blob.chunks):
            flags = rafs6.RECORD_COMPRESSED if info.flags & FLAG_COMPRESSED else 0
            flags |= rafs6.RECORD_ENCRYPTED if info.flags & FLAG_ENCRYPTED else 0
            record = rafs6.RECORD.pack(
                blob.digests[32 * index : 32 * index + 32], number, flags,
                info.compressed_size, info.uncompressed_size, info.compressed_offset, info.uncompressed_offset,
                0, index, 0,
            )  # fmt: skip
            records.append(record)
    records.sort()  # a record begins with its digest and the one byte that a blob number needs
    return b"".join(records)


class _Layout:
    """Gives every node its place. Nodes are numbered as placed: a directory, its files, then each sub-directory."""

    def __init__(self, root: Node, meta: int) -> None:
        self.meta = meta
        self.nodes: list[Node] = []
        self.numbers: dict[int, int] = {}  # by id of the node
        self.parents = array("I")  # number of a directory's parent
        self.links = array("I")
        self.sizes = array("Q")  # i_size
        self.places = array("Q")  # of the inode, bytes
        self.blocks = array("Q")  # of data that does not follow the inode, bytes
        self._cursor = meta + _ROOT_NID * erofs.SLOT
        self._place_tree(root)
        self.end = self._place_blocks()

    def nid(self, number: int) -> int:
        return (self.places[number] - self.meta) // erofs.SLOT

    def inline_size(self, number: int) -> int:
        """Bytes of content right behind the inode. The kernel wants them in one block."""
        node = self.nodes[number]
        if not (stat.S_ISDIR(node.mode) or stat.S_ISLNK(node.mode)):
            return 0
        tail = self.sizes[number] % BLOCK
        return tail if _INODE + _xattr_size(node.xattrs) + tail <= BLOCK else 0

    def _place_tree(self, root: Node) -> None:
        todo = [(root, 0)]
        while todo:
            node, parent = todo.pop()
            if node.children is None or not stat.S_ISDIR(node.mode):
                raise InvalidArgument("a directory without children, or children of something else")
            names = sorted((*node.children, *_DOTS))
            _check_names(node.children)
            number = self._place(node, parent, _names_size(names))
            directories = []
            for name in names:
                child = node.children.get(name)
                if child is None:
                    continue
                if stat.S_ISDIR(child.mode):
                    directories.append((child, number))
                elif id(child) in self.numbers:
                    self.links[self.numbers[id(child)]] += 1
                else:
                    self._place(child, 0, _file_size(child))
            self.links[number] = 2 + len(directories)
            todo += reversed(directories)

    def _place(self, node: Node, parent: int, size: int) -> int:
        number = len(self.nodes)
        if stat.S_IFMT(node.mode) not in erofs.FILE_TYPES or not 0 <= size < 1 << 63:
            raise InvalidArgument(f"a file of mode {node.mode:#o} and size {size} cannot be stored")
        if self.numbers.setdefault(id(node), number) != number:
            raise InvalidArgument("a directory has two names")
        self.nodes.append(node)
        self.parents.append(parent)
        self.links.append(1)
        self.sizes.append(size)
        self.blocks.append(0)
        head = _INODE + _xattr_size(node.xattrs)
        inline = self.inline_size(number)
        at = align(self._cursor, erofs.SLOT)
        # An inode, and what is read together with it, stays in one block: old kernels insist.
        if at % BLOCK + (head + inline if inline else _INODE) > BLOCK:
            at = align(at, BLOCK)
        self.places.append(at)
        self._cursor = at + head + inline
        if stat.S_ISREG(node.mode):
            self._cursor = align(at + head, erofs.INDEX_ENTRY.size) + erofs.INDEX_ENTRY.size * len(node.chunks)
        return number

    def _place_blocks(self) -> int:
        """Data blocks of directories and symlinks, behind all inodes; returns their end."""
        end = align(self._cursor, BLOCK)
        for number, node in enumerate(self.nodes):
            if (stat.S_ISDIR(node.mode) or stat.S_ISLNK(node.mode)) and (
                full := self.sizes[number] - self.inline_size(number)
            ):
                self.blocks[number] = end
                end = align(end + full, BLOCK)
        return end


def _check_names(names: Iterable[bytes]) -> None:
    for name in names:
        if not 0 < len(name) <= erofs.MAX_NAME or b"/" in name or b"\0" in name or name in _DOTS:
            raise InvalidArgument(f"file name {name[:40]!r} cannot be stored")


def _file_size(node: Node) -> int:
    if node.children is not None:
        raise InvalidArgument("children of something that is no directory")
    if stat.S_ISLNK(node.mode):
        if not node.target or b"\0" in node.target:
            raise InvalidArgument("a symlink without target or with NUL in it")
        return len(node.target)
    return node.size if stat.S_ISREG(node.mode) else 0


def _blocks_of_names(names: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Sorted names by directory block; an entry never straddles two."""
    start = used = 0
    for index, name in enumerate(names):
        need = erofs.DIRENT.size + len(name)
        if used + need > BLOCK:
            yield names[start:index]
            start, used = index, 0
        used += need
    yield names[start:]


def _names_size(names: Sequence[bytes]) -> int:
    size = 0
    for block in _blocks_of_names(names):
        size = align(size, BLOCK) + erofs.DIRENT.size * len(block) + sum(map(len, block))
    return size


def _directory(layout: _Layout, number: int) -> bytes:
    children = layout.nodes[number].children
    assert children is not None
    out = bytearray()
    for block in _blocks_of_names(sorted((*children, *_DOTS))):
        out += bytes(-len(out) % BLOCK)
        offset = erofs.DIRENT.size * len(block)
        for name in block:
            child = children.get(name)
            if child is None:
                kind, target = erofs.TYPE_DIRECTORY, number if name == b"." else layout.parents[number]
            else:
                kind, target = erofs.FILE_TYPES[stat.S_IFMT(child.mode)], layout.numbers[id(child)]
            out += erofs.DIRENT.pack(layout.nid(target), offset, kind, 0)
            offset += len(name)
        out += b"".join(block)
    return bytes(out)


def _xattr_size(xattrs: Mapping[bytes, bytes]) -> int:
    if not xattrs:
        return 0
    entries = ((erofs.split_xattr(name)[1], value) for name, value in xattrs.items())
    return erofs.XATTR_HEADER + sum(
        align(erofs.XATTR_ENTRY.size + len(rest) + len(value), 4) for rest, value in entries
    )


def _pack_xattrs(xattrs: Mapping[bytes, bytes]) -> bytes:
    if not xattrs:
        return b""
    out = bytearray(erofs.XATTR_HEADER)
    for name, value in sorted(xattrs.items()):
        index, rest = erofs.split_xattr(name)
        out += erofs.XATTR_ENTRY.pack(len(rest), index, len(value)) + rest + value
        out += bytes(-len(out) % 4)
    return bytes(out)


def _write_inode(
    out: bytearray, number: int, layout: _Layout, entries: "Sequence[array[int]]", chunk_size: int
) -> None:
    node, at = layout.nodes[number], layout.places[number]
    form, raw, data = erofs.LAYOUT_PLAIN, 0, b""
    if stat.S_ISREG(node.mode):
        form, raw = erofs.LAYOUT_CHUNK, erofs.CHUNK_INDEXES | (chunk_size // BLOCK).bit_length() - 1
    elif stat.S_ISDIR(node.mode):
        data = _directory(layout, number)
    elif stat.S_ISLNK(node.mode):
        data = node.target
    elif stat.S_ISCHR(node.mode) or stat.S_ISBLK(node.mode):
        raw = node.rdev
    try:
        xattrs = _pack_xattrs(node.xattrs)
        seconds, nanoseconds = divmod(node.mtime_ns, _GIGA)
        if data:
            inline = layout.inline_size(number)
            form, raw = erofs.LAYOUT_INLINE if inline else erofs.LAYOUT_PLAIN, layout.blocks[number] // BLOCK
            full = len(data) - inline
            out[layout.blocks[number] : layout.blocks[number] + full] = data[:full]
            behind = at + _INODE + len(xattrs)
            out[behind : behind + inline] = data[full:]
        icount = (len(xattrs) - erofs.XATTR_HEADER) // 4 + 1 if xattrs else 0
        erofs.EXTENDED_INODE.pack_into(
            out, at,
            form << 1 | 1, icount, node.mode, 0, layout.sizes[number], raw, number + 1, node.uid, node.gid,
            seconds, nanoseconds, layout.links[number],
        )  # fmt: skip
    except struct.error as error:
        raise InvalidArgument(f"a file's metadata does not fit into an inode: {error}") from None
    out[at + _INODE : at + _INODE + len(xattrs)] = xattrs
    if stat.S_ISREG(node.mode):
        _write_index(out, align(at + _INODE + len(xattrs), erofs.INDEX_ENTRY.size), node, entries, chunk_size)


def _write_index(out: bytearray, at: int, node: Node, entries: "Sequence[array[int]]", chunk_size: int) -> None:
    if len(node.chunks) != -(-node.size // chunk_size):
        raise InvalidArgument(f"a file of {node.size} bytes with {len(node.chunks)} chunks")
    try:
        index = [entries[chunk >> 32][chunk & 0xFFFFFFFF] for chunk in node.chunks]
    except IndexError:
        raise InvalidArgument("a file refers to a chunk that does not exist") from None
    struct.pack_into(f"<{len(index)}Q", out, at, *index)
