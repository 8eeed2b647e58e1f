"""Manifests, whole blobs and uploads; which failures are tried again, and which are not."""

import asyncio
import base64
import logging
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from snapshotter import labels
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import (
    BadReference,
    ConfigError,
    DigestMismatch,
    IntegrityError,
    LimitExceeded,
    NotFound,
    RegistryDenied,
    RegistryUnavailable,
    SnapshotterError,
)
from snapshotter.registry.reference import LayoutLocation, Reference
from tests.harness import sim_registry as faults
from tests.harness.sim_registry import FakeClock, SimRegistry
from tests.unit.registry.conftest import Clients

RAW = b'{"schemaVersion":2}'
CONTENT = os.urandom(200_000)
SIZE = len(CONTENT)
ABSENT = Digest.of(b"absent")


@pytest.fixture
def manifest(sim: SimRegistry) -> Digest:
    return Digest.parse(sim.add_manifest("team/app", "1", RAW, labels.MEDIA_OCI_MANIFEST))


@pytest.fixture
def blob(sim: SimRegistry) -> Digest:
    return Digest.parse(sim.add_blob(CONTENT))


# manifests


async def test_a_manifest_by_tag_and_by_digest(
    sim: SimRegistry, clients: Clients, image: Reference, manifest: Digest
) -> None:
    client = await clients.make()
    expected = (RAW, labels.MEDIA_OCI_MANIFEST, manifest)
    assert await client.manifest(image) == expected
    assert await client.manifest(image.pinned(manifest)) == expected
    accepted = sim.seen[0].headers["Accept"]
    for kind in (
        labels.MEDIA_OCI_MANIFEST,
        labels.MEDIA_OCI_INDEX,
        labels.MEDIA_DOCKER_MANIFEST,
        labels.MEDIA_DOCKER_INDEX,
    ):
        assert kind in accepted


async def test_without_a_tag_latest_is_meant(sim: SimRegistry, clients: Clients) -> None:
    sim.add_manifest("team/app", "latest", RAW, labels.MEDIA_OCI_MANIFEST)
    client = await clients.make()
    assert (await client.manifest(Reference.parse(f"{sim.address}/team/app")))[0] == RAW


async def test_a_pinned_manifest_with_other_content_names_both_digests(
    sim: SimRegistry, clients: Clients, image: Reference, manifest: Digest
) -> None:
    sim.fail(faults.flipped(3), on="manifests")
    client = await clients.make()
    with pytest.raises(DigestMismatch) as caught:
        await client.manifest(image.pinned(manifest))
    assert f"expected {manifest}, got sha256:" in str(caught.value)
    assert caught.value.reason == "digest-mismatch"
    assert len(sim.seen) == 1


async def test_a_tag_whose_content_is_not_what_the_registry_states_is_refused(
    sim: SimRegistry, clients: Clients, image: Reference, manifest: Digest
) -> None:
    client = await clients.make()
    sim.fail(faults.flipped(3), on="manifests")
    with pytest.raises(DigestMismatch):
        await client.manifest(image)
    sim.fail(faults.header("Docker-Content-Digest", ABSENT), on="manifests")
    with pytest.raises(DigestMismatch):
        await client.manifest(image)
    sim.fail(faults.header("Docker-Content-Digest", "sha256:nonsense"), on="manifests")
    with pytest.raises(IntegrityError, match="nonsense"):
        await client.manifest(image)
    sim.fail(faults.header("Docker-Content-Digest", "sha512:" + "0" * 128), on="manifests")
    assert (await client.manifest(image))[2] == manifest


async def test_a_manifest_at_the_limit_is_taken_and_one_above_is_not(
    sim: SimRegistry, clients: Clients, image: Reference
) -> None:
    client = await clients.make(Limits(manifest_bytes=1000))  # type: ignore[arg-type]
    for size, refused in ((1000, False), (1001, True)):
        sim.add_manifest("team/app", "1", RAW.ljust(size), labels.MEDIA_OCI_MANIFEST)
        if refused:
            with pytest.raises(LimitExceeded, match="manifest_bytes"):
                await client.manifest(image)
        else:
            assert len((await client.manifest(image))[0]) == size


async def test_an_endless_manifest_is_refused(
    sim: SimRegistry, clients: Clients, image: Reference, manifest: Digest
) -> None:
    sim.fail(faults.endless(Content_Type=labels.MEDIA_OCI_MANIFEST), on="manifests")
    client = await clients.make()
    with pytest.raises(LimitExceeded, match="manifest_bytes"):
        await client.manifest(image)


