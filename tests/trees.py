"""Images in memory for tests of the formats: files cut into chunks, trees of nodes, and what a mount of them shows."""

import ctypes
import errno
import hashlib
import os
import stat
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lz4.block
import zstandard
from blake3 import blake3

from snapshotter.config import Limits
from snapshotter.formats import blobmeta, rafs6
from snapshotter.formats.blobmeta import ChunkInfo, ChunkTable
from snapshotter.formats.blobtable import CIPHER_SEALED, SEALED_FEATURES, BlobEntry
from snapshotter.formats.rafs6 import Bootstrap
from snapshotter.formats.rafs6_tree import TreeEntry
from snapshotter.formats.rafs6_write import BlobTable, Node, write_bootstrap

LIMITS = Limits()
NONE, LZ4, ZSTD = 0, 1, 3
_FLAGS = {
    NONE: rafs6.FLAG_COMPRESSION_NONE,
    LZ4: rafs6.FLAG_COMPRESSION_LZ4,
    ZSTD: rafs6.FLAG_COMPRESSION_ZSTD,
}


def directory(children: dict[bytes, Node] | None = None, **fields: Any) -> Node:
    return Node(**{"mode": stat.S_IFDIR | 0o755, **fields, "children": children or {}})


def symlink(target: bytes, **fields: Any) -> Node:
    return Node(stat.S_IFLNK | 0o777, target=target, **fields)


def compress(data: bytes, codec: int) -> bytes:
    if codec == ZSTD:
        packed = zstandard.compress(data, 3)
    else:
        packed = lz4.block.compress(data, store_size=False) if codec == LZ4 else data
    return packed if len(packed) < len(data) else data


def decompress(data: bytes, codec: int, size: int) -> bytes:
    if len(data) == size or codec == NONE:
        return data
    if codec == ZSTD:
        return zstandard.decompress(data, max_output_size=size)
    return bytes(lz4.block.decompress(data, uncompressed_size=size))


def digest(data: bytes, algorithm: int) -> bytes:
    return blake3(data).digest() if algorithm == 0 else hashlib.sha256(data).digest()


@dataclass
class Blob:
    """One data blob. Sealed ones have the sizes of sealed chunks but are not encrypted: formats cannot tell."""

    index: int = 0
    chunk_size: int = 4096
    codec: int = NONE
    sealed: bool = False
    stored: bytearray = field(default_factory=bytearray)
    device: bytearray = field(default_factory=bytearray)
    digests: bytearray = field(default_factory=bytearray)
    chunks: ChunkTable = field(default_factory=ChunkTable)
    _known: dict[bytes, int] = field(default_factory=dict)

    def file(self, data: bytes, **fields: Any) -> Node:
        """A regular file whose chunks go into this blob."""
        refs = array("Q", (self.add(data[at : at + self.chunk_size]) for at in range(0, len(data), self.chunk_size)))
        return Node(**{"mode": stat.S_IFREG | 0o644, **fields, "size": len(data), "chunks": refs})

    def add(self, data: bytes) -> int:
        """Reference of the chunk with this content."""
        if data not in self._known:
            packed = compress(data, self.codec)
            flags = blobmeta.FLAG_COMPRESSED if packed != data else 0
            if self.sealed:
                flags |= blobmeta.FLAG_ENCRYPTED
                packed += bytes(28)
            self._known[data] = len(self.chunks)
            self.chunks.append(ChunkInfo(len(self.device), len(data), len(self.stored), len(packed), flags))
            self.stored += packed
            self.digests += blake3(data).digest()
            self.device += data + bytes(-len(data) % 4096)
        return self.index << 32 | self._known[data]

    def finish(self) -> tuple[BlobTable, bytes]:
        """The table and the stored blob: sealed chunks alone, plain ones with their chunk information behind."""
        entry = self._entry("", len(self.stored))
        records = b"" if self.sealed else self.chunks.encode_v1()
        tail = b"" if self.sealed else records + blobmeta.pack_file(self.chunks, entry)[-blobmeta.HEADER_SIZE :]
        stored = bytes(self.stored) + tail
        entry = self._entry(hashlib.sha256(stored).hexdigest(), len(stored))
        return BlobTable(entry, self.chunks, bytes(self.digests)), stored

    def _entry(self, blob_id: str, size: int) -> BlobEntry:
        ci = len(self.chunks) * (24 if self.sealed else 16)
        return BlobEntry(
            blob_id=blob_id,
            blob_index=self.index,
            chunk_size=self.chunk_size,
            chunk_count=len(self.chunks),
            compression_algo=self.codec,
            digest_algo=0,
            features=SEALED_FEATURES if self.sealed else 0x4000_0001,
            compressed_size=size,
            uncompressed_size=len(self.device),
            ci_offset=0 if self.sealed else len(self.stored),
            ci_compressed_size=ci,
            ci_uncompressed_size=ci,
            cipher_algo=CIPHER_SEALED if self.sealed else 0,
        )


def flags_of(blob: Blob) -> int:
    kind = rafs6.FLAG_SEALED if blob.sealed else rafs6.FLAG_ENCRYPTION_NONE
    return kind | _FLAGS[blob.codec] | rafs6.FLAG_HASH_BLAKE3 | rafs6.FLAG_EXPLICIT_UID_GID


def write(root: Node, *blobs: Blob, prefetch: Sequence[Node] = ()) -> bytes:
    first = blobs[0] if blobs else Blob()
    tables = [blob.finish()[0] for blob in blobs]
    return write_bootstrap(root, tables, chunk_size=first.chunk_size, flags=flags_of(first), prefetch=prefetch)


