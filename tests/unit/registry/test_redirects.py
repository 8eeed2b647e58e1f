"""Redirects of blob reads: where they may lead, what goes along, and how long they are used again."""

import asyncio

import pytest
from aiohttp import web
from yarl import URL

from snapshotter.digest import Digest
from snapshotter.errors import NotFound, RegistryDenied, RegistryUnavailable
from snapshotter.registry import redirects
from snapshotter.registry.reference import Reference
from tests.harness import sim_registry as faults
from tests.harness.sim_registry import FakeClock, SimRegistry
from tests.unit.registry.conftest import Clients

CONTENT = bytes(range(256)) * 64
SIZE = len(CONTENT)
SIGNATURE = "X-Amz-Signature=5ec7e7"


@pytest.fixture
async def cdn() -> SimRegistry:  # type: ignore[misc]
    async with SimRegistry() as store:
        store.add_blob(CONTENT)
        yield store


@pytest.fixture
def blob(sim: SimRegistry, cdn: SimRegistry) -> Digest:
    """A blob whose reads are redirected to another origin; each redirect has its own signature."""
    digest = sim.add_blob(CONTENT)
    sim.redirect = lambda digest: f"{cdn.origin}/cdn/{digest}?{SIGNATURE}{len(sim.seen)}"
    return Digest.parse(digest)