async def test_a_compressed_manifest_is_refused(
    sim: SimRegistry, clients: Clients, image: Reference, manifest: Digest
) -> None:
    sim.fail(faults.header("Content-Encoding", "gzip"), on="manifests")
    client = await clients.make()
    with pytest.raises(IntegrityError, match="gzip"):
        await client.manifest(image)


async def test_a_reference_without_registry_is_refused(clients: Clients) -> None:
    client = await clients.make()
    with pytest.raises(BadReference):
        await client.manifest(LayoutLocation(Path("/x")).reference)


# retries


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
async def test_a_passing_failure_is_tried_again(
    sim: SimRegistry, clients: Clients, image: Reference, manifest: Digest, clock: FakeClock, code: int
) -> None:
    sim.fail(faults.status(code), on="manifests", times=2)
    client = await clients.make()
    assert (await client.manifest(image))[0] == RAW
    assert clock.slept == [0.2, 0.4]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (400, RegistryUnavailable),
        (401, RegistryDenied),
        (403, RegistryDenied),
        (404, NotFound),
        (501, RegistryUnavailable),
    ],
)
async def test_a_final_answer_is_not_tried_again(
    sim: SimRegistry, clients: Clients, image: Reference, manifest: Digest, code: int, error: type[Exception]
) -> None:
    sim.fail(faults.status(code), on="manifests", times=9)
    client = await clients.make()
    with pytest.raises(error):
        await client.manifest(image)
    assert len(sim.seen) == 1


async def test_retry_after_is_obeyed_in_seconds_and_as_a_date(
    sim: SimRegistry, clients: Clients, image: Reference, manifest: Digest, clock: FakeClock
) -> None:
    clock.now = 1000.0  # wall clock 1_700_001_000: Tue, 14 Nov 2023 22:30:00 GMT
    sim.fail(faults.status(429, Retry_After="9"), on="manifests")
    sim.fail(faults.status(503, Retry_After="Tue, 14 Nov 2023 22:30:29 GMT"), on="manifests")
    client = await clients.make()
    await client.manifest(image)
    assert clock.slept == [9.0, 20.0]


async def test_retry_after_is_capped_and_never_outlives_the_deadline(
    sim: SimRegistry, clients: Clients, image: Reference, manifest: Digest, clock: FakeClock
) -> None:
    sim.fail(faults.status(429, Retry_After="86400"), on="manifests", times=9)
    client = await clients.make(total_timeout_seconds=100.0)
    with pytest.raises(RegistryUnavailable, match="429"):
        await client.manifest(image)
    assert clock.slept == [60.0]


async def test_a_registry_that_is_not_there_is_unavailable(clients: Clients, clock: FakeClock) -> None:
    client = await clients.make(retries=2)
    with pytest.raises(RegistryUnavailable, match="cannot connect"):
        await client.manifest(Reference.parse("127.0.0.1:1/team/app:1"))
    assert len(clock.slept) == 2


async def test_something_that_does_not_speak_http_is_unavailable(clients: Clients) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-OpenSSH_9\r\n" * 10)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        client = await clients.make(retries=1)
        with pytest.raises(RegistryUnavailable):
            await client.manifest(Reference.parse(f"127.0.0.1:{port}/team/app:1"))


# whole blobs


async def test_a_blob_is_verified(sim: SimRegistry, clients: Clients, image: Reference, blob: Digest) -> None:
    client = await clients.make()
    assert await client.blob(image, blob, SIZE, SIZE) == CONTENT
    sim.fail(faults.flipped(SIZE - 1), on="blobs")
    with pytest.raises(DigestMismatch, match=f"expected {blob}, got sha256:"):
        await client.blob(image, blob, SIZE, SIZE)


async def test_an_empty_blob_needs_no_request(sim: SimRegistry, clients: Clients, image: Reference) -> None:
    client = await clients.make()
    assert await client.blob(image, Digest.of(b""), 0, 0) == b""
    with pytest.raises(DigestMismatch):
        await client.blob(image, ABSENT, 0, 0)
    assert sim.seen == []


