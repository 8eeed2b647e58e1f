"""Tar archives for tests: honest ones, and headers that lie."""

import struct
from collections.abc import Iterator

BLOCK = 512


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def header(
    name: bytes,
    kind: bytes = b"0",
    size: int | bytes = 0,
    mode: int = 0o644,
    uid: int | bytes = 0,
    gid: int = 0,
    mtime: int | bytes = 0,
    target: bytes = b"",
    magic: bytes = b"ustar\x0000",
    device: tuple[int, int] = (0, 0),
    prefix: bytes = b"",
    signed_checksum: bool = False,
) -> bytes:
    """One header block. Numeric fields given as bytes are taken as they are."""

    def number(value: int | bytes, width: int) -> bytes:
        return value.ljust(width, b"\0") if isinstance(value, bytes) else octal(value, width)

    block = bytearray(BLOCK)
    struct.pack_into(
        "100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s",
        block,
        0,
        name,
        octal(mode, 8),
        number(uid, 8),
        octal(gid, 8),
        number(size, 12),
        number(mtime, 12),
        b" " * 8,
        kind,
        target,
        magic,
        b"",
        b"",
        octal(device[0], 8),
        octal(device[1], 8),
        prefix,
    )
    return seal(block, signed_checksum)


def seal(block: bytearray, signed: bool = False) -> bytes:
    """Fill in the checksum."""
    block[148:156] = b" " * 8
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: bytes, data: bytes = b"", **fields: object) -> bytes:
    return header(name, size=len(data), **fields) + pad(data)  # type: ignore[arg-type]


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def pax(records: dict[bytes, bytes] | list[tuple[bytes, bytes]], kind: bytes = b"x") -> bytes:
    items = records.items() if isinstance(records, dict) else records
    body = b"".join(record(key, value) for key, value in items)
    return header(b"pax", kind, len(body)) + pad(body)


END = bytes(2 * BLOCK)


def pieces(data: bytes, step: int = 1000) -> Iterator[bytes]:
    return iter([data[at : at + step] for at in range(0, len(data), step)])
