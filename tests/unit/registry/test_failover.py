"""Mirrors: whatever one of them does, the next one or the registry itself serves, and a dead one is not waited for."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import trustme

from snapshotter.config import Limits, Registry
from snapshotter.digest import Digest
from snapshotter.errors import DigestMismatch, NotFound, RegistryDenied, RegistryUnavailable
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.reference import Reference
from tests.harness import sim_registry as faults
from tests.harness.machine import free_port
from tests.harness.sim_registry import FakeClock, SimRegistry, docker_config
from tests.unit.registry.conftest import Clients, until

CONTENT = b"content of a blob" * 1000
DIGEST = Digest.of(CONTENT)
MANIFEST = b'{"schemaVersion":2}'


@pytest.fixture
async def mirror() -> AsyncIterator[SimRegistry]:
    async with SimRegistry() as registry:
        yield registry


class Certs:
    """A certs.d in which `of(registry, …)` names mirrors."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def of(self, registry: str, *origins: str, more: str = "", server: str = "") -> None:
        folder = self.directory / registry
        folder.mkdir(exist_ok=True)
        hosts = "".join(f'[host."{origin}"]\n{more}\n' for origin in origins)
        (folder / "hosts.toml").write_text(f"{server}\n{hosts}")


@pytest.fixture
def certs(tmp_path: Path) -> Certs:
    (tmp_path / "certs.d").mkdir()
    return Certs(tmp_path / "certs.d")


@pytest.fixture
def both(sim: SimRegistry, mirror: SimRegistry, certs: Certs) -> None:
    """The registry and its mirror have the same image."""
    for registry in (sim, mirror):
        registry.add_blob(CONTENT)
        registry.add_manifest("team/app", "1", MANIFEST, "application/json")
    certs.of(sim.address, mirror.origin)


@pytest.mark.usefixtures("both")
async def test_a_mirror_that_works_is_the_only_one_asked(
    sim: SimRegistry, mirror: SimRegistry, clients: Clients, image: Reference, certs: Certs
) -> None:
    client = await clients.make(hosts_dir=str(certs.directory))
    assert await client.read_range(image, DIGEST, 5, 10, len(CONTENT)) == CONTENT[5:15]
    assert await client.blob(image, DIGEST, len(CONTENT), 1 << 20) == CONTENT
    assert await client.manifest(image) == (MANIFEST, "application/json", Digest.of(MANIFEST))
    assert sim.seen == []
    assert mirror.seen[0].path == f"/v2/team/app/blobs/{DIGEST}?ns={sim.address}"


@pytest.mark.usefixtures("both")
async def test_what_only_a_mirror_has_is_uploaded_to_the_registry(
    sim: SimRegistry, mirror: SimRegistry, clients: Clients, image: Reference, certs: Certs
) -> None:
    mirror.add_blob(b"only there")
    certs.of(sim.address, mirror.origin, more='capabilities = ["pull", "resolve"]')
    client = await clients.make(hosts_dir=str(certs.directory))

    async def content() -> AsyncIterator[bytes]:
        yield b"only there"

    mirror.seen.clear()
    assert await client.upload_blob(image, Digest.of(b"only there"), 10, content)
    assert not await client.upload_blob(image, Digest.of(b"only there"), 10, content)
    assert mirror.seen == []


