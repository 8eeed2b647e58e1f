"""The blob table of a RAFS v6 bootstrap: one 256-byte record per data blob, plain or sealed (docs/formats.md)."""

import struct
from dataclasses import dataclass
from typing import Self

from snapshotter.errors import MalformedImage
from snapshotter.formats.erofs import BLOCK

ENTRY_SIZE = 256
V1_SIZE, V2_SIZE = 16, 24  # of a chunk information record
TAR_HEADER_SIZE = 512
FEATURE_ALIGNED, FEATURE_INLINED_FS_META, FEATURE_CHUNK_INFO_V2, FEATURE_ZRAN = 1, 2, 4, 8
FEATURE_SEPARATE, FEATURE_INLINED_CHUNK_DIGEST, FEATURE_TARFS, FEATURE_BATCH = 0x10, 0x20, 0x40, 0x80
FEATURE_ENCRYPTED, FEATURE_EXTERNAL = 0x100, 0x800
FEATURE_HAS_TAR_HEADER, FEATURE_HAS_TOC, FEATURE_CAP_TAR_TOC = 0x1000_0000, 0x2000_0000, 0x4000_0000

CODEC_NONE, CODEC_LZ4, CODEC_GZIP, CODEC_ZSTD = 0, 1, 2, 3
CIPHER_NONE, CIPHER_SEALED = 0, 3
DIGESTER_BLAKE3, DIGESTER_SHA256 = 0, 1
SEALED_FEATURES = FEATURE_ALIGNED | FEATURE_CHUNK_INFO_V2 | FEATURE_ENCRYPTED
SEALED_OVERHEAD = 28  # bytes that sealing adds to a chunk: nonce and tag
UNNAMED = "x" * 64  # id of the blob that the bootstrap itself is inlined in

_SEALED_MARK = b"SEALED\0\0" + struct.pack("<I", 1) + bytes(24)
_UNSUPPORTED_FEATURES = {
    FEATURE_ZRAN: "zran",
    FEATURE_SEPARATE: "separate metadata blobs",
    FEATURE_TARFS: "tarfs",
    FEATURE_BATCH: "batched chunks",
    FEATURE_EXTERNAL: "external blobs",
}
_INCOMPATIBLE = 0xF000  # features nobody knows and that must not be ignored
_MAX_DEVICE = 1 << 44  # blocks have 32 bits
_RECORD = struct.Struct("<64s6IQQIIQQQ32s32sQQI36s")


def record_size(features: int) -> int:
    return V2_SIZE if features & FEATURE_CHUNK_INFO_V2 else V1_SIZE


