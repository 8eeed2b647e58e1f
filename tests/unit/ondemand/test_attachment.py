"""The sealed memfd of an image: what goes in comes out, and nothing that is broken is believed."""

import fcntl
import os
import random
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotter.digest import Digest
from snapshotter.errors import InvalidArgument, MalformedImage
from snapshotter.formats.blobmeta import ChunkInfo, ChunkTable
from snapshotter.ondemand.attachment import Attachment, BlobDevice, pack

SEALS = 15


def blob(count: int, *, sealed: bool = True, gap: int = 0) -> BlobDevice:
    chunks, position, stored = ChunkTable(), 0, 0
    for number in range(count):
        size = 5000 + number
        chunks.append(ChunkInfo(position, size, stored, 100 + number, 9 if number % 2 else 8))
        position += -(-size // 4096) * 4096 + gap
        stored += 100 + number
    digests = b"".join(number.to_bytes(32, "big") for number in range(count))
    secrets = b"".join((number + 1).to_bytes(32, "little") for number in range(count)) if sealed else b""
    return BlobDevice(Digest.of(bytes(count)), stored, position, 3, 0, chunks, digests, secrets)


def packed(*blobs: BlobDevice, image_id: int = 7, bootstrap: bytes = b"boot" * 2000) -> int:
    return pack(
        image_id,
        repository="registry.example:5000/team/app",
        manifest=Digest.of(b"m"),
        bootstrap_digest=Digest.of(b"b"),
        bootstrap=bootstrap,
        blobs=blobs,
    )


@pytest.fixture
def attachment() -> Iterator[Attachment]:
    made = Attachment(packed(blob(300), blob(2, sealed=False), blob(0)))
    yield made
    made.close()


def test_everything_comes_back(attachment: Attachment) -> None:
    assert attachment.image_id == 7
    assert attachment.repository == "registry.example:5000/team/app"
    assert attachment.manifest == Digest.of(b"m")
    assert attachment.bootstrap_digest == Digest.of(b"b")
    assert bytes(attachment.bootstrap) == b"boot" * 2000
    assert [table.node for table in attachment.blobs] == [7 << 8 | 1, 7 << 8 | 2, 7 << 8 | 3]
    table, plain, empty = attachment.blobs
    source = blob(300)
    for number, info in enumerate(source.chunks):
        chunk = table.chunk(number)
        assert (chunk.offset, chunk.size) == (info.uncompressed_offset, info.uncompressed_size)
        assert (chunk.stored_offset, chunk.stored_size) == (info.compressed_offset, info.compressed_size)
        assert chunk.codec == (3 if number % 2 else 0)
        assert chunk.digest == number.to_bytes(32, "big")
        assert chunk.secret == (number + 1).to_bytes(32, "little")
        assert table.find(chunk.offset) == table.find(chunk.offset + 8191) == number
    assert plain.chunk(1).secret is None
    assert empty.find(0) == -1


def test_names_of_chunks_tell_stored_forms_apart(attachment: Attachment) -> None:
    names = {table.chunk(number).name for table in attachment.blobs for number in range(table.count)}
    assert len(names) == 302


def test_it_cannot_be_changed_any_more() -> None:
    fd = packed(blob(1))
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


def test_what_is_not_sealed_is_refused() -> None:
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.write(fd, bytes(4096))
    with pytest.raises(MalformedImage):
        Attachment(fd)
    os.close(fd)


def broken_tables() -> Iterator[BlobDevice]:
    good = blob(3)

    def with_chunks(*infos: ChunkInfo) -> BlobDevice:
        table = ChunkTable()
        for info in infos:
            table.append(info)
        return BlobDevice(good.digest, 1000, 16384, 3, 0, table, bytes(32 * len(infos)), b"")

    yield BlobDevice(good.digest, good.size, good.device_bytes, 3, 0, good.chunks, good.digests[1:], good.secrets)
    yield BlobDevice(good.digest, good.size, good.device_bytes, 3, 0, good.chunks, good.digests, b"short")
    yield BlobDevice(good.digest, good.size, good.device_bytes + 1, 3, 0, good.chunks, good.digests, good.secrets)
    yield with_chunks(ChunkInfo(0, 5000, 0, 10, 0), ChunkInfo(4096, 10, 10, 10, 0))
    yield with_chunks(ChunkInfo(4096, 10, 0, 10, 0), ChunkInfo(0, 10, 10, 10, 0))
    yield with_chunks(ChunkInfo(100, 10, 0, 10, 0))
    yield with_chunks(ChunkInfo(12288, 5000, 0, 10, 0))
    yield with_chunks(ChunkInfo(0, 10, 995, 10, 0))
    yield with_chunks(ChunkInfo(0, 10, 0, 10, 2))
    yield with_chunks(ChunkInfo(0, 10, 0, 10, 4))


@pytest.mark.parametrize("device", list(broken_tables()))
def test_tables_that_contradict_themselves_are_not_packed(device: BlobDevice) -> None:
    with pytest.raises(InvalidArgument):
        packed(device)


@pytest.mark.parametrize("image_id", [0, -1, 1 << 40])
def test_image_ids_are_bounded(image_id: int) -> None:
    with pytest.raises(InvalidArgument):
        packed(blob(1), image_id=image_id)


GOOD = packed(blob(20), blob(3, sealed=False), bootstrap=b"\0" * 64)
IMAGE = os.pread(GOOD, 1 << 20, 0)
os.close(GOOD)


def forged(content: bytes) -> int:
    fd = os.memfd_create("forged", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, 1033, SEALS)
    return fd


@settings(max_examples=400)
@given(st.integers(0, 2**32), st.integers(1, 8), st.sampled_from([None, 0, 1, 100, 300, 2000]))
def test_a_forged_memfd_is_refused_or_stays_within_its_bounds(seed: int, changes: int, length: int | None) -> None:
    rng = random.Random(seed)
    content = bytearray(IMAGE[:length])
    for _ in range(changes if content else 0):
        content[rng.randrange(min(len(content), 3000))] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
    fd = forged(bytes(content))
    try:
        attachment = Attachment(fd)
    except MalformedImage:
        os.close(fd)
        return
    try:
        for table in attachment.blobs:
            for offset in (0, 4096, table.device_bytes, 1 << 43):
                number = table.find(offset)
                assert -1 <= number < table.count
            for number in range(min(table.count, 50)):
                try:
                    chunk = table.chunk(number)
                except MalformedImage:
                    continue
                assert chunk.offset + chunk.size <= table.device_bytes
                assert chunk.stored_offset + chunk.stored_size <= table.size
    finally:
        attachment.close()


def test_array_of_offsets_is_32_bits_here() -> None:
    assert array("I").itemsize == 4
