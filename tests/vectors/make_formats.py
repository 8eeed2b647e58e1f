"""Writes formats.json beside it: a complete small sealed image, for readers in any language.

    python tests/vectors/make_formats.py

Nothing in it depends on a library's version: the one compressed chunk is a zstd frame made by hand.
"""

import base64
import hashlib
import json
import stat
import sys
import zlib
from array import array
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from blake3 import blake3

from snapshotter.crypto import chunk
from snapshotter.formats import blobmeta, rafs6, sealed
from snapshotter.formats.blobmeta import ChunkInfo, ChunkTable
from snapshotter.formats.blobtable import CIPHER_SEALED, CODEC_ZSTD, SEALED_FEATURES, BlobEntry
from snapshotter.formats.rafs6_write import BlobTable, Node, write_bootstrap

PATH = Path(__file__).with_name("formats.json")
SECRET = bytes(range(32))
CHUNK_SIZE = 4096
MTIME = 1_700_000_000_123_456_789
CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "config": {"Env": ["PATH=/bin", "NAME=ä"], "Cmd": ["/bin/sh"], "User": "0:0"},
    "rootfs": {"type": "layers", "diff_ids": []},
}
ZS = b"z" * CHUNK_SIZE
# Frame header: single segment, content size 4096 in two bytes (minus 256). One last RLE block of 4096 times "z".
ZS_FRAME = bytes.fromhex("28b52ffd 60 000f 038000 7a")


