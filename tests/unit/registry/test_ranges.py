"""Reading part of a blob from a registry that may do anything."""

import os

import pytest

from snapshotter.digest import Digest
from snapshotter.errors import DigestMismatch, IntegrityError, InvalidArgument, RegistryUnavailable
from snapshotter.registry import ranges
from snapshotter.registry.reference import Reference
from tests.harness import sim_registry as faults
from tests.harness.sim_registry import FakeClock, SimRegistry
from tests.unit.registry.conftest import Clients

CONTENT = os.urandom(300_000)
SIZE = len(CONTENT)


@pytest.fixture
def blob(sim: SimRegistry) -> Digest:
    return Digest.parse(sim.add_blob(CONTENT))


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (0, SIZE), (SIZE - 1, 1), (4096, 200_000), (17, 0), (SIZE, 0)])
async def test_a_range_is_exactly_what_was_asked(
    clients: Clients, image: Reference, blob: Digest, offset: int, length: int
) -> None:
    client = await clients.make()
    assert await client.read_range(image, blob, offset, length, SIZE) == CONTENT[offset : offset + length]


async def test_a_whole_blob_is_asked_for_without_range(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make()
    await client.read_range(image, blob, 0, SIZE, SIZE)
    await client.read_range(image, blob, 0, SIZE - 1, SIZE)
    assert [seen.headers.get("Range") for seen in sim.seen] == [None, f"bytes=0-{SIZE - 2}"]
    assert {seen.headers["Accept-Encoding"] for seen in sim.seen} == {"identity"}
    assert sim.seen[0].headers["User-Agent"].startswith("coco-snapshotter/")


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, SIZE + 1), (SIZE, 1), (5, -1)])
async def test_a_range_outside_the_blob_is_a_mistake(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, offset: int, length: int
) -> None:
    client = await clients.make()
    with pytest.raises(InvalidArgument):
        await client.read_range(image, blob, offset, length, SIZE)
    assert sim.seen == []


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (f"bytes 100-199/{SIZE + 1}", DigestMismatch),  # another blob
        (f"bytes 0-99/{SIZE}", IntegrityError),
        (f"bytes 100-198/{SIZE}", IntegrityError),
        (f"bytes 101-200/{SIZE}", IntegrityError),
        ("bytes 100-199/*", IntegrityError),
        (f"bytes 199-100/{SIZE}", IntegrityError),
        (f"bits 100-199/{SIZE}", IntegrityError),
        (f"bytes 100-199/{SIZE}, bytes 300-399/{SIZE}", IntegrityError),
        ("", IntegrityError),
    ],
)
async def test_a_wrong_content_range_is_refused_and_not_tried_again(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, value: str, error: type[Exception]
) -> None:
    client = await clients.make()
    sim.fail(faults.header("Content-Range", value), on="blobs")
    with pytest.raises(error):
        await client.read_range(image, blob, 100, 100, SIZE)
    assert len(sim.seen) == 1


