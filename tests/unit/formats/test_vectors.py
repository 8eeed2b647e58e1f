"""The published vectors: what they say is what the package reads, and what it would write again."""

import base64
import copy
import hashlib
import json
import zlib
from typing import Any

import pytest

from snapshotter.crypto import chunk
from snapshotter.formats import blobmeta, sealed
from snapshotter.formats.rafs6 import Bootstrap
from tests.trees import LIMITS
from tests.vectors import make_formats


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(make_formats.PATH.read_bytes())
    return loaded


@pytest.fixture(scope="module")
def files(vectors: dict[str, Any]) -> dict[str, bytes]:
    found = {}
    for name, packed in vectors["files"].items():
        found[name] = zlib.decompress(base64.b64decode(packed["zlib"]))
        assert len(found[name]) == packed["size"]
        assert hashlib.sha256(found[name]).hexdigest() == packed["sha256"]
    return found


def test_the_same_input_gives_the_published_bytes(vectors: dict[str, Any]) -> None:
    again = json.loads(json.dumps(make_formats.make()))
    for made in (again, vectors := copy.deepcopy(vectors)):
        for packed in made["files"].values():
            del packed["zlib"]  # another zlib may pack otherwise; size and digest remain
    assert again == vectors


def test_the_published_bytes_are_read(vectors: dict[str, Any], files: dict[str, bytes]) -> None:
    found = Bootstrap.parse(files["image/image.boot"], LIMITS)
    tables, contents = [], {}
    for index, entry in enumerate(found.blobs):
        table = blobmeta.parse_file(files[f"image/{entry.blob_id}.blob.meta"], entry, LIMITS)
        digests, secrets = sealed.KeysFile.parse(
            files[f"image/{entry.blob_id}.keys"], entry.blob_id, entry.chunk_count, LIMITS
        )
        assert digests == found.digests(index, entry.chunk_count)
        stored = files[f"blob {index}"]
        assert hashlib.sha256(stored).hexdigest() == entry.blob_id
        for number, info in enumerate(table):
            contents[index, number] = chunk.decode(
                stored[info.compressed_offset : info.compressed_offset + info.compressed_size],
                digest=digests[32 * number : 32 * number + 32],
                size=info.uncompressed_size,
                codec=entry.compression_algo if info.flags & blobmeta.FLAG_COMPRESSED else 0,
                sealed_secret=secrets[32 * number : 32 * number + 32],
            )
        tables.append(table)
    found.validate(tables)
    read = {
        entry.path: b"".join(contents[blob, number] for blob, number in entry.chunks)
        for entry in found.walk()
        if entry.chunks
    }
    assert read[b"/hello"] == read[b"/sub/again"] == b"hello\n"
    assert read[b"/pieces"] == b"z" * 8192 + bytes(4096) + b"tail"
    assert read[b"/both"] == b"second\n" * 600
    assert len(found.prefetch) == 2


def test_the_published_identity_fits_the_published_config(vectors: dict[str, Any], files: dict[str, bytes]) -> None:
    identity = sealed.Identity.parse(files["image/identity.json"], LIMITS)
    assert identity.config_sha256 == sealed.config_sha256(vectors["public_config"])
    assert [blob.size for blob in identity.blobs] == [len(files["blob 0"]), len(files["blob 1"])]
