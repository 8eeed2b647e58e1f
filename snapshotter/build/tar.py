"""A streaming reader of the tar archives that OCI and Docker layers are made of.

POSIX ustar and PAX, GNU (long names, base-256 numbers, sparse files), star and v7 headers (POSIX.1-2024 pax; GNU tar
manual). The standard library's reader decodes extended attributes as text and allocates what a header asks for; this
one keeps bytes exact and every allocation bounded by `limits.tar_entry_header_bytes` and the piece size asked for.
Where unpackers differ it does what containerd's (Go's archive/tar) does: global PAX headers are ignored, only
SCHILY.xattr records become extended attributes, types that hold no data have no data.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from snapshotter.build import sparse
from snapshotter.build.sparse import BLOCK
from snapshotter.build.stream import ByteStream
from snapshotter.config import Limits
from snapshotter.errors import BadLayer, LimitExceeded

_ZEROS = bytes(BLOCK)
_XATTR = b"SCHILY.xattr."
_NO_NUL = (b"path", b"linkpath", b"GNU.sparse.name")
_MAX_ID = (1 << 32) - 2
_MAX_TIME_NS = (1 << 63) - 1
_MAX_SIZE = (1 << 63) - 1


class Kind(StrEnum):
    FILE = "0"
    LINK = "1"
    SYMLINK = "2"
    CHAR = "3"
    BLOCK = "4"
    DIRECTORY = "5"
    FIFO = "6"


_KINDS = {ord("\0"): Kind.FILE, ord("7"): Kind.FILE, ord("S"): Kind.FILE} | {ord(kind): kind for kind in Kind}


@dataclass(slots=True, kw_only=True)
class Entry:
    """One member as its headers state it; names are bytes as found, not yet cleaned."""

    kind: Kind
    name: bytes
    target: bytes  # of a link or symlink
    permissions: int  # 0 … 0o7777
    uid: int
    gid: int
    mtime_ns: int  # since the epoch; 0 when outside 1970 … 2262
    size: int  # of the file, holes included; 0 unless FILE
    device: tuple[int, int]  # major, minor
    xattrs: dict[bytes, bytes]
    extents: sparse.Map | None = None  # FILE: where its stored data belongs; None: everywhere
    stream: ByteStream = field(repr=False)
    left: int = field(default=0, repr=False)  # stored bytes not read yet

    def pieces(self, step: int) -> Iterator[bytes | int]:
        """The content in order, once: data in pieces of at most `step` bytes, a run of zeros as its length."""
        position = 0
        for offset, length in [(0, self.left)] if self.extents is None else self.extents:
            if offset > position:
                yield offset - position
            position = offset + length
            while length:
                taken = min(step, length)
                self.left -= taken
                yield self.stream.read(taken)
                length -= taken
        if self.size > position:
            yield self.size - position


class _Extended:
    """What the extension headers before an entry say about it, and how many header bytes it may still use."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.name: bytes | None = None
        self.target: bytes | None = None
        self.records: dict[bytes, bytes] = {}

    def spend(self, size: int) -> None:
        self.budget -= size
        if self.budget < 0:
            raise LimitExceeded("layer: headers of a tar entry larger than limits.tar_entry_header_bytes")