async def test_a_blob_of_another_size_is_refused(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make()
    with pytest.raises(DigestMismatch, match=f"expected size {SIZE + 10}"):
        await client.read_range(image, blob, 100, 100, SIZE + 10)
    with pytest.raises(DigestMismatch):  # 416
        await client.read_range(image, blob, SIZE, 10, SIZE + 10)
    with pytest.raises(DigestMismatch):  # 200
        await client.read_range(image, blob, 0, SIZE + 10, SIZE + 10)
    assert len(sim.seen) == 3


async def test_the_body_of_416_is_not_waited_for(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    """docker-registry 2.8 announces the blob's length and sends an error document."""
    sim.fail(faults.body_short(416, announced=SIZE, sent=33), on="blobs")
    client = await clients.make()
    with pytest.raises(DigestMismatch):
        await client.read_range(image, blob, 100, 100, SIZE)


async def test_an_ignored_range_near_the_start_is_served_by_discarding(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make()
    sim.fail(faults.ignores_range(), on="blobs", times=2)
    assert await client.read_range(image, blob, 100_000, 50_000, SIZE) == CONTENT[100_000:150_000]
    assert await client.read_range(image, blob, 0, 50, SIZE) == CONTENT[:50]


async def test_an_ignored_range_far_inside_is_refused_and_remembered_for_a_while(
    sim: SimRegistry, clients: Clients, image: Reference, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "MAX_DISCARD_BYTES", 1000)
    blob = Digest.parse(sim.add_blob(CONTENT))
    client = await clients.make()
    sim.fail(faults.ignores_range(), on="blobs")
    assert await client.read_range(image, blob, 1000, 10, SIZE) == CONTENT[1000:1010]
    for _ in range(3):
        with pytest.raises(RegistryUnavailable) as caught:
            await client.read_range(image, blob, 1001, 10, SIZE)
        assert caught.value.reason == "no-ranges"
    asked = len(sim.seen)
    clock.now += 61
    assert await client.read_range(image, blob, 1001, 10, SIZE) == CONTENT[1001:1011]
    assert len(sim.seen) == asked + 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("Content-Encoding", "gzip"), ("Content-Type", "multipart/byteranges; boundary=x")],
)
async def test_encoded_and_multipart_bodies_are_refused(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, name: str, value: str
) -> None:
    client = await clients.make()
    sim.fail(faults.header(name, value), on="blobs")
    with pytest.raises(IntegrityError, match=value.split(";")[0].split("/")[0]):
        await client.read_range(image, blob, 0, 100, SIZE)


@pytest.mark.parametrize("fault", [faults.cut(70_000), faults.stalls(70_000)], ids=["cut", "stall"])
async def test_a_broken_body_is_resumed_from_its_last_byte(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, fault: faults.Fault
) -> None:
    client = await clients.make(progress_timeout_seconds=0.2)
    sim.fail(fault, on="blobs")
    assert await client.read_range(image, blob, 1000, 200_000, SIZE) == CONTENT[1000:201_000]
    first, second = (seen.headers["Range"] for seen in sim.seen)
    assert first == "bytes=1000-200999"
    assert second == "bytes=71000-200999"


async def test_a_whole_read_that_breaks_goes_on_even_where_ranges_are_ignored(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make()
    sim.fail(faults.cut(250_000), on="blobs")
    sim.fail(faults.ignores_range(), on="blobs")
    assert await client.blob(image, blob, SIZE, SIZE) == CONTENT


async def test_an_endless_body_is_taken_as_far_as_it_was_asked_for(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make()
    sim.fail(faults.endless(206, Content_Range=f"bytes 10-99/{SIZE}"), on="blobs")
    assert await client.read_range(image, blob, 10, 90, SIZE) == bytes(90)
    assert await client.read_range(image, blob, 10, 90, SIZE) == CONTENT[10:100]


async def test_cut_connections_are_given_up_after_the_last_retry(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, clock: FakeClock
) -> None:
    client = await clients.make(retries=3)
    sim.fail(faults.cut(0), on="blobs", times=100)
    with pytest.raises(RegistryUnavailable):
        await client.read_range(image, blob, 0, 100, SIZE)
    assert len(sim.seen) == 4
    assert clock.slept == [0.2, 0.4, 0.8]


async def test_progress_does_not_outlive_the_deadline(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, clock: FakeClock
) -> None:
    """A registry that gives one byte per connection resets the retry count each time, not the time."""
    client = await clients.make(retries=1, total_timeout_seconds=2.0)
    sim.fail(faults.cut(1), on="blobs", times=10_000)
    with pytest.raises(RegistryUnavailable):
        await client.read_range(image, blob, 0, SIZE, SIZE)
    assert sum(clock.slept) < 2.0
    assert len(sim.seen) == 10


async def test_a_silent_registry_is_given_up(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make(progress_timeout_seconds=0.05, retries=1)
    sim.fail(faults.silent(), on="blobs", times=2)
    with pytest.raises(RegistryUnavailable, match="no answer in time"):
        await client.read_range(image, blob, 0, 100, SIZE)
    assert await client.read_range(image, blob, 0, 100, SIZE) == CONTENT[:100]
