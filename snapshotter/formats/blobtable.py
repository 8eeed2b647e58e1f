"""The blob table of a RAFS v6 bootstrap: one 256-byte record per data blob, plain or sealed (docs/formats.md)."""

import struct
from dataclasses import dataclass
from typing import Self

from snapshotter.errors import MalformedImage

BLOCK = 4096
ENTRY_SIZE = 256
V1_SIZE, V2_SIZE = 16, 24  # of a chunk information record
FEATURE_ALIGNED, FEATURE_INLINED_FS_META, FEATURE_CHUNK_INFO_V2, FEATURE_ZRAN = 1, 2, 4, 8
FEATURE_SEPARATE, FEATURE_INLINED_CHUNK_DIGEST, FEATURE_TARFS, FEATURE_BATCH = 0x10, 0x20, 0x40, 0x80
FEATURE_ENCRYPTED = 0x100
FEATURE_HAS_TAR_HEADER, FEATURE_HAS_TOC, FEATURE_CAP_TAR_TOC = 0x1000_0000, 0x2000_0000, 0x4000_0000

CIPHER_NONE, CIPHER_SEALED = 0, 3
DIGESTER_BLAKE3, DIGESTER_SHA256 = 0, 1
SEALED_FEATURES = FEATURE_ALIGNED | FEATURE_CHUNK_INFO_V2 | FEATURE_ENCRYPTED
_SEALED_MARK = b"SEALED\0\0" + struct.pack("<I", 1) + bytes(24)
_UNSUPPORTED_FEATURES = {
    FEATURE_ZRAN: "zran",
    FEATURE_SEPARATE: "separate metadata blobs",
    FEATURE_TARFS: "tarfs",
    FEATURE_BATCH: "batched chunks",
}
ENTRY = struct.Struct("<64s6IQQIIQQQ32s32sQQI36s")


def record_size(features: int) -> int:
    return V2_SIZE if features & FEATURE_CHUNK_INFO_V2 else V1_SIZE


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """One 256-byte record of the blob table."""

    blob_id: str
    blob_index: int
    chunk_size: int
    chunk_count: int
    compression_algo: int
    digest_algo: int
    features: int
    compressed_size: int
    uncompressed_size: int
    toc_size: int = 0
    ci_compressor: int = 0
    ci_offset: int = 0
    ci_compressed_size: int = 0
    ci_uncompressed_size: int = 0
    toc_digest: bytes = bytes(32)
    meta_digest: bytes = bytes(32)
    meta_size: int = 0
    cipher_iv: int = 0
    cipher_algo: int = CIPHER_NONE

    @property
    def sealed(self) -> bool:
        return self.cipher_algo == CIPHER_SEALED

    def pack(self) -> bytes:
        fields = [getattr(self, name) for name in self.__slots__]
        return ENTRY.pack(self.blob_id.encode(), *fields[1:], _SEALED_MARK if self.sealed else bytes(36))

    @classmethod
    def parse(cls, raw: bytes | memoryview) -> Self:
        """Raises MalformedImage for a record that is neither a plain nor a sealed blob's."""
        name, *fields, reserved = ENTRY.unpack(raw)
        try:
            blob_id = name.rstrip(b"\0").decode("ascii")
        except UnicodeDecodeError:
            raise MalformedImage("blob table: blob id is not ASCII") from None
        entry = cls(blob_id, *fields)
        entry._check(reserved)
        return entry

    def _check(self, reserved: bytes) -> None:
        where = f"blob table entry {self.blob_index}"
        if len(self.blob_id) != 64 or self.blob_id.strip("0123456789abcdef"):
            raise MalformedImage(f"{where}: blob id {self.blob_id[:64]!r} is not a sha256")
        if self.cipher_algo == CIPHER_SEALED:
            if reserved != _SEALED_MARK or self.features != SEALED_FEATURES or any(self.meta_digest):
                raise MalformedImage(f"{where}: is not sealed format version 1")
            if self.meta_size or self.cipher_iv or self.toc_size or self.ci_compressor or self.ci_offset:
                raise MalformedImage(f"{where}: has a key slot, TOC or CI in a sealed blob")
            if self.digest_algo != DIGESTER_BLAKE3:
                raise MalformedImage(f"{where}: sealed chunks have BLAKE3 digests")
            if self.ci_compressed_size != self.ci_uncompressed_size:
                raise MalformedImage(f"{where}: CI sizes differ")
        elif self.cipher_algo != CIPHER_NONE or self.features & FEATURE_ENCRYPTED:
            raise MalformedImage(f"{where}: unsupported: cipher {self.cipher_algo}")
        for bit, name in _UNSUPPORTED_FEATURES.items():
            if self.features & bit:
                raise MalformedImage(f"{where}: unsupported: {name}")
        if self.features & 0xF800 or not self.features & FEATURE_ALIGNED:
            raise MalformedImage(f"{where}: unsupported features {self.features:#x}")
        if self.compression_algo not in (0, 1, 3) or self.digest_algo not in (0, 1):
            raise MalformedImage(f"{where}: unsupported codec or digest")
        if self.ci_uncompressed_size != self.chunk_count * record_size(self.features):
            raise MalformedImage(f"{where}: CI size does not fit its chunk count")
        if self.ci_compressed_size > self.ci_uncompressed_size:
            raise MalformedImage(f"{where}: CI grows when compressed")
        if not self.chunk_count or not self.uncompressed_size or self.uncompressed_size % BLOCK:
            raise MalformedImage(f"{where}: has no chunks or a device size that is not a multiple of 4096")