async def test_a_blob_over_its_limit_is_not_asked_for(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make(Limits(blob_bytes=SIZE))  # type: ignore[arg-type]
    with pytest.raises(LimitExceeded):
        await client.blob(image, blob, SIZE, SIZE - 1)
    assert await client.blob(image, blob, SIZE, SIZE) == CONTENT
    with pytest.raises(LimitExceeded, match="blob_bytes"):
        await client.read_range(image, blob, 0, 1, SIZE + 1)
    assert len(sim.seen) == 1


async def test_a_stream_gives_pieces_and_the_mismatch_last(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make()
    sim.fail(faults.flipped(0), on="blobs")
    received: list[bytes] = []

    async def consume() -> None:
        async for piece in client.blob_stream(image, blob, SIZE):
            received.append(piece)

    with pytest.raises(DigestMismatch):
        await consume()
    assert b"".join(received)[1:] == CONTENT[1:]


async def test_a_stream_may_be_left_early(sim: SimRegistry, clients: Clients, image: Reference, blob: Digest) -> None:
    client = await clients.make(connections=1)
    async with aclosing(client.blob_stream(image, blob, SIZE)) as pieces:
        async for _ in pieces:
            break
    assert await client.blob(image, blob, SIZE, SIZE) == CONTENT


async def test_an_endless_blob_is_refused_by_its_digest(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make()
    sim.fail(faults.endless(), on="blobs")
    with pytest.raises(DigestMismatch):
        await client.blob(image, blob, SIZE, SIZE)


async def test_a_cancelled_read_leaves_the_client_usable(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    client = await clients.make(connections=1)
    sim.fail(faults.stalls(1000), on="blobs")
    reading = asyncio.create_task(client.blob(image, blob, SIZE, SIZE))
    await sim.arrived.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await client.blob(image, blob, SIZE, SIZE) == CONTENT


# uploads


async def pieces_of(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 50_000):
        yield content[start : start + 50_000]


async def test_an_upload_is_stored_once(sim: SimRegistry, clients: Clients, image: Reference, tmp_path: Path) -> None:
    client = await clients.make()
    digest = Digest.of(CONTENT)
    await client.upload_blob(image, digest, SIZE, lambda: pieces_of(CONTENT))
    assert sim.blobs[digest] == CONTENT
    await client.upload_blob(image, digest, SIZE, lambda: pieces_of(b"never read"))
    assert len(sim.of("uploads")) == 2
    (tmp_path / "blob").write_bytes(CONTENT * 7)
    await client.upload_blob(image, Digest.of(CONTENT * 7), 7 * SIZE, tmp_path / "blob")
    assert sim.blobs[Digest.of(CONTENT * 7)] == CONTENT * 7
    await client.upload_blob(image, Digest.of(b""), 0, lambda: pieces_of(b""))
    assert sim.blobs[Digest.of(b"")] == b""


async def test_an_upload_answers_the_challenge_for_push(sim: SimRegistry, clients: Clients, image: Reference) -> None:
    sim.auth.scheme = "bearer"
    client = await clients.make()
    await client.upload_blob(image, Digest.of(CONTENT), SIZE, lambda: pieces_of(CONTENT))
    await client.put_manifest(image, RAW, labels.MEDIA_OCI_MANIFEST)
    assert "repository:team/app:pull,push" in sim.of("token")[-1].path
    assert "Authorization" in sim.of("uploads")[-1].headers


@pytest.mark.parametrize(
    "content",
    [CONTENT[:-1], CONTENT + b"x", b"\0" * SIZE, b""],
    ids=["shorter", "longer", "other", "empty"],
)
async def test_content_that_is_not_what_was_announced_is_not_uploaded(
    sim: SimRegistry, clients: Clients, image: Reference, content: bytes
) -> None:
    client = await clients.make()
    with pytest.raises(DigestMismatch):
        await client.upload_blob(image, Digest.of(CONTENT), SIZE, lambda: pieces_of(content))
    assert sim.blobs == {}
    assert len([seen for seen in sim.seen if seen.method == "PUT"]) <= 1


async def test_a_file_that_cannot_be_read_is_not_a_registry_failure(
    clients: Clients, image: Reference, tmp_path: Path
) -> None:
    client = await clients.make()
    with pytest.raises(SnapshotterError, match="No such file") as caught:
        await client.upload_blob(image, ABSENT, 10, tmp_path / "missing")
    assert not isinstance(caught.value, RegistryUnavailable)


def _only_put(fault: faults.Fault) -> faults.Fault:
    async def choose(request: faults.web.Request, handler: faults.Handler) -> faults.web.StreamResponse:
        return await (fault(request, handler) if request.method == "PUT" else handler(request))

    return choose


@pytest.mark.parametrize("fault", [faults.status(502), faults.hangs_up()], ids=["502", "cut"])
async def test_a_broken_upload_begins_again(
    sim: SimRegistry, clients: Clients, image: Reference, fault: faults.Fault
) -> None:
    client = await clients.make()
    sim.fail(faults.status(503), on="uploads")  # the first POST
    sim.fail(_only_put(fault), on="uploads", times=2)  # the second POST passes, its PUT fails
    await client.upload_blob(image, Digest.of(CONTENT), SIZE, lambda: pieces_of(CONTENT))
    assert sim.blobs[Digest.of(CONTENT)] == CONTENT
    assert [seen.method for seen in sim.of("uploads")] == ["POST", "POST", "PUT", "POST", "PUT"]


async def test_an_upload_whose_place_is_gone_is_not_found(sim: SimRegistry, clients: Clients, image: Reference) -> None:
    client = await clients.make()
    sim.fail(faults.status(202, Location="x?_state=a"), on="uploads")
    with pytest.raises(NotFound):
        await client.upload_blob(image, Digest.of(CONTENT), SIZE, lambda: pieces_of(CONTENT))


async def test_a_registry_that_stops_taking_an_upload_is_given_up(
    sim: SimRegistry, clients: Clients, image: Reference
) -> None:
    client = await clients.make(progress_timeout_seconds=0.2, retries=0)
    size = 64 << 20  # more than the socket buffers hold
    sim.fail(_only_put(faults.silent()), on="uploads", times=2)

    async def zeros() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 20)

    with pytest.raises(RegistryUnavailable, match="takes nothing"):
        await client.upload_blob(image, ABSENT, size, zeros)


async def test_a_manifest_put_is_checked_both_ways(sim: SimRegistry, clients: Clients, image: Reference) -> None:
    client = await clients.make()
    digest = await client.put_manifest(image, RAW, labels.MEDIA_OCI_MANIFEST)
    assert sim.manifests["team/app", "1"] == (RAW, labels.MEDIA_OCI_MANIFEST)
    assert await client.put_manifest(image.pinned(digest), RAW, labels.MEDIA_OCI_MANIFEST) == digest
    with pytest.raises(DigestMismatch):
        await client.put_manifest(image.pinned(ABSENT), RAW, labels.MEDIA_OCI_MANIFEST)
    sim.fail(faults.status(201, Docker_Content_Digest=ABSENT), on="manifests")
    with pytest.raises(DigestMismatch):
        await client.put_manifest(image, RAW, labels.MEDIA_OCI_MANIFEST)


async def test_plain_http_is_for_loopback_and_configured_hosts_only(
    sim: SimRegistry, clients: Clients, image: Reference, manifest: Digest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reference, "is_loopback", False)
    client = await clients.make(retries=0)
    with pytest.raises(RegistryUnavailable, match="https"):
        await client.manifest(image)
    assert sim.seen == []
    client = await clients.make(plain_http=(sim.address,))
    assert (await client.manifest(image))[0] == RAW


async def test_netrc_and_proxies_are_not_used_for_loopback(
    sim: SimRegistry,
    clients: Clients,
    image: Reference,
    manifest: Digest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "netrc").write_text("default login user password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    client = await clients.make()
    await client.manifest(image)
    assert sim.seen[0].authorization is None


async def test_a_proxy_of_the_environment_is_used_for_other_hosts(
    sim: SimRegistry, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy sees the whole URL in the request line; the simulated registry then answers for that host."""
    sim.add_manifest("team/app", "1", RAW, labels.MEDIA_OCI_MANIFEST)
    monkeypatch.setenv("http_proxy", f"http://me:hunter2@{sim.address}")
    monkeypatch.delenv("no_proxy", raising=False)
    client = await clients.make(plain_http=("registry.invalid",))
    assert (await client.manifest(Reference.parse("registry.invalid/team/app:1")))[0] == RAW
    assert sim.seen[0].headers["Host"] == "registry.invalid"
    assert sim.seen[0].headers["Proxy-Authorization"] == "Basic " + base64.b64encode(b"me:hunter2").decode()
    monkeypatch.setenv("http_proxy", "http://[broken")
    with pytest.raises(ConfigError, match="http_proxy"):
        await client.manifest(Reference.parse("registry.invalid/team/app:1"))
    monkeypatch.setenv("no_proxy", "registry.invalid")
    with pytest.raises(RegistryUnavailable):
        await client.manifest(Reference.parse("registry.invalid/team/app:1"))


async def test_nothing_is_logged(
    sim: SimRegistry, clients: Clients, image: Reference, manifest: Digest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = await clients.make()
    await client.manifest(image)
    assert caplog.records == []


async def test_docker_hub_has_its_own_origin(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    client = await clients.make(retries=0)
    with pytest.raises(RegistryUnavailable, match=r"https://registry-1\.docker\.io: cannot connect"):
        await client.manifest(Reference.parse("busybox"))