class TarReader:
    """Iterates over the entries of one archive. Data of an entry that was not read is skipped."""

    def __init__(self, stream: ByteStream, limits: Limits) -> None:
        self._stream = stream
        self._limits = limits

    def __iter__(self) -> Iterator[Entry]:
        """Raises BadLayer and LimitExceeded."""
        while (found := self._next()) is not None:
            entry, padding = found
            yield entry
            self._stream.skip(entry.left + padding)

    def _next(self) -> tuple[Entry, int] | None:
        extended = _Extended(int(self._limits.tar_entry_header_bytes))
        first = True
        while (header := self._header(first)) is not None:
            first = False
            extended.spend(BLOCK)
            match chr(header[156]):
                case "x":
                    extended.records = _records(self._payload(header, extended))
                case "L":
                    extended.name = _text(self._payload(header, extended))
                case "K":
                    extended.target = _text(self._payload(header, extended))
                case "g":  # ignored, and what is behind it begins anew, as in Go's reader
                    self._stream.skip(_padded(_size(header)))
                    first, extended = True, _Extended(extended.budget)
                case _:
                    return self._entry(header, extended)
        return None

    def _header(self, first: bool) -> bytes | None:
        """The next header block, None at the end of the archive (two zero blocks, or simply no more bytes)."""
        if self._stream.at_end():
            if first:
                return None
            raise BadLayer("layer: its tar archive ends behind an extension header")
        block = self._stream.read(BLOCK)
        if block == _ZEROS:
            if not first or (not self._stream.at_end() and self._stream.read(BLOCK) != _ZEROS):
                raise BadLayer("layer: a zero block inside its tar archive")
            return None
        if not _checksum_fits(block):
            raise BadLayer("layer: a tar header has a wrong checksum")
        return block

    def _payload(self, header: bytes, extended: _Extended) -> bytes:
        size = _size(header)
        extended.spend(_padded(size))
        data = self._stream.read(size)
        self._stream.skip(_padded(size) - size)
        return data

    def _entry(self, header: bytes, extended: _Extended) -> tuple[Entry, int]:
        records = extended.records
        kind = _KINDS.get(header[156])
        if kind is None:
            raise BadLayer(f"layer: tar entry of unknown type {chr(header[156])!r}")
        name = extended.name if extended.name is not None else records.get(b"path") or _header_name(header)
        target = extended.target if extended.target is not None else records.get(b"linkpath") or _text(header[157:257])
        if header[156] == 0 and name.endswith(b"/"):
            kind = Kind.DIRECTORY  # v7 has no type for directories
        entry = Entry(
            kind=kind,
            name=name,
            target=target,
            permissions=_number(header[100:108]) & 0o7777,
            uid=_owner(records.get(b"uid"), header[108:116]),
            gid=_owner(records.get(b"gid"), header[116:124]),
            mtime_ns=_mtime(records.get(b"mtime"), header[136:148]),
            size=0,
            device=_device(header) if kind in (Kind.CHAR, Kind.BLOCK) else (0, 0),
            xattrs={key[len(_XATTR) :]: value for key, value in records.items() if key.startswith(_XATTR)},
            stream=self._stream,
        )
        if kind is not Kind.FILE:
            return entry, 0
        stored = sparse.decimal(records[b"size"]) if b"size" in records else _size(header)
        if stored > _MAX_SIZE:
            raise BadLayer("layer: a tar entry claims an impossible size")
        padding = _padded(stored) - stored
        entry.left = entry.size = stored
        self._sparse(entry, header, extended)
        return entry, padding

    def _sparse(self, entry: Entry, header: bytes, extended: _Extended) -> None:
        """Give a sparse file its map and its real size."""
        records = extended.records

        def next_block() -> bytes:
            extended.spend(BLOCK)
            return self._stream.read(BLOCK)

        if header[156] == ord("S"):
            entry.extents, entry.size = sparse.old_gnu(header, _positive, next_block)
        elif records.get(b"GNU.sparse.major") == b"1":
            entry.extents, used = sparse.pax_1(next_block, min(extended.budget, entry.left))
            entry.left -= used
        elif b"GNU.sparse.map" in records:
            entry.extents = sparse.pax_0(records[b"GNU.sparse.map"])
        else:
            return
        entry.name = records.get(b"GNU.sparse.name") or entry.name
        for key in (b"GNU.sparse.realsize", b"GNU.sparse.size"):
            if key in records:
                entry.size = sparse.decimal(records[key])
        if entry.size > _MAX_SIZE:
            raise BadLayer("layer: a tar entry claims an impossible size")
        sparse.check(entry.extents, entry.left, entry.size)


