"""Where signatures come from: hostile stores and manifests, each of which is a clear error or simply no signature."""

import asyncio
import base64
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from snapshotter import labels
from snapshotter.config import Limits, Registry
from snapshotter.digest import Digest
from snapshotter.errors import (
    ConfigError,
    IntegrityError,
    LimitExceeded,
    MalformedImage,
    RegistryUnavailable,
    SnapshotterError,
    Unavailable,
)
from snapshotter.image import sigstore
from snapshotter.image.signature import CLAIM_BYTES
from snapshotter.image.sigstore import (
    MESSAGE_BYTES,
    PAYLOAD_TYPE,
    SIGNATURE_ANNOTATION,
    SIGNATURES,
    CosignSignatures,
    Found,
    Lookaside,
    tag_of,
)
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.layout import OciLayout
from snapshotter.registry.reference import Reference
from tests.harness.oci import Layout
from tests.harness.sim_registry import FakeClock, Fault, SimRegistry, changed, cut, endless, hangs_up, status

DIGEST = Digest.of(b"image")
IMAGE = Reference.parse("registry.example/team/app:1")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


# a lookaside store


@pytest.mark.parametrize(
    "base",
    ["", "/x", "file://x", "ftp://x.example", "https://", "http://x.example", "http://localhost.evil.example",
     "http://127.0.0.1.evil.example", "http://localhost@evil.example", "http://[", "http://1.2.3.4/s"],
)  # fmt: skip
def test_stores_that_are_none(base: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.lookaside"):
        Lookaside(base)


@pytest.mark.parametrize(
    "base", ["file:///var/lib/sigstore", "https://x.example/s", "http://localhost:1/s", "http://[::1]:1/", "http://127.0.0.1"]
)  # fmt: skip
def test_stores_that_may_be(base: str) -> None:
    Lookaside(base)


class Store:
    """An HTTP server with what it is told to answer to signature-N."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.fault: Handler | None = None
        self.seen: list[str] = []
        self.stopping = asyncio.Event()
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request.path)
        number = int(request.path.rpartition("-")[2])
        if number <= len(self.messages):
            return web.Response(body=self.messages[number - 1])
        return await self.fault(request) if self.fault else web.Response(status=404)


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    made = Store()
    app = web.Application()
    app.router.add_get("/{path:.*}", made.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/store/"
    yield made
    made.stopping.set()
    await runner.cleanup()


async def test_signatures_are_asked_for_until_there_is_none(store: Store) -> None:
    store.messages = [b"one", b"x" * MESSAGE_BYTES]
    found = await Lookaside(store.url).find(IMAGE, DIGEST)
    assert found == [Found(b"", b"one"), Found(b"", b"x" * MESSAGE_BYTES)]
    place = f"/store/team/app@sha256={DIGEST.hex}/signature-"
    assert store.seen == [f"{place}{number}" for number in (1, 2, 3)]


async def test_not_all_of_endless_signatures_are_looked_at(store: Store) -> None:
    store.messages = [b"x"] * (SIGNATURES + 5)
    assert len(await Lookaside(store.url).find(IMAGE, DIGEST)) == SIGNATURES


@pytest.mark.parametrize(
    ("status", "text"), [(500, "answered 500"), (403, "answered 403"), (302, "answered 302"), (206, "answered 206")]
)
async def test_answers_that_are_no_signature(store: Store, status: int, text: str) -> None:
    async def fault(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={"Location": "http://127.0.0.1:1/"})

    store.fault = fault
    store.messages = [b"one"]
    with pytest.raises(Unavailable, match=text):
        await Lookaside(store.url).find(IMAGE, DIGEST)


@pytest.mark.parametrize("size", [MESSAGE_BYTES + 1, 10 * MESSAGE_BYTES])
async def test_a_message_that_is_too_long(store: Store, size: int) -> None:
    store.messages = [b"x" * size]
    with pytest.raises(LimitExceeded, match=f"longer than {MESSAGE_BYTES} bytes"):
        await Lookaside(store.url).find(IMAGE, DIGEST)


async def test_a_store_that_floods(store: Store) -> None:
    async def fault(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        while not store.stopping.is_set():
            await answer.write(b"x" * 65536)
        return answer

    store.fault = fault
    with pytest.raises(LimitExceeded):
        await Lookaside(store.url).find(IMAGE, DIGEST)


async def test_a_store_that_hangs_or_breaks_off(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigstore, "_SECONDS", 0.3)

    async def hang(_: web.Request) -> web.StreamResponse:
        await store.stopping.wait()
        return web.Response(status=500)

    async def break_off(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": "1000"})
        await answer.prepare(request)
        await answer.write(b"x")
        assert request.transport
        request.transport.abort()
        return answer

    for store.fault in (hang, break_off):
        with pytest.raises(Unavailable, match=f"lookaside signatures of {DIGEST}"):
            await Lookaside(store.url).find(IMAGE, DIGEST)


async def test_a_store_that_says_nothing_more_in_the_middle(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigstore, "_SECONDS", 0.3)

    async def stall(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Length": str(MESSAGE_BYTES)})
        await answer.prepare(request)
        await answer.write(b"x" * (MESSAGE_BYTES - 1))
        await store.stopping.wait()
        return answer

    store.fault = stall
    store.messages = [b"one"]
    with pytest.raises(Unavailable, match="TimeoutError"):
        await Lookaside(store.url).find(IMAGE, DIGEST)


@pytest.mark.parametrize("kind", ["deflate", "gzip", "br"])
async def test_nothing_that_a_store_compressed_is_inflated(store: Store, kind: str) -> None:
    bomb, asked = zlib.compress(bytes(32 << 20)), []

    async def compressed(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers["Accept-Encoding"])
        return web.Response(body=bomb, headers={"Content-Encoding": kind})

    store.fault = compressed
    with pytest.raises(IntegrityError, match=f"lookaside signature: answer has Content-Encoding '{kind}'"):
        await Lookaside(store.url).find(IMAGE, DIGEST)
    assert asked == ["identity"]


async def test_a_store_that_is_away() -> None:
    with pytest.raises(Unavailable):
        await Lookaside("http://127.0.0.1:1").find(IMAGE, DIGEST)


# cosign's manifest


class Cosign:
    """A layout whose tag for the signatures of DIGEST leads to any document."""

    def __init__(self, path: Path) -> None:
        self.layout = Layout(path)
        self.payload = self.layout.add_blob(b"payload", PAYLOAD_TYPE)

    def layer(self, **changes: Any) -> dict[str, Any]:
        signature = base64.b64encode(b"signature").decode()
        return self.payload | {"annotations": {SIGNATURE_ANNOTATION: signature}} | changes

    async def find(self, document: bytes) -> list[Found]:
        entry = self.layout.add_blob(document, "application/vnd.oci.image.manifest.v1+json")
        index = {"schemaVersion": 2, "manifests": [
            entry | {"annotations": {"org.opencontainers.image.ref.name": tag_of(DIGEST)}}
        ]}  # fmt: skip
        (self.layout.path / "index.json").write_text(json.dumps(index))
        source = CosignSignatures(OciLayout(self.layout.path, Limits()), Limits())
        return list(await source.find(IMAGE, DIGEST))


@pytest.fixture
def cosign(tmp_path: Path) -> Cosign:
    return Cosign(tmp_path / "layout")


GOOD = Found(b"payload", b"signature")


async def test_good_layers_are_found_among_others(cosign: Cosign) -> None:
    others: list[dict[str, Any]] = [
        {"mediaType": "application/x"}, {"annotations": {}}, {"annotations": {SIGNATURE_ANNOTATION: "%"}},
        {"annotations": {SIGNATURE_ANNOTATION: "\u00e4"}}, {"annotations": {SIGNATURE_ANNOTATION: ""}},
        {"annotations": {SIGNATURE_ANNOTATION: "A" * (MESSAGE_BYTES + 4)}}, {"size": CLAIM_BYTES + 1}, {"size": -1},
        {"size": 3}, {"digest": "sha256:1"}, {"digest": "../../etc/passwd"}, {"digest": f"sha256:{'0' * 64}"},
    ]  # fmt: skip
    layers = [*(cosign.layer(**other) for other in others), cosign.layer()]
    assert await cosign.find(json.dumps({"layers": layers}).encode()) == [GOOD]


async def test_not_all_of_endless_layers_are_looked_at(cosign: Cosign) -> None:
    layers = [cosign.layer()] * (SIGNATURES + 1)
    assert await cosign.find(json.dumps({"layers": layers}).encode()) == [GOOD] * SIGNATURES


@pytest.mark.parametrize(
    "document",
    [[], 7, None, {"layers": 7}, {"layers": {}}, {"layers": [7]}, {"layers": [{}]},
     {"layers": [{"mediaType": PAYLOAD_TYPE, "digest": 7, "size": 1}]},
     {"layers": [{"mediaType": PAYLOAD_TYPE, "digest": "x", "size": "1"}]},
     {"layers": [{"mediaType": PAYLOAD_TYPE, "digest": "x", "size": 1, "annotations": {"a": 1}}]}],
    ids=str,
)  # fmt: skip
async def test_documents_of_another_form(cosign: Cosign, document: object) -> None:
    with pytest.raises(MalformedImage):
        await cosign.find(json.dumps(document).encode())


async def test_a_document_cut_anywhere(cosign: Cosign) -> None:
    whole = json.dumps({"layers": [cosign.layer()]}).encode()
    assert await cosign.find(whole) == [GOOD]
    for length in range(len(whole)):
        with pytest.raises(SnapshotterError):
            await cosign.find(whole[:length])


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[" * 100_000, b'{"layers":' * 50_000], ids=["empty", "ff", "[", "{"])
async def test_a_document_that_is_no_json(cosign: Cosign, raw: bytes) -> None:
    with pytest.raises(MalformedImage, match=r"signatures .*: not a manifest"):
        await cosign.find(raw)


async def test_a_document_that_is_too_long(cosign: Cosign) -> None:
    whole = json.dumps({"layers": [cosign.layer()]}).encode()
    with pytest.raises(LimitExceeded, match="manifest"):
        await cosign.find(whole.ljust(Limits().manifest_bytes + 1))


# the same in a registry


class Beside:
    """A registry with what lies under the tag of an image's signatures."""

    def __init__(self, registry: SimRegistry, client: RegistryClient) -> None:
        self.registry = registry
        self._client = client
        self._image = Reference.parse(f"{registry.address}/team/app:1")

    def put(self, *layers: dict[str, Any], size: int = 0) -> None:
        raw = json.dumps({"schemaVersion": 2, "layers": layers}).encode().ljust(size)
        self.registry.add_manifest("team/app", tag_of(DIGEST), raw, labels.MEDIA_OCI_MANIFEST)

    def layer(self, payload: bytes = GOOD.payload) -> dict[str, Any]:
        annotations = {SIGNATURE_ANNOTATION: base64.b64encode(GOOD.signature).decode()}
        digest = self.registry.add_blob(payload)
        return {"mediaType": PAYLOAD_TYPE, "size": len(payload), "digest": digest, "annotations": annotations}

    async def find(self) -> list[Found]:
        return list(await CosignSignatures(self._client, Limits()).find(self._image, DIGEST))


@pytest.fixture
async def beside() -> AsyncIterator[Beside]:
    async with (
        SimRegistry() as registry,
        RegistryClient(Registry(retries=2), Limits(), clock=FakeClock()) as client,
    ):
        yield Beside(registry, client)


async def test_a_payload_cut_anywhere_is_none_and_hides_no_other(beside: Beside) -> None:
    whole = b"another payload"
    bad, good = beside.layer(whole), beside.layer()
    beside.put(bad, good)
    assert await beside.find() == [Found(whole, GOOD.signature), GOOD]
    for size in range(len(whole)):
        beside.registry.blobs[bad["digest"]] = whole[:size]
        for stated in (len(whole), size):
            beside.put(bad | {"size": stated}, good)
            assert await beside.find() == [GOOD]


async def test_a_payload_that_is_longer_or_another_or_gone_is_none(beside: Beside) -> None:
    bad = beside.layer(b"another payload")
    beside.put(bad, beside.layer())
    for content in (b"another payload ", bytes(1 << 20), b"payload another"):
        beside.registry.blobs[bad["digest"]] = content
        assert await beside.find() == [GOOD]
    del beside.registry.blobs[bad["digest"]]
    assert await beside.find() == [GOOD]


async def test_what_is_larger_than_any_claim_is_not_asked_for(beside: Beside) -> None:
    long = beside.layer(b"x" * (CLAIM_BYTES + 1))
    beside.put(long, long | {"size": 1 << 70}, beside.layer() | {"mediaType": "text/plain"})
    assert await beside.find() == []
    assert beside.registry.kinds() == ["manifests"]


async def test_a_manifest_of_a_registry_that_is_too_long(beside: Beside) -> None:
    beside.put(beside.layer(), size=Limits().manifest_bytes + 1)
    with pytest.raises(LimitExceeded, match=r"limits\.manifest_bytes"):
        await beside.find()


def _shortens(answer: web.Response) -> None:
    assert isinstance(answer.body, bytes)
    answer.body = answer.body[:-1]


@pytest.mark.parametrize(
    ("on", "fault", "kind"),
    [
        ("manifests", status(500), RegistryUnavailable),
        ("manifests", hangs_up(), RegistryUnavailable),
        ("manifests", cut(0), RegistryUnavailable),
        ("manifests", cut(9), RegistryUnavailable),
        ("manifests", endless(), LimitExceeded),
        ("manifests", changed(_shortens), IntegrityError),
        ("blobs", status(500), RegistryUnavailable),
        ("blobs", hangs_up(), RegistryUnavailable),
        ("blobs", cut(0), RegistryUnavailable),
    ],
    ids=map(str, range(9)),
)
async def test_a_registry_that_fails_is_none_without_signatures(
    beside: Beside, on: str, fault: Fault, kind: type[SnapshotterError]
) -> None:
    """Signing would otherwise replace the signatures that are there."""
    beside.put(beside.layer())
    beside.registry.fail(fault, on=on, times=99)
    with pytest.raises(kind):
        await beside.find()