@dataclass(frozen=True, slots=True)
class BlobEntry:
    """One 256-byte record of the blob table. Sizes in bytes; fields in the order of the record."""

    blob_id: str  # sha256 of the blob in lower-case hex; UNNAMED in the bootstrap of a single layer
    blob_index: int
    chunk_size: int
    chunk_count: int
    compression_algo: int
    digest_algo: int
    features: int
    compressed_size: int
    uncompressed_size: int  # of the device
    toc_size: int = 0
    ci_compressor: int = 0
    ci_offset: int = 0
    ci_compressed_size: int = 0
    ci_uncompressed_size: int = 0
    toc_digest: bytes = bytes(32)
    meta_digest: bytes = bytes(32)  # where stock encryption keeps its key
    meta_size: int = 0
    cipher_iv: int = 0
    cipher_algo: int = CIPHER_NONE

    @property
    def sealed(self) -> bool:
        return self.cipher_algo == CIPHER_SEALED

    @property
    def data_size(self) -> int:
        """Bytes at the start of the blob that hold chunks.

        compressed_size is that only in sealed and in old images; newer builders count the whole file there.
        """
        if self.sealed or not self.features & FEATURE_CAP_TAR_TOC or not self.ci_uncompressed_size:
            return self.compressed_size
        return self.ci_offset - (TAR_HEADER_SIZE if self.features & FEATURE_HAS_TAR_HEADER else 0)

    def pack(self) -> bytes:
        fields = [getattr(self, name) for name in self.__slots__]
        return _RECORD.pack(self.blob_id.encode(), *fields[1:], _SEALED_MARK if self.sealed else bytes(36))

    @classmethod
    def parse(cls, raw: bytes | memoryview) -> Self:
        """Raises MalformedImage for a record that is neither a plain nor a sealed blob's."""
        name, *fields, reserved = _RECORD.unpack(raw)
        blob_id = name.decode("ascii", "backslashreplace").rstrip("\0")
        entry = cls(blob_id, *fields)
        where = f"blob table entry {entry.blob_index}"
        entry._check_supported(where)
        if entry.sealed:
            entry._check_sealed(where, reserved)
        elif len(blob_id) != 64 or (blob_id.strip("0123456789abcdef") and blob_id != UNNAMED):
            raise MalformedImage(f"{where}: blob id {blob_id[:64]!r} is not a sha256")
        entry._check_sizes(where)
        return entry

    def _check_supported(self, where: str) -> None:
        for bit, name in _UNSUPPORTED_FEATURES.items():
            if self.features & bit:
                raise MalformedImage(f"{where}: unsupported: {name}")
        if self.cipher_algo not in (CIPHER_NONE, CIPHER_SEALED):
            raise MalformedImage(f"{where}: unsupported: cipher {self.cipher_algo}")
        if bool(self.features & FEATURE_ENCRYPTED) != self.sealed:
            raise MalformedImage(f"{where}: unsupported: encryption without authentication")
        if self.features & _INCOMPATIBLE or not self.features & FEATURE_ALIGNED:
            raise MalformedImage(f"{where}: unsupported: features {self.features:#x}")
        if self.compression_algo not in (CODEC_NONE, CODEC_LZ4, CODEC_ZSTD):
            raise MalformedImage(f"{where}: unsupported: compression {self.compression_algo}")
        if self.digest_algo not in (DIGESTER_BLAKE3, DIGESTER_SHA256):
            raise MalformedImage(f"{where}: unsupported: digest {self.digest_algo}")

    def _check_sealed(self, where: str, reserved: bytes) -> None:
        if reserved != _SEALED_MARK or self.features != SEALED_FEATURES:
            raise MalformedImage(f"{where}: is not sealed format version 1")
        if len(self.blob_id) != 64 or self.blob_id.strip("0123456789abcdef"):
            raise MalformedImage(f"{where}: blob id {self.blob_id[:64]!r} is not a sha256")
        if any(self.meta_digest) or self.meta_size or self.cipher_iv:
            raise MalformedImage(f"{where}: has a key in it")
        if any(self.toc_digest) or self.toc_size or self.ci_compressor or self.ci_offset:
            raise MalformedImage(f"{where}: says that its blob holds more than chunks")
        if self.digest_algo != DIGESTER_BLAKE3 or self.ci_compressed_size != self.ci_uncompressed_size:
            raise MalformedImage(f"{where}: wrong digest algorithm or chunk information size")

    def _check_sizes(self, where: str) -> None:
        if self.ci_uncompressed_size != self.chunk_count * record_size(self.features):
            raise MalformedImage(f"{where}: size of chunk information does not fit its {self.chunk_count} chunks")
        if self.ci_compressed_size > self.ci_uncompressed_size:
            raise MalformedImage(f"{where}: chunk information grows when compressed")
        if not self.chunk_count or not self.uncompressed_size or self.uncompressed_size % BLOCK:
            raise MalformedImage(f"{where}: has no chunks, or a device size that is not a multiple of {BLOCK}")
        if self.uncompressed_size >= _MAX_DEVICE:  # block 0xffffffff means a hole to the kernel
            raise MalformedImage(f"{where}: a device of {self.uncompressed_size} bytes is larger than addresses reach")