def _padded(size: int) -> int:
    return size + -size % BLOCK


def _text(field_: bytes) -> bytes:
    return field_.partition(b"\0")[0]


def _number(field_: bytes) -> int:
    """Octal digits with spaces or NULs around them, or GNU's base-256 two's complement (first bit set)."""
    if field_[0] & 0x80:
        bits = len(field_) * 8 - 1
        value = int.from_bytes(field_, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if value >> (bits - 1) else value
    digits = field_.strip(b" \0").partition(b"\0")[0].rstrip(b" ")
    if not digits:
        return 0
    if not digits.isdigit() or digits.strip(b"01234567"):
        raise BadLayer(f"layer: bad number {digits[:30]!r} in a tar header")
    return int(digits, 8)


def _positive(field_: bytes) -> int:
    value = _number(field_)
    if not 0 <= value <= _MAX_SIZE:
        raise BadLayer("layer: a tar entry claims an impossible size")
    return value


def _size(header: bytes) -> int:
    return _positive(header[124:136])


def _owner(record: bytes | None, field_: bytes) -> int:
    value = sparse.decimal(record) if record else _number(field_)
    if not 0 <= value <= _MAX_ID:
        raise BadLayer(f"layer: a tar entry has the impossible owner {value}")
    return value


def _mtime(record: bytes | None, field_: bytes) -> int:
    """Nanoseconds. What a file system cannot hold, or is before 1970, becomes 0 as in containerd's unpacker."""
    if record:
        seconds, _, fraction = record.partition(b".")
        if seconds.startswith(b"-"):
            return 0
        if fraction and not fraction.isdigit():
            raise BadLayer("layer: bad time in a tar header")
        value = sparse.decimal(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    else:
        value = _number(field_) * 1_000_000_000
    return value if 0 <= value <= _MAX_TIME_NS else 0


def _device(header: bytes) -> tuple[int, int]:
    major, minor = _number(header[329:337]), _number(header[337:345])
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise BadLayer(f"layer: a tar entry is the impossible device {major}:{minor}")
    return major, minor


def _header_name(header: bytes) -> bytes:
    name = _text(header[:100])
    if header[257:263] != b"ustar\0":
        return name  # v7, or GNU, which keeps other things where ustar has its prefix
    prefix = _text(header[345:476] if header[508:512] == b"tar\0" else header[345:500])
    return prefix + b"/" + name if prefix else name


def _checksum_fits(block: bytes) -> bool:
    """Sum of all bytes with the field itself as spaces; old writers added signed bytes."""
    stated = _number(block[148:156])
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if stated == total:
        return True
    outside = block[:148] + block[156:]
    return stated == total - 256 * sum(byte > 127 for byte in outside)


def _records(data: bytes) -> dict[bytes, bytes]:
    """PAX records `length key=value newline`; an empty value takes a record back. Values may hold any byte."""
    records: dict[bytes, bytes] = {}
    offsets: list[bytes] = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 21)
        if space < 0:
            raise BadLayer("layer: malformed PAX header")
        end = at + sparse.decimal(data[at:space])
        if end > len(data) or end <= space + 1 or data[end - 1] != 0x0A:
            raise BadLayer("layer: malformed PAX header")
        key, separator, value = data[space + 1 : end - 1].partition(b"=")
        if not key or not separator or b"\0" in key or (b"\0" in value and key in _NO_NUL):
            raise BadLayer("layer: malformed PAX header")
        at = end
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            if (key == b"GNU.sparse.offset") != (len(offsets) % 2 == 0):
                raise BadLayer("layer: malformed sparse map")
            offsets.append(value)
        elif value or key.startswith(_XATTR):
            records[key] = value
        else:
            records.pop(key, None)
    if offsets:
        records[b"GNU.sparse.map"] = b",".join(offsets)
    return records
