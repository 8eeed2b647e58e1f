"""A layer's bytes as a plain, hashed stream: gzip (any number of members), zstd (any number of frames) or nothing.

The compression is told by its first bytes, not by the media type, as every unpacker does. Output is produced in bounded
steps, so a decompression bomb is only a long file.
"""

import hashlib
import zlib
from collections.abc import Iterator

import zstandard

from snapshotter.digest import Digest
from snapshotter.errors import BadLayer

STEP = 1 << 20  # bytes decompressed at once
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = tuple(bytes((low, 0x2A, 0x4D, 0x18)) for low in range(0x50, 0x60))
_ZSTD_WINDOW = 1 << 27


def decompressed(compressed: Iterator[bytes]) -> Iterator[bytes]:
    """Plain pieces of at most `STEP` bytes (those of an uncompressed layer as they come). Raises BadLayer."""
    head = b""
    for piece in compressed:
        head += piece
        if len(head) >= 4:
            break
    rest = _chain(head, compressed)
    if head.startswith(_GZIP):
        return _gunzip(rest)
    if head.startswith((_ZSTD, *_ZSTD_SKIPPABLE)):
        return _unzstd(rest)
    return rest


def _chain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from rest


def _gunzip(compressed: Iterator[bytes]) -> Iterator[bytes]:
    decoder = zlib.decompressobj(wbits=31)
    between = False  # after a member; zero padding may follow
    for piece in compressed:
        rest = piece
        while rest:
            if between:
                rest = rest.lstrip(b"\0")
                if not rest:
                    break
                decoder, between = zlib.decompressobj(wbits=31), False
            try:
                plain = decoder.decompress(rest, STEP)
            except zlib.error as error:
                raise BadLayer("layer: its gzip stream is damaged") from error
            if plain:
                yield plain
            between = decoder.eof
            rest = decoder.unused_data if between else decoder.unconsumed_tail
    while not between:
        plain = decoder.decompress(b"", STEP)
        if not plain:
            break
        yield plain
        between = decoder.eof
    if not between:
        raise BadLayer("layer: its gzip stream is cut short")


class _Readable:
    """An iterator as the file object that zstandard reads from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._buffer = b""

    def read(self, size: int) -> bytes:
        while not self._buffer:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._buffer = piece
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken


def _unzstd(compressed: Iterator[bytes]) -> Iterator[bytes]:
    decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    with decoder.stream_reader(_Readable(compressed), read_across_frames=True) as reader:  # type: ignore[arg-type]
        while True:
            try:
                plain = reader.read(STEP)
            except zstandard.ZstdError as error:
                raise BadLayer("layer: its zstd stream is damaged, or needs a window above 128 MiB") from error
            if not plain:
                return
            yield plain


class ByteStream:
    """Exact reads from an iterator of pieces; everything that passes is hashed."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._buffer = b""
        self._position = 0  # in the buffer
        self._sha256 = hashlib.sha256()
        self.total = 0  # bytes taken from the iterator

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises BadLayer at the end."""
        end = self._position + size
        if end <= len(self._buffer):
            piece = self._buffer[self._position : end]
            self._position = end
            return piece
        parts = [self._buffer[self._position :]]
        missing = size - len(parts[0])
        while missing:
            if not self._fill():
                raise BadLayer("layer: its tar archive is cut short")
            parts.append(self._buffer[:missing])
            self._position = len(parts[-1])
            missing -= self._position
        return b"".join(parts)

    def at_end(self) -> bool:
        return self._position == len(self._buffer) and not self._fill()

    def skip(self, size: int) -> None:
        """Raises BadLayer if fewer bytes are left."""
        while size:
            if self.at_end():
                raise BadLayer("layer: its tar archive is cut short")
            step = min(size, len(self._buffer) - self._position)
            self._position += step
            size -= step

    def finish(self) -> Digest:
        """Read what follows the archive, and say what everything hashes to: the layer's diff_id."""
        while self._fill():
            pass
        return Digest("sha256:" + self._sha256.hexdigest())

    def _fill(self) -> bool:
        """Replace the buffer with the next piece that is not empty."""
        self._buffer, self._position = b"", 0
        while not self._buffer:
            piece = next(self._pieces, None)
            if piece is None:
                return False
            self._buffer = piece
        self._sha256.update(self._buffer)
        self.total += len(self._buffer)
        return True