async def test_the_target_is_used_again_and_gets_no_authorization(
    sim: SimRegistry, cdn: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    sim.auth.scheme = "bearer"
    client = await clients.make()
    for offset in (0, 100, 200):
        assert await client.read_range(image, blob, offset, 50, SIZE) == CONTENT[offset : offset + 50]
    assert sim.kinds() == ["blobs", "token", "blobs"]
    assert [seen.authorization for seen in cdn.seen] == [None] * 3
    assert "Cookie" not in cdn.seen[0].headers


async def test_the_target_is_resolved_anew_after_a_while(
    sim: SimRegistry, cdn: SimRegistry, clients: Clients, image: Reference, blob: Digest, clock: FakeClock
) -> None:
    client = await clients.make()
    await client.read_range(image, blob, 0, 50, SIZE)
    clock.now += 301
    await client.read_range(image, blob, 0, 50, SIZE)
    assert len(sim.seen) == 2


@pytest.mark.parametrize("code", [400, 401, 403, 404])
async def test_a_refused_target_is_resolved_anew_once(
    sim: SimRegistry, cdn: SimRegistry, clients: Clients, image: Reference, blob: Digest, code: int
) -> None:
    client = await clients.make()
    await client.read_range(image, blob, 0, 50, SIZE)
    cdn.fail(faults.status(code), on="cdn")
    assert await client.read_range(image, blob, 50, 50, SIZE) == CONTENT[50:100]
    assert len(sim.seen) == 2
    assert len(cdn.seen) == 3


async def test_an_expired_target_is_resolved_anew_by_one_for_all(
    sim: SimRegistry, cdn: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make(connections=0)
    await client.read_range(image, blob, 0, 50, SIZE)
    expired = cdn.seen[0].path

    async def expires(request: web.Request, handler: faults.Handler) -> web.StreamResponse:
        return web.Response(status=403) if request.path_qs == expired else await handler(request)

    cdn.fail(expires, on="cdn", times=100)
    reads = await asyncio.gather(*(client.read_range(image, blob, offset, 50, SIZE) for offset in range(20)))
    assert reads == [CONTENT[offset : offset + 50] for offset in range(20)]
    assert len(sim.seen) == 2


async def test_when_the_one_fails_the_others_ask_themselves(
    sim: SimRegistry, cdn: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make(connections=0, retries=0)
    await client.read_range(image, blob, 0, 50, SIZE)
    cdn.fail(faults.status(403), on="cdn", times=5)
    sim.fail(faults.status(500), on="blobs")
    reads = [client.read_range(image, blob, offset, 50, SIZE) for offset in range(5)]
    results = await asyncio.gather(*reads, return_exceptions=True)
    assert [type(result) for result in results].count(bytes) == 4


async def test_a_target_that_always_refuses_is_given_up_without_showing_its_signature(
    sim: SimRegistry, cdn: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make()
    cdn.fail(faults.status(403), on="cdn", times=10)
    with pytest.raises(RegistryDenied) as caught:
        await client.read_range(image, blob, 0, 50, SIZE)
    assert "5ec7e7" not in f"{caught.value}{caught.value.__cause__!r}"
    assert len(cdn.seen) == 2


async def test_a_blob_missing_at_the_target_is_not_found(
    cdn: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    cdn.blobs.clear()
    client = await clients.make()
    with pytest.raises(NotFound):
        await client.read_range(image, blob, 0, 50, SIZE)


async def test_a_broken_target_shows_no_signature(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    sim.redirect = lambda _: f"http://127.0.0.1:1/x?{SIGNATURE}"
    client = await clients.make(retries=1)
    with pytest.raises(RegistryUnavailable) as caught:
        await client.read_range(image, blob, 0, 50, SIZE)
    assert "cannot connect" in str(caught.value)
    assert "5ec7e7" not in f"{caught.value}{caught.value.__cause__!r}"


async def test_a_target_that_fails_is_not_kept(
    sim: SimRegistry, cdn: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make(retries=1)
    sim.redirect = lambda _: "http://127.0.0.1:1/x"
    with pytest.raises(RegistryUnavailable):
        await client.read_range(image, blob, 0, 50, SIZE)
    sim.redirect = lambda digest: f"{cdn.origin}/cdn/{digest}"
    cdn.fail(faults.status(503), on="cdn")
    asked = len(sim.seen)
    assert await client.read_range(image, blob, 0, 50, SIZE) == CONTENT[:50]
    assert len(sim.seen) == asked + 2


async def test_a_cut_at_the_target_is_resumed_there(
    sim: SimRegistry, cdn: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    cdn.fail(faults.cut(1000), on="cdn")
    client = await clients.make()
    assert await client.blob(image, blob, SIZE, SIZE) == CONTENT
    assert len(sim.seen) == 1
    assert cdn.seen[1].headers["Range"] == f"bytes=1000-{SIZE - 1}"


async def test_a_ring_of_redirects_ends(sim: SimRegistry, clients: Clients, image: Reference, blob: Digest) -> None:
    sim.redirect = lambda digest: f"/v2/team/app/blobs/{digest}"
    client = await clients.make()
    with pytest.raises(RegistryUnavailable, match="too many redirects"):
        await client.read_range(image, blob, 0, 50, SIZE)
    assert len(sim.seen) == 11


async def test_an_upload_is_not_redirected(
    sim: SimRegistry, cdn: SimRegistry, clients: Clients, image: Reference
) -> None:
    sim.fail(faults.status(307, Location=f"{cdn.origin}/elsewhere"), on="manifests")
    client = await clients.make()
    with pytest.raises(RegistryUnavailable, match="redirect"):
        await client.put_manifest(image, b"{}", "application/json")
    assert cdn.seen == []


BASE = URL("https://registry.example/v2/a/blobs/x")


@pytest.mark.parametrize(
    "location",
    [
        None,
        "",
        "http://store.example/x",
        "ftp://store.example/x",
        "https://user:word@store.example/x",
        "https://user@store.example/x",
        "https://store.example/a b",
        "https://store.example/a\r\nX-Injected: 1",
        "https://store.example:99999/",
        "https://[::1",
        "https://x/" + "a" * 20_000,
        "https://ex\u00e4mple/",
        "https://xn--/",
        "javascript:alert(1)",
    ],
)
def test_a_redirect_to_an_unusable_place_is_refused(location: str | None) -> None:
    with pytest.raises(RegistryUnavailable):
        redirects.next_hop("blob", BASE, location)


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/other?a=%2Fb%3D#f", "https://registry.example/other?a=%2Fb%3D"),
        ("//store.example/x", "https://store.example/x"),
        ("https://store.example/%7Eme?sig=a%2Bb%2F", "https://store.example/%7Eme?sig=a%2Bb%2F"),
        ("?again", "https://registry.example/v2/a/blobs/x?again"),
    ],
)
def test_a_redirect_keeps_its_spelling(location: str, url: str) -> None:
    assert str(redirects.next_hop("blob", BASE, location)) == url


@pytest.mark.parametrize(
    ("query", "seconds"),
    [
        ("", 300),
        ("X-Amz-Expires=120", 100),
        ("X-Amz-Expires=86400", 300),
        ("X-Amz-Expires=-5", 300),
        ("X-Goog-Expires=60", 40),
        ("Expires=1700000100", 80),
        ("Expires=1600000000", 0),
        ("se=2023-11-14T22%3A14%3A20Z", 40),
        ("se=soon", 0),
    ],
)
def test_a_signature_limits_how_long_a_target_is_kept(query: str, seconds: float) -> None:
    assert redirects.lifetime_seconds(URL(f"https://s/x?{query}", encoded=True), 1_700_000_000.0) == seconds


def test_only_so_many_targets_are_kept() -> None:
    cache = redirects.RedirectCache()
    for index in range(1100):
        cache.put(index, BASE, 10.0)
    assert cache.get(0, 0.0) is None
    assert cache.get(1099, 0.0) == BASE
    assert cache.get(1099, 10.0) is None