class Blob:
    """One sealed data blob."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.chunks = ChunkTable()
        self.stored = bytearray()
        self.keys: list[tuple[bytes, bytes]] = []

    def file(self, content: bytes, **fields: Any) -> Node:
        pieces = [content[at : at + CHUNK_SIZE] for at in range(0, len(content), CHUNK_SIZE)]
        node = Node(stat.S_IFREG | 0o644, size=len(content), mtime_ns=MTIME, chunks=array("Q", map(self.add, pieces)))
        for name, value in fields.items():
            setattr(node, name, value)
        return node

    def add(self, plain: bytes) -> int:
        digest = blake3(plain).digest()
        known = [index for index, (other, _) in enumerate(self.keys) if other == digest]
        if known:
            return self.index << 32 | known[0]
        packed, codec = (ZS_FRAME, CODEC_ZSTD) if plain == ZS else (plain, 0)
        secret = chunk.derive(SECRET, digest)
        stored = chunk.seal(secret, packed, len(plain), codec)
        flags = blobmeta.FLAG_ENCRYPTED | (blobmeta.FLAG_COMPRESSED if codec else 0)
        device = self.chunks.device_bytes
        self.chunks.append(ChunkInfo(device, len(plain), len(self.stored), len(stored), flags))
        self.stored += stored
        self.keys.append((digest, secret))
        return self.index << 32 | len(self.keys) - 1

    @property
    def hex(self) -> str:
        return hashlib.sha256(self.stored).hexdigest()

    def entry(self) -> BlobEntry:
        count = len(self.chunks)
        return BlobEntry(
            blob_id=self.hex,
            blob_index=self.index,
            chunk_size=CHUNK_SIZE,
            chunk_count=count,
            compression_algo=CODEC_ZSTD,
            digest_algo=0,
            features=SEALED_FEATURES,
            compressed_size=len(self.stored),
            uncompressed_size=self.chunks.device_bytes,
            ci_compressed_size=24 * count,
            ci_uncompressed_size=24 * count,
            cipher_algo=CIPHER_SEALED,
        )


def tree(blobs: list[Blob]) -> Node:
    """One of each kind of object."""
    first, second = blobs
    hello = first.file(b"hello\n")
    acl = bytes.fromhex("02000000 01000600ffffffff 04000400ffffffff 20000400ffffffff")
    names: dict[bytes, Node] = {
        b"hello": hello,
        b"-dash": second.file(b"sorts before the dots\n"),
        b"pieces": first.file(ZS * 2 + bytes(CHUNK_SIZE) + b"tail", uid=1000, gid=1001),
        b"both": second.file(b"second\n" * 600),
        b"empty": first.file(b""),
        b"attributes": second.file(b"a", xattrs={b"user.name": b"value", b"system.posix_acl_access": acl}),
        b"link": Node(stat.S_IFLNK | 0o777, target=b"hello", mtime_ns=-1),
        b"null": Node(stat.S_IFCHR | 0o666, rdev=0x103),
        b"fifo": Node(stat.S_IFIFO | 0o600),
        b"\xff": first.file(b"not UTF-8\n"),
        b"sub": Node(stat.S_IFDIR | 0o1777, children={b"again": hello}, mtime_ns=MTIME, xattrs={b"user.d": b""}),
        b"many": Node(stat.S_IFDIR | 0o755, children={b"%0200d" % i: Node(stat.S_IFREG) for i in range(25)}),
    }
    return Node(stat.S_IFDIR | 0o755, children=names, mtime_ns=MTIME)


def listing(bootstrap: bytes, blobs: list[Blob]) -> list[dict[str, Any]]:
    """What a reader must find. Names as hex, since they need not be UTF-8."""
    from snapshotter.config import Limits
    from snapshotter.formats.rafs6 import Bootstrap

    found = Bootstrap.parse(bootstrap, Limits())
    found.validate([blob.chunks for blob in blobs])
    return [
        {
            "path": entry.path.hex(),
            "nid": entry.nid,
            "mode": entry.mode,
            "uid": entry.uid,
            "gid": entry.gid,
            "size": 0 if stat.S_ISDIR(entry.mode) else entry.size,
            "mtime_ns": entry.mtime_ns,
            "nlink": entry.nlink,
            "rdev": entry.rdev,
            "target": entry.target.hex(),
            "xattrs": {name.decode(): value.hex() for name, value in sorted(entry.xattrs.items())},
            "chunks": [list(pair) for pair in entry.chunks],
        }
        for entry in found.walk()
    ]


def make() -> dict[str, Any]:
    blobs = [Blob(0), Blob(1)]
    root = tree(blobs)
    tables = [BlobTable(b.entry(), b.chunks, b"".join(digest for digest, _ in b.keys)) for b in blobs]
    flags = rafs6.FLAG_SEALED | rafs6.FLAG_COMPRESSION_ZSTD | rafs6.FLAG_HASH_BLAKE3 | rafs6.FLAG_EXPLICIT_UID_GID
    assert root.children is not None
    prefetch = [root.children[b"pieces"], root.children[b"hello"]]
    bootstrap = write_bootstrap(root, tables, chunk_size=CHUNK_SIZE, flags=flags, prefetch=prefetch)
    identity = sealed.Identity(
        version=1,
        blobs=tuple(sealed.IdentityBlob(digest=f"sha256:{b.hex}", size=len(b.stored)) for b in blobs),
        source="sha256:" + hashlib.sha256(b"source manifest").hexdigest(),
        config_sha256=sealed.config_sha256(CONFIG),
        domain="tenant",
        epoch="epoch-1",
        created="2026-01-02T03:04:05Z",
        repository="registry.example/team/app",
    )
    files = {"image/image.boot": bootstrap, "image/identity.json": identity.pack()}
    for b in blobs:
        files[f"image/{b.hex}.blob.meta"] = blobmeta.pack_file(b.chunks, b.entry())
        files[f"image/{b.hex}.keys"] = sealed.KeysFile.pack(b.hex, b.keys)
        files[f"blob {b.index}"] = bytes(b.stored)
    return {
        "about": "a sealed image, format version 1; see docs/formats.md. files: zlib, then base64",
        "convergence_secret": SECRET.hex(),
        "public_config": CONFIG,
        "files": {name: _packed(content) for name, content in files.items()},
        "tree": listing(bootstrap, blobs),
        "content": {
            f"{b.index}/{index}": {"size": info.uncompressed_size, "blake3": digest.hex(), "secret": secret.hex()}
            for b in blobs
            for index, (info, (digest, secret)) in enumerate(zip(b.chunks, b.keys, strict=True))
        },
    }


def _packed(content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"size": len(content), "sha256": digest, "zlib": base64.b64encode(zlib.compress(content, 9)).decode()}


if __name__ == "__main__":
    PATH.write_text(json.dumps(make(), indent=1) + "\n")
