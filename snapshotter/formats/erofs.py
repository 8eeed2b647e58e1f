"""EROFS on-disk structures as far as RAFS v6 uses them (kernel fs/erofs/erofs_fs.h). Little-endian throughout."""

import stat
import struct
from collections.abc import Mapping
from typing import Final

from snapshotter.errors import InvalidArgument

BLOCK: Final = 4096  # the only block size supported here
BLOCK_BITS: Final = 12
SLOT: Final = 32  # unit of inode numbers: an inode lies at meta_blkaddr * BLOCK + nid * SLOT
MAX_NAME: Final = 255

SUPERBLOCK_OFFSET: Final = 1024
MAGIC: Final = 0xE0F5E1E2
INCOMPAT_CHUNKED_FILE, INCOMPAT_DEVICE_TABLE = 4, 8
SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHH38x")
DEVICE_SLOT = struct.Struct("<64sII56s")

LAYOUT_PLAIN, LAYOUT_INLINE, LAYOUT_CHUNK = 0, 2, 4
COMPACT_INODE = struct.Struct("<HHHHIIIIHH4x")
EXTENDED_INODE = struct.Struct("<HHHHQIIIIqII16x")
CHUNK_INDEXES: Final = 0x20  # i_u of a chunk-based file: entries of 8 bytes with a device; bits 0..4 are a log2
INDEX_ENTRY = struct.Struct("<Q")

DIRENT = struct.Struct("<QHBB")
TYPE_FILE, TYPE_DIRECTORY, TYPE_CHAR, TYPE_BLOCK, TYPE_FIFO, TYPE_SOCKET, TYPE_SYMLINK = range(1, 8)
FILE_TYPES: Mapping[int, int] = {
    stat.S_IFREG: TYPE_FILE,
    stat.S_IFDIR: TYPE_DIRECTORY,
    stat.S_IFCHR: TYPE_CHAR,
    stat.S_IFBLK: TYPE_BLOCK,
    stat.S_IFIFO: TYPE_FIFO,
    stat.S_IFSOCK: TYPE_SOCKET,
    stat.S_IFLNK: TYPE_SYMLINK,
}

XATTR_HEADER: Final = 12  # bytes in front of the entries: name filter, count of shared ones, padding
XATTR_ENTRY = struct.Struct("<BBH")
XATTR_PREFIXES: Mapping[int, bytes] = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
XATTR_ACLS = frozenset((2, 3))  # whole names; the others need a suffix


def align(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def xattr_area(icount: int) -> int:
    """Bytes behind an inode whose i_xattr_icount is this."""
    return XATTR_HEADER + 4 * (icount - 1) if icount else 0


def split_xattr(name: bytes) -> tuple[int, bytes]:
    """(prefix number, rest) of a full name. Raises InvalidArgument for a name that EROFS cannot hold."""
    for index, prefix in XATTR_PREFIXES.items():
        if index in XATTR_ACLS:
            if name == prefix:
                return index, b""
        elif name.startswith(prefix) and 1 <= len(name) - len(prefix) <= MAX_NAME and b"\0" not in name:
            return index, name[len(prefix) :]
    raise InvalidArgument(f"extended attribute {name[:60]!r} cannot be stored")
