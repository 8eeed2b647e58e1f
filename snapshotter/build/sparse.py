"""Sparse files in tar archives: GNU's old header and its PAX formats 0.0, 0.1 and 1.0 (GNU tar manual, "Storing Sparse
Files"). A map is a sequence of (offset, length) of the data that the archive holds; the rest of the file is zeros.
"""

from collections.abc import Callable, Iterable

from snapshotter.errors import BadLayer, LimitExceeded

BLOCK = 512
Map = list[tuple[int, int]]

_OLD_ENTRY = 24
_MAX_LINE = 32  # digits of one number of a 1.0 map and its newline


def decimal(text: bytes) -> int:
    """A number of a PAX record. Raises BadLayer for anything but 1 to 20 digits."""
    if not 1 <= len(text) <= 20 or not text.isdigit():
        raise BadLayer(f"layer: bad number {text[:30]!r} in a tar header")
    return int(text)


def old_gnu(header: bytes, number: Callable[[bytes], int], next_block: Callable[[], bytes]) -> tuple[Map, int]:
    """Map and real size from a header of type S; `next_block` reads one extension block."""
    extents: Map = []
    table, more = header[386:482], header[482]
    while True:
        for at in range(0, len(table), _OLD_ENTRY):
            if table[at] == 0:
                break
            extents.append((number(table[at : at + 12]), number(table[at + 12 : at + 24])))
        if not more:
            return extents, number(header[483:495])
        block = next_block()
        table, more = block[:504], block[504]


def pax_0(map_text: bytes) -> Map:
    """`offset,length,offset,length,…` as format 0.1 has it; 0.0's repeated records are joined to the same form."""
    numbers = [decimal(item) for item in map_text.split(b",")] if map_text else []
    if len(numbers) % 2:
        raise BadLayer("layer: sparse map with an odd number of values")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def pax_1(next_block: Callable[[], bytes], budget: int) -> tuple[Map, int]:
    """The map in front of the data of format 1.0, and the bytes it takes (whole blocks, at most `budget`)."""
    text, at, used = b"", 0, 0

    def number() -> int:
        nonlocal text, at, used
        while (end := text.find(b"\n", at)) < 0:
            if len(text) - at > _MAX_LINE:
                raise BadLayer("layer: bad number in a sparse map")
            if used + BLOCK > budget:
                raise LimitExceeded("layer: sparse map larger than limits.tar_entry_header_bytes")
            text, at, used = text[at:] + next_block(), 0, used + BLOCK
        value = decimal(text[at:end])
        at = end + 1
        return value

    count = number()
    return [(number(), number()) for _ in _checked_range(count, budget)], used


def _checked_range(count: int, budget: int) -> Iterable[int]:
    if count > budget // 4:  # an entry takes at least four bytes
        raise LimitExceeded("layer: sparse map larger than limits.tar_entry_header_bytes")
    return range(count)


def check(extents: Map, stored: int, size: int) -> None:
    """Ascending, inside the file, and exactly as much data as the archive holds."""
    position = total = 0
    for offset, length in extents:
        if offset < position or offset + length > size:
            raise BadLayer("layer: sparse map out of order or behind the end of its file")
        position = offset + length
        total += length
    if total != stored:
        raise BadLayer("layer: sparse map and stored size of a file disagree")
