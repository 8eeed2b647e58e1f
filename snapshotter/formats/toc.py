"""What stock tools append to a data blob: sections, each with a tar header behind it, and a table of contents (TOC).

    chunks | header "image.blob" | CI | header "blob.meta" | … | TOC | header "rafs.blob.toc"        read from the end

Nothing here is authenticated, and nothing but locations is taken from it. Sealed blobs have no such tail.
"""

import hashlib
import struct
from collections.abc import Sequence
from hmac import compare_digest
from typing import NamedTuple, Self

import lz4.block

from snapshotter.config import Limits
from snapshotter.errors import LimitExceeded, MalformedImage
from snapshotter.formats.blobmeta import unzstd
from snapshotter.formats.blobtable import TAR_HEADER_SIZE

TAIL_SIZE = 4096  # enough for every TOC
TOC, CHUNKS, BOOTSTRAP, META, DIGESTS = "rafs.blob.toc", "image.blob", "image.boot", "blob.meta", "blob.digest"

_ENTRY = struct.Struct("<II16s32sQQQ48x")  # the last bytes of real entries are not zero
_NONE, _ZSTD, _LZ4 = 1, 2, 4  # numbered unlike everywhere else


class Section(NamedTuple):
    """A part of a blob. `digest` is the SHA-256 of its uncompressed bytes, empty where no TOC states one."""

    name: str
    offset: int
    size: int  # as stored
    uncompressed_size: int
    compressor: int
    digest: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """One 128-byte TOC entry."""
        compressor, _, name, digest, offset, size, uncompressed_size = _ENTRY.unpack(raw)
        text = name.rstrip(b"\0").decode("ascii", "backslashreplace")
        return cls(text, offset, size, uncompressed_size, compressor, digest)

    def content(self, stored: bytes, limits: Limits) -> bytes:
        """Its uncompressed bytes. Raises MalformedImage, LimitExceeded."""
        what = f"blob section {self.name!r}"
        if self.uncompressed_size > limits.bootstrap_unpacked_bytes:
            raise LimitExceeded(f"{what}: larger than limits.bootstrap_unpacked_bytes")
        if len(stored) != self.size:
            raise MalformedImage(f"{what}: {len(stored)} bytes instead of {self.size}")
        if self.compressor == _NONE:
            out = stored
        elif self.compressor == _ZSTD:
            out = unzstd(stored, self.uncompressed_size, what)
        elif self.compressor == _LZ4:
            try:
                out = lz4.block.decompress(stored, uncompressed_size=self.uncompressed_size)
            except (lz4.block.LZ4BlockError, ValueError):
                raise MalformedImage(f"{what}: not a valid lz4 block of its size") from None
        else:
            raise MalformedImage(f"{what}: unsupported: compression {self.compressor}")
        if len(out) != self.uncompressed_size:
            raise MalformedImage(f"{what}: decompresses to another size")
        if self.digest and not compare_digest(hashlib.sha256(out).digest(), self.digest):
            raise MalformedImage(f"{what}: does not have its digest")
        return out


def tar_header(raw: bytes) -> tuple[str, int] | None:
    """(name, size) of the ustar header behind a section; None if these 512 bytes are none."""
    if len(raw) != TAR_HEADER_SIZE or raw[257:263] != b"ustar ":
        return None
    checksum, size = _octal(raw[148:156]), _octal(raw[124:136])
    if checksum is None or size is None or checksum != sum(raw[:148]) + 8 * 32 + sum(raw[156:]):
        return None
    return raw[:100].partition(b"\0")[0].decode("ascii", "backslashreplace"), size


def sections(tail: bytes, blob_size: int) -> list[Section]:
    """What the TOC at a blob's end lists; without one, what precedes the last header. [] for a blob without framing.

    `tail`: the last min(TAIL_SIZE, blob_size) bytes. Raises MalformedImage.
    """
    if len(tail) != min(TAIL_SIZE, blob_size):
        raise MalformedImage(f"blob TOC: {len(tail)} bytes of tail")
    header = tar_header(tail[-TAR_HEADER_SIZE:])
    if header is None:
        return []
    name, size = header
    end = blob_size - TAR_HEADER_SIZE
    if size > end:
        raise MalformedImage(f"blob section {name!r}: is larger than the blob")
    if name != TOC:
        return [Section(name, end - size, size, size, _NONE, b"")]
    raw = tail[:-TAR_HEADER_SIZE][-size:] if size else b""
    if len(raw) != size or size % _ENTRY.size:
        raise MalformedImage(f"blob TOC: {size} bytes")
    listed = [Section.parse(raw[at : at + _ENTRY.size]) for at in range(0, size, _ENTRY.size)]
    # Real tools write nonsense for the chunks themselves; the chunk information says where they are.
    listed = [section for section in listed if section.name != CHUNKS]
    for section in listed:
        if section.offset + section.size > end:
            raise MalformedImage(f"blob TOC: {section.name!r} lies outside of the blob")
    return listed


def find(listed: Sequence[Section], name: str) -> Section | None:
    """The section with this name. Raises MalformedImage if there are several."""
    found = [section for section in listed if section.name == name]
    if len(found) > 1:
        raise MalformedImage(f"blob TOC: {name!r} comes twice")
    return found[0] if found else None


def toc_digest(tail: bytes) -> bytes:
    """What the bootstrap's blob table says of a TOC: SHA-256 of its entries and its tar header."""
    header = tar_header(tail[-TAR_HEADER_SIZE:])
    if header is None or header[0] != TOC or header[1] + TAR_HEADER_SIZE > len(tail):
        raise MalformedImage("blob TOC: is missing")
    return hashlib.sha256(tail[-TAR_HEADER_SIZE - header[1] :]).digest()


def _octal(field: bytes) -> int | None:
    text = field.strip(b"\0 ")
    if not text or text.strip(b"01234567"):
        return None
    return int(text, 8)
