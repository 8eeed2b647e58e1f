"""Secrets with a known look, planted in the image, and the search for them in all that must be ciphertext."""

import gzip
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lz4.block
import zstandard

from tests.harness.oci import member
from tests.harness.tiny import Member

FILE_SIZE = 1 << 20
_WINDOW = 48  # bytes of the file that count as a find; one window every _STEP
_STEP = 64 << 10
_DECODED_LIMIT = 1 << 28
_PIECE = 64 << 10
_GZIP, _ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Canaries:
    """One run's canaries: random, so that nothing of an earlier run can be found or missed."""

    content: bytes = field(default_factory=lambda: secrets.token_bytes(FILE_SIZE))
    file_name: str = field(default_factory=lambda: f"canary-name-{secrets.token_hex(16)}")
    symlink_target: str = field(default_factory=lambda: f"canary-target-{secrets.token_hex(16)}")
    xattr: str = field(default_factory=lambda: f"canary-xattr-{secrets.token_hex(16)}")
    env: str = field(default_factory=lambda: f"canary-env-{secrets.token_hex(16)}")

    def members(self) -> list[Member]:
        """The layer that holds them, below /opt/app."""
        return [
            (member("opt/"), b""),
            (member("opt/app/"), b""),
            (member(f"opt/app/{self.file_name}", xattrs={"user.canary": self.xattr}), self.content),
            (member("opt/app/link", link=self.symlink_target), b""),
        ]

    def needles(self) -> dict[str, list[bytes]]:
        """What to look for, by kind. Any of a kind's needles is a find."""
        windows = [self.content[at : at + _WINDOW] for at in range(_STEP // 2, FILE_SIZE, _STEP)]
        return {
            "1 MiB file": windows,
            "file name": [self.file_name.encode()],
            "symlink target": [self.symlink_target.encode()],
            "xattr": [self.xattr.encode()],
            "Env value": [self.env.encode()],
        }


class Scan:
    """Looks for canaries in bytes as they are, and in whatever gzip and zstd streams are found inside them."""

    def __init__(self, canaries: Canaries) -> None:
        self._needles = canaries.needles()
        self.found: dict[str, set[str]] = {kind: set() for kind in self._needles}  # kind → places
        self.places = 0
        self.size = 0
        self.chunks = 0
        self.decodable_chunks = 0

    def content(self, place: str, data: bytes) -> None:
        self.places += 1
        self.size += len(data)
        self._search(place, data)
        for decoded in _decoded(data):
            self._search(f"{place} (decompressed)", decoded)

    def _search(self, place: str, data: bytes) -> None:
        for kind, needles in self._needles.items():
            if any(needle in data for needle in needles):
                self.found[kind].add(place)

    def tree(self, label: str, top: Path) -> None:
        """Every regular file below `top`, names included, on the same file system: mounted images are not entered."""
        for path in _regular_files(top):
            name = f"{label}/{path.relative_to(top)}"
            self._search(f"name of {name}", os.fsencode(path))
            with suppress(FileNotFoundError):
                self.content(name, path.read_bytes())

    def chunk_files(self, top: Path) -> None:
        """Cached chunks: none may decode as zstd or lz4, as they are or behind a 12-byte nonce."""
        for path in _regular_files(top):
            data = path.read_bytes()
            self.chunks += 1
            self.decodable_chunks += _is_compressed(data) or _is_compressed(data[12:])

    @property
    def clean(self) -> bool:
        return not any(self.found.values()) and not self.decodable_chunks

    @property
    def finds_all(self) -> bool:
        return all(self.found.values())

    def report(self) -> str:
        hits = [f"{kind} in {_shorten(sorted(places)[0])}" for kind, places in self.found.items() if places]
        return "; ".join(hits) or "nothing"


def _shorten(place: str) -> str:
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1…", place)


def _regular_files(top: Path) -> Iterator[Path]:
    device = os.stat(top).st_dev
    for here, directories, files in os.walk(top):
        directories[:] = [name for name in directories if os.lstat(os.path.join(here, name)).st_dev == device]
        for name in files:
            path = Path(here, name)
            with suppress(FileNotFoundError):
                if stat.S_ISREG(path.lstat().st_mode):
                    yield path


def _decoded(data: bytes) -> Iterator[bytes]:
    """Everything that starts somewhere in `data` as a gzip or zstd stream and yields output."""
    for match in re.finditer(re.escape(_GZIP), data):
        yield _inflate(zlib.decompressobj(wbits=31), data, match.start())
    for match in re.finditer(re.escape(_ZSTD), data):
        yield _inflate(zstandard.ZstdDecompressor().decompressobj(), data, match.start())


def _inflate(decoder: Any, data: bytes, start: int) -> bytes:
    """What one stream holds, as far as it decodes. Fed in pieces: a decoder copies whatever follows its stream."""
    output = bytearray()
    with suppress(zlib.error, zstandard.ZstdError):
        for at in range(start, len(data), _PIECE):
            output += decoder.decompress(data[at : at + _PIECE])
            if decoder.eof or len(output) > _DECODED_LIMIT:
                break
    return bytes(output)


def _is_compressed(data: bytes) -> bool:
    with suppress(zstandard.ZstdError):
        return bool(zstandard.ZstdDecompressor().decompressobj().decompress(data))
    with suppress(lz4.block.LZ4BlockError, ValueError):
        return len(lz4.block.decompress(data, uncompressed_size=8 << 20)) > len(data)
    return False


def self_check() -> None:
    """The scan must find what is there: raw, gzipped, and in zstd."""
    canaries = Canaries()
    samples: Iterable[bytes] = (
        canaries.content,
        b"x" * 77 + gzip.compress(canaries.file_name.encode() * 3),
        b"y" * 5 + zstandard.compress(canaries.symlink_target.encode() + canaries.xattr.encode()),
        canaries.env.encode(),
    )
    scan = Scan(canaries)
    for number, sample in enumerate(samples):
        scan.content(f"sample {number}", sample)
    if not scan.finds_all:
        raise AssertionError(f"the canary scan is blind: {scan.found}")
