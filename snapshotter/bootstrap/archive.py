"""The bootstrap layer's archive: a small tar, plain or gzip, with a fixed set of member names.

Decompression and extraction are bounded; a member that is not a plain file, comes twice, or has a name of another kind
is refused. Reading a tar is the standard library's work.
"""

import io
import re
import tarfile
import zlib

from snapshotter.config import Limits
from snapshotter.errors import LimitExceeded, MalformedImage

_NAMES = re.compile(r"image/(image\.boot|identity\.json|config\.json|[0-9a-f]{64}\.(blob\.meta|keys))")
_STOCK_NAMES = re.compile(r"image/[A-Za-z0-9._-]{1,200}")
_STEP = 1 << 20


def gunzip(layer: bytes | bytearray | memoryview, limits: Limits) -> bytes:
    """All members of a gzip stream. Raises LimitExceeded above `bootstrap_unpacked_bytes`, MalformedImage if broken."""
    out = io.BytesIO()
    rest: bytes | memoryview = memoryview(layer)
    while rest:
        decoder = zlib.decompressobj(wbits=31)
        try:
            while not decoder.eof:
                room = limits.bootstrap_unpacked_bytes - out.tell()
                piece = decoder.decompress(rest, min(room + 1, _STEP))
                if len(piece) > room:
                    raise LimitExceeded("bootstrap layer: unpacks to more than limits.bootstrap_unpacked_bytes")
                if not piece and not decoder.unconsumed_tail and not decoder.eof:
                    raise MalformedImage("bootstrap layer: gzip stream is cut short")
                out.write(piece)
                rest = decoder.unconsumed_tail
        except zlib.error as error:
            raise MalformedImage("bootstrap layer: not a valid gzip stream") from error
        rest = decoder.unused_data
    return out.getvalue()


def members(tar: bytes, limits: Limits, *, sealed_names: bool) -> dict[str, bytes]:
    """Name → content. `sealed_names`: exactly the names of a sealed image; else what stock tools put there too."""
    names = _NAMES if sealed_names else _STOCK_NAMES
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
            for count, member in enumerate(archive):
                if count > limits.bootstrap_files:
                    raise LimitExceeded("bootstrap layer: more members than limits.bootstrap_files")
                name = member.name.removeprefix("./")
                if member.isdir() and name.rstrip("/") in ("image", ".", ""):
                    continue
                # A sparse member may claim terabytes of zeros that the archive does not hold.
                if not member.isreg() or member.issparse() or not names.fullmatch(name) or name in found:
                    raise MalformedImage(f"bootstrap layer: unexpected member {name[:100]!r}")
                content = archive.extractfile(member)
                data = content.read() if content else b""
                if len(data) != member.size:
                    raise MalformedImage(f"bootstrap layer: member {name!r} is cut short")
                found[name] = data
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        raise MalformedImage("bootstrap layer: not a valid tar archive") from error
    if "image/image.boot" not in found:
        raise MalformedImage("bootstrap layer: image/image.boot is missing")
    return found
