"""The FUSE protocol as far as a flat, read-only directory needs it: structs and INIT negotiation. No I/O.

Source: include/uapi/linux/fuse.h. Everything is little-endian here, as on every machine this runs on; requests come
from the kernel, but a request shorter than its struct is still refused.
"""

import re
import struct
from enum import IntEnum
from typing import Final, NamedTuple

from snapshotter.errors import InvalidArgument

MAJOR, MINOR = 7, 45
ROOT_NODE = 1
PAGES = 256  # of 4 KiB in one request: 1 MiB, the kernel's fs.fuse.max_pages_limit
MAX_WRITE = 4096  # nobody writes; the kernel wants at least this
MIN_READ_BUFFER = 8192  # bytes a read of /dev/fuse must offer
MAX_BACKGROUND = 4096  # reads the kernel hands out before it holds back: a frozen registry must not use them up
MAX_READ_AHEAD = 1 << 30  # the kernel takes the smaller of this and its own

ASYNC_READ = 1 << 0
ASYNC_DIO = 1 << 15
PARALLEL_DIROPS = 1 << 18
NO_OPENDIR_SUPPORT = 1 << 24
MAX_PAGES = 1 << 22
INIT_EXT = 1 << 30
HAS_RESEND = 1 << 39

UNIQUE_RESEND = 1 << 63  # set in `unique` of a request that the kernel hands out again
NOTIFY_RESEND = 7
FOPEN_KEEP_CACHE = 1 << 1

S_IFDIR, S_IFREG = 0o040000, 0o100000


class Opcode(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


HEADER: Final = struct.Struct("<IIQQIIIHH")  # fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, extlen, pad
OUT_HEADER: Final = struct.Struct("<IiQ")  # fuse_out_header: len, error, unique
_INIT_IN = struct.Struct("<IIII")  # major, minor, max_readahead, flags; then flags2
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")  # last: max_stack_depth 0, no passthrough
_READ_IN = struct.Struct("<QQI")  # fh, offset, size; then fields of no interest
_FH = struct.Struct("<Q")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_ATTR_OUT = struct.Struct("<QII")
_OPEN_OUT = struct.Struct("<QII")
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")

_FOREVER = 1 << 30  # seconds: a node never changes, and its number is never used again


class Request(NamedTuple):
    """One request: the fixed header and the first bytes of what follows it."""

    length: int  # of the whole request
    opcode: int
    unique: int
    node: int
    body: bytes

    @classmethod
    def parse(cls, raw: bytes | memoryview) -> "Request":
        """Raises InvalidArgument if `raw` is shorter than a header or claims to be."""
        if len(raw) < HEADER.size:
            raise InvalidArgument(f"FUSE request of {len(raw)} bytes")
        length, opcode, unique, node, *_ = HEADER.unpack_from(raw)
        if length < HEADER.size:
            raise InvalidArgument(f"FUSE request says it has {length} bytes")
        return cls(length, opcode, unique, node, bytes(raw[HEADER.size : length]))


class Init(NamedTuple):
    """What the kernel offers."""

    major: int
    minor: int
    max_read_ahead: int
    flags: int  # both words

    @classmethod
    def parse(cls, body: bytes) -> "Init":
        if len(body) < _INIT_IN.size:
            raise InvalidArgument("FUSE INIT is too short")
        major, minor, read_ahead, flags = _INIT_IN.unpack_from(body)
        if flags & INIT_EXT and len(body) >= _INIT_IN.size + 4:
            flags |= int.from_bytes(body[_INIT_IN.size : _INIT_IN.size + 4], "little") << 32
        return cls(major, minor, read_ahead, flags)


def negotiate(offer: Init, *, async_dio: bool, resend: bool = True) -> tuple[int, bytes]:
    """Flags we use of those offered, and the INIT reply. Raises InvalidArgument for another protocol or before 7.31."""
    if offer.major != MAJOR or offer.minor < 31:
        raise InvalidArgument(f"FUSE protocol {offer.major}.{offer.minor} is not supported")
    wanted = ASYNC_READ | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT | NO_OPENDIR_SUPPORT
    wanted |= (ASYNC_DIO if async_dio else 0) | (HAS_RESEND if resend else 0)
    flags = offer.flags & wanted
    body = _INIT_OUT.pack(
        MAJOR, min(MINOR, offer.minor), min(MAX_READ_AHEAD, offer.max_read_ahead), flags & 0xFFFFFFFF,
        MAX_BACKGROUND, MAX_BACKGROUND // 4 * 3, MAX_WRITE, 1, PAGES, 0, flags >> 32,
    )  # fmt: skip
    return flags, body


def async_dio_is_safe(release: str) -> bool:
    """False on kernels with CVE-2026-23224 (EROFS frees a request that asynchronous direct I/O still uses)."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if not match:
        return False
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    return not ((6, 12, 0) <= version <= (6, 12, 71) or (6, 13, 0) <= version <= (6, 18, 10) or version == (6, 19, 0))


def read_in(body: bytes) -> tuple[int, int]:
    """(offset, size) of a READ."""
    if len(body) < _READ_IN.size:
        raise InvalidArgument("FUSE READ is too short")
    _, offset, size = _READ_IN.unpack_from(body)
    return offset, size


def handle_in(body: bytes) -> int:
    """File handle of a RELEASE."""
    if len(body) < _FH.size:
        raise InvalidArgument("FUSE RELEASE is too short")
    handle: int = _FH.unpack_from(body)[0]
    return handle


def name_in(body: bytes) -> bytes:
    """Name of a LOOKUP, without the NUL that ends it."""
    return body.partition(b"\0")[0]


def attributes(node: int, size: int) -> bytes:
    """struct fuse_attr of a device file, or of the directory for ROOT_NODE. Owned by root, never writable."""
    mode, links = (S_IFDIR | 0o500, 2) if node == ROOT_NODE else (S_IFREG | 0o400, 1)
    return _ATTR.pack(node, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)


def entry_out(node: int, size: int) -> bytes:
    return _ENTRY.pack(node, 0, _FOREVER, _FOREVER, 0, 0) + attributes(node, size)


def attr_out(node: int, size: int) -> bytes:
    return _ATTR_OUT.pack(_FOREVER, 0, 0) + attributes(node, size)


def open_out(handle: int) -> bytes:
    """The content of a node never changes, so the kernel may keep what it has cached of it."""
    return _OPEN_OUT.pack(handle, FOPEN_KEEP_CACHE, 0)


def statfs_out() -> bytes:
    return _STATFS_OUT.pack(1, 0, 0, 1, 0, 4096, 255, 4096, 0)


def reply(unique: int, size: int, error: int = 0) -> bytes:
    """The header of a reply whose body has `size` bytes; `error` is a positive errno."""
    return OUT_HEADER.pack(OUT_HEADER.size + size, -error, unique)


def notify_resend() -> bytes:
    """Asks the kernel (≥ 6.9) to hand out again every request that was read and not answered."""
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)