def read(bootstrap: bytes, *blobs: Blob, limits: Limits = LIMITS) -> Bootstrap:
    """Parsed and validated."""
    found = Bootstrap.parse(bootstrap, limits)
    found.validate([blob.chunks for blob in blobs])
    return found


# what a tree looks like, however it was obtained


def listing(entries: Iterator[TreeEntry], chunk: "Any") -> dict[bytes, dict[str, Any]]:
    """By path; `chunk(blob, index)` gives the content of a chunk. Link groups are named by their first path."""
    found: dict[bytes, dict[str, Any]] = {}
    groups: dict[int, bytes] = {}
    for entry in entries:
        one: dict[str, Any] = _common(entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.nlink, entry.xattrs)
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFREG:
            data = b"".join(chunk(blob, index) for blob, index in entry.chunks)
            assert len(data) == entry.size
            one["sha256"] = hashlib.sha256(data).hexdigest()
        elif kind == stat.S_IFLNK:
            one["target"] = entry.target
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            one["rdev"] = entry.rdev
        if kind != stat.S_IFDIR:
            one["group"] = groups.setdefault(entry.nid, entry.path)
        found[entry.path] = one
    return found


def mounted(top: Path) -> dict[bytes, dict[str, Any]]:
    """The same, as the kernel sees it."""
    found: dict[bytes, dict[str, Any]] = {}
    groups: dict[int, bytes] = {}
    todo = [b"/"]
    base = os.fsencode(top)
    while todo:
        path = todo.pop()
        real = base + path
        info = os.lstat(real)
        names = os.listxattr(real, follow_symlinks=False)
        attributes = {os.fsencode(name): os.getxattr(real, name, follow_symlinks=False) for name in names}
        one = _common(info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns, info.st_nlink, attributes)
        kind = stat.S_IFMT(info.st_mode)
        if kind == stat.S_IFREG:
            with open(real, "rb") as file:
                one["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        elif kind == stat.S_IFLNK:
            one["target"] = os.readlink(real)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            one["rdev"] = info.st_rdev
        if kind == stat.S_IFDIR:
            names = sorted(os.listdir(real), reverse=True)
            todo += [path.rstrip(b"/") + b"/" + name for name in names]
        else:
            one["group"] = groups.setdefault(info.st_ino, path)
        found[path] = one
    return found


def _common(mode: int, uid: int, gid: int, mtime_ns: int, nlink: int, xattrs: dict[bytes, bytes]) -> dict[str, Any]:
    return {"mode": mode, "uid": uid, "gid": gid, "mtime_ns": mtime_ns, "nlink": nlink, "xattrs": xattrs}


def nodes(root: Node, chunk: "Any") -> dict[bytes, dict[str, Any]]:
    """The same, from what was given to the writer. Paths in the order of `listing`."""
    found: dict[bytes, dict[str, Any]] = {}
    links: dict[int, int] = {}
    ordered: list[tuple[bytes, Node]] = []
    todo = [(b"/", root)]
    while todo:
        path, node = todo.pop()
        ordered.append((path, node))
        links[id(node)] = links.get(id(node), 0) + 1
        below = sorted((node.children or {}).items(), reverse=True)
        todo += [(path.rstrip(b"/") + b"/" + name, child) for name, child in below]
    groups: dict[int, bytes] = {}
    for path, node in ordered:
        children = node.children
        nlink = links[id(node)]
        if children is not None:
            nlink = 2 + sum(stat.S_ISDIR(child.mode) for child in children.values())
        one = _common(node.mode, node.uid, node.gid, node.mtime_ns, nlink, node.xattrs)
        kind = stat.S_IFMT(node.mode)
        if kind == stat.S_IFREG:
            data = b"".join(chunk(ref >> 32, ref & 0xFFFFFFFF) for ref in node.chunks)
            one["sha256"] = hashlib.sha256(data).hexdigest()
        elif kind == stat.S_IFLNK:
            one["target"] = node.target
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            one["rdev"] = node.rdev
        if kind != stat.S_IFDIR:
            one["group"] = groups.setdefault(id(node), path)
        found[path] = one
    return found


def device_chunk(*blobs: Blob) -> "Any":
    """Content of a chunk by its place in device space, which is what the kernel reads."""

    def chunk(blob: int, index: int) -> bytes:
        info = blobs[blob].chunks[index]
        return bytes(blobs[blob].device[info.uncompressed_offset : info.uncompressed_offset + info.uncompressed_size])

    return chunk


# the kernel

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def erofs_mount(work: Path, bootstrap: bytes, devices: Sequence[bytes]) -> Iterator[Path]:
    """A file-backed EROFS mount of the bootstrap with these device images. `work` must lie on a real file system."""
    target = work / "mnt"
    target.mkdir()
    (work / "boot").write_bytes(bootstrap)
    options = []
    for index, data in enumerate(devices):
        (work / f"d{index}").write_bytes(data)
        options.append(f"device={work}/d{index}")
    done = _libc.mount(os.fsencode(work / "boot"), os.fsencode(target), b"erofs", 1, ",".join(options).encode())
    if done:
        number = ctypes.get_errno()
        raise OSError(number, f"mount: {errno.errorcode.get(number)} {os.strerror(number)}")
    try:
        yield target
    finally:
        assert not _libc.umount2(os.fsencode(target), 0), os.strerror(ctypes.get_errno())