FAULTS: dict[str, faults.Fault] = {
    "401": faults.status(401),
    "403": faults.status(403),
    "404": faults.status(404),
    "416": faults.status(416),
    "429": faults.status(429, Retry_After="600"),
    "500": faults.status(500),
    "503": faults.status(503),
    "cut": faults.cut(after=3),
    "stall": faults.stalls(after=3),
    "hangs up": faults.hangs_up(),
    "silent": faults.silent(),
    "other range": faults.header("Content-Range", "bytes 0-9/17000"),
    "other size": faults.header("Content-Range", "bytes 5-14/99"),
    "compressed": faults.header("Content-Encoding", "gzip"),
    "redirect to nowhere": faults.status(307, Location="http://127.0.0.1:1/x"),
    "bad redirect": faults.status(307, Location="ftp://h/x"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("both")
async def test_whatever_a_mirror_does_the_registry_serves_without_a_pause(
    sim: SimRegistry, mirror: SimRegistry, clients: Clients, image: Reference, certs: Certs, clock: FakeClock, name: str
) -> None:
    client = await clients.make(hosts_dir=str(certs.directory), progress_timeout_seconds=0.3)
    mirror.fail(FAULTS[name], on="blobs", times=50)
    assert await client.read_range(image, DIGEST, 5, 10, len(CONTENT)) == CONTENT[5:15]
    assert "blobs" in mirror.kinds()
    mirror.seen.clear()
    assert await client.read_range(image, DIGEST, 5, 10, len(CONTENT)) == CONTENT[5:15]
    assert "blobs" not in mirror.kinds()  # it is not asked for this again
    assert clock.slept == []
    assert len(sim.of("blobs")) == 2


async def test_a_mirror_without_ranges_is_no_reason_to_load_whole_blobs(
    sim: SimRegistry, mirror: SimRegistry, clients: Clients, image: Reference, certs: Certs
) -> None:
    content = CONTENT * 200
    digest = Digest.parse(sim.add_blob(content))
    mirror.add_blob(content)
    certs.of(sim.address, mirror.origin)
    client = await clients.make(hosts_dir=str(certs.directory))
    mirror.fail(faults.ignores_range(), on="blobs", times=9)
    assert await client.read_range(image, digest, 5, 10, len(content)) == content[5:15]
    assert sim.seen == [], "little is thrown away"
    assert await client.read_range(image, digest, 2 << 20, 10, len(content)) == content[2 << 20 : (2 << 20) + 10]
    assert len(sim.seen) == 1


@pytest.mark.usefixtures("both")
async def test_a_mirror_that_breaks_off_is_continued_at_the_byte_where_it_stopped(
    sim: SimRegistry, mirror: SimRegistry, clients: Clients, image: Reference, certs: Certs
) -> None:
    client = await clients.make(hosts_dir=str(certs.directory))
    mirror.fail(faults.cut(after=7000), on="blobs")
    assert await client.blob(image, DIGEST, len(CONTENT), 1 << 20) == CONTENT
    [asked] = sim.of("blobs")
    assert asked.headers["Range"].startswith("bytes=")
    assert asked.headers["Range"] != f"bytes=0-{len(CONTENT) - 1}"


@pytest.mark.allow_warnings
@pytest.mark.usefixtures("both")
async def test_a_document_that_a_mirror_falsifies_comes_from_the_registry(
    sim: SimRegistry, mirror: SimRegistry, clients: Clients, image: Reference, certs: Certs
) -> None:
    client = await clients.make(hosts_dir=str(certs.directory))
    mirror.fail(faults.flipped(0), on="blobs", times=9)
    mirror.fail(faults.flipped(0), on="manifests", times=9)
    assert await client.blob(image, DIGEST, len(CONTENT), 1 << 20) == CONTENT
    pinned = image.pinned(Digest.of(MANIFEST))
    assert (await client.manifest(pinned))[0] == MANIFEST
    sim.fail(faults.flipped(0), on="blobs", times=9)
    with pytest.raises(DigestMismatch):
        await client.blob(image, DIGEST, len(CONTENT), 1 << 20)


@pytest.mark.allow_warnings
@pytest.mark.usefixtures("both")
async def test_ranges_that_turn_out_wrong_are_asked_elsewhere(
    sim: SimRegistry, mirror: SimRegistry, image: Reference, certs: Certs
) -> None:
    mirror.fail(faults.flipped(0), on="blobs", times=9)
    async with RegistryClient(Registry(hosts_dir=str(certs.directory)), Limits()) as source:

        async def read() -> bytes:
            async with aclosing(source.stream_range(image, DIGEST, 0, 10, len(CONTENT))) as pieces:
                return b"".join([piece async for piece in pieces])

        assert await read() != CONTENT[:10]
        first, second = source.hosts(image, DIGEST)
        source.distrust(image, DIGEST, first)
        assert source.hosts(image, DIGEST) == [second, first]
        assert await read() == CONTENT[:10]
        assert len(mirror.seen) == len(sim.seen) == 1


@pytest.mark.usefixtures("both")
async def test_a_dead_mirror_is_asked_again_in_the_background_only(
    sim: SimRegistry, clients: Clients, image: Reference, certs: Certs, clock: FakeClock
) -> None:
    port = free_port()
    certs.of(sim.address, f"http://127.0.0.1:{port}")
    client = await clients.make(hosts_dir=str(certs.directory))

    async def read(offset: int) -> None:
        assert await client.read_range(image, DIGEST, offset, 10, len(CONTENT)) == CONTENT[offset : offset + 10]

    await read(0)
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[0])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n" + CONTENT[:10])
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", port):
        await read(1)  # it is back, but nobody knows
        assert asked == []
        clock.now += 61
        await read(2)
        await until(lambda: asked)
        assert asked == [f"GET /v2/?ns={sim.address} HTTP/1.1"]
        assert len(sim.of("blobs")) == 3


@pytest.mark.usefixtures("both")
async def test_the_registry_has_the_last_word_when_all_fail(
    sim: SimRegistry, mirror: SimRegistry, clients: Clients, image: Reference, certs: Certs, clock: FakeClock
) -> None:
    client = await clients.make(hosts_dir=str(certs.directory), retries=2)
    absent = Digest.of(b"absent")
    with pytest.raises(NotFound):
        await client.blob(image, absent, 10, 10)
    mirror.fail(faults.status(503), on="blobs", times=9)
    sim.fail(faults.status(403), on="blobs", times=1)
    with pytest.raises(RegistryDenied):
        await client.blob(image, DIGEST, len(CONTENT), 1 << 20)
    sim.fail(faults.status(503), on="blobs", times=2)
    assert await client.blob(image, DIGEST, len(CONTENT), 1 << 20) == CONTENT
    assert clock.slept


@pytest.mark.usefixtures("both")
async def test_only_hosts_that_may_say_what_a_tag_is_are_asked_for_it(
    sim: SimRegistry, mirror: SimRegistry, clients: Clients, image: Reference, certs: Certs
) -> None:
    certs.of(sim.address, mirror.origin, more='capabilities = ["pull"]')
    client = await clients.make(hosts_dir=str(certs.directory))
    await client.manifest(image)
    assert mirror.seen == []
    await client.manifest(image.pinned(Digest.of(MANIFEST)))
    await client.put_manifest(image, MANIFEST, "application/json")
    await client.upload_blob(image, Digest.of(b"new"), 3, _new)
    assert mirror.kinds() == ["manifests"]
    assert sim.blobs[Digest.of(b"new")] == b"new"


async def _new() -> AsyncIterator[bytes]:
    yield b"new"


@pytest.mark.usefixtures("both")
async def test_headers_and_passwords_go_to_their_own_host(
    sim: SimRegistry, mirror: SimRegistry, clients: Clients, image: Reference, certs: Certs, tmp_path: Path
) -> None:
    async with SimRegistry() as store:
        store.add_blob(CONTENT)
        certs.of(sim.address, mirror.origin, more='header = { "x-mirror" = "hunter2" }')
        login = tmp_path / "config.json"
        login.write_text(docker_config(sim.address, "user", "word"))
        for registry in (sim, mirror):
            registry.auth.scheme, registry.auth.username, registry.auth.password = "bearer", "user", "word"
        client = await clients.make(hosts_dir=str(certs.directory), docker_config=str(login))
        assert await client.blob(image, DIGEST, len(CONTENT), 1 << 20) == CONTENT  # the mirror got no password
        assert all(seen.authorization is None for seen in mirror.seen)
        assert all(seen.headers["X-Mirror"] == "hunter2" for seen in mirror.seen)
        assert not any("X-Mirror" in seen.headers for seen in sim.seen)
        login.write_text(docker_config(mirror.address, "user", "word"))
        mirror.redirect = lambda digest: f"{store.origin}/cdn/{digest}"
        client = await clients.make(hosts_dir=str(certs.directory), docker_config=str(login))
        assert await client.blob(image, DIGEST, len(CONTENT), 1 << 20) == CONTENT
        [seen] = store.seen
        assert "X-Mirror" not in seen.headers
        assert seen.authorization is None


def tls_server(authority: trustme.CA, *, client_authority: trustme.CA | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    if client_authority is not None:
        client_authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.mark.parametrize("way", ["ca", "skip_verify", "client", "http"])
async def test_tls_is_as_the_file_says(
    sim: SimRegistry, clients: Clients, image: Reference, certs: Certs, way: str
) -> None:
    authority, people = trustme.CA(), trustme.CA()
    folder = certs.directory / sim.address
    certs.of(sim.address)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued = people.issue_cert("me@example")
    issued.private_key_and_cert_chain_pem.write_to_path(str(folder / "me.pem"))
    context = tls_server(authority, client_authority=people if way == "client" else None)
    async with SimRegistry(tls=context) as secure:
        secure.add_blob(CONTENT)
        more = {
            "ca": 'ca = "ca.pem"',
            "skip_verify": "skip_verify = true",
            "client": 'ca = "ca.pem"\nclient = "me.pem"',
            "http": "skip_verify = true",
        }[way]
        origin = secure.origin.replace("https", "http") if way == "http" else secure.origin
        certs.of(sim.address, secure.origin)
        client = await clients.make(hosts_dir=str(certs.directory), retries=0)
        with pytest.raises((NotFound, RegistryUnavailable)):  # a certificate that nobody knows is not believed
            await client.blob(image, DIGEST, len(CONTENT), 1 << 20)
        assert secure.seen == []
        certs.of(sim.address, origin, more=more)
        client = await clients.make(hosts_dir=str(certs.directory), retries=0)
        assert await client.blob(image, DIGEST, len(CONTENT), 1 << 20) == CONTENT
        assert secure.kinds() == ["blobs"]
