"""Evidence from the guest's services."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from msgspec import structs

from snapshotter.config import Kbs
from snapshotter.errors import ConfigError, KeyDenied, Unavailable
from snapshotter.keys import rcar
from snapshotter.keys.attesters import AgentAttester, Attester, RestAttester, SampleAttester
from snapshotter.keys.kbs import KbsClient
from snapshotter.keys.resource import ResourceUri
from snapshotter.registry.retry import SystemClock
from tests.harness.kbs import Between, kbs_dev, put
from tests.harness.ttrpc import TtrpcServer, field, first_field

AGENT = "attestation_agent.AttestationAgentService"
DATA = bytes(range(48))


class Agent:
    """An attestation agent; evidence repeats the runtime data."""

    def __init__(self, path: Path) -> None:
        self.tee = b"snp"
        self.devices = b""
        self.evidence = lambda data: json.dumps({"report": base64.b64encode(data).decode()}).encode()
        methods = {
            "GetTeeType": self.get_tee,
            "GetEvidence": self.get_evidence,
            "GetAdditionalTees": self.get_devices,
            "GetAdditionalEvidence": self.get_device_evidence,
        }
        self.server = TtrpcServer(path, {(AGENT, name): method for name, method in methods.items()})

    async def get_tee(self, _: bytes) -> tuple[int, bytes]:
        return 0, field(1, self.tee)

    async def get_devices(self, _: bytes) -> tuple[int, bytes]:
        return 0, field(1, self.devices) if self.devices else b""

    async def get_evidence(self, request: bytes) -> tuple[int, bytes]:
        return 0, field(1, self.evidence(first_field(request, 1)))

    async def get_device_evidence(self, request: bytes) -> tuple[int, bytes]:
        return 0, field(1, b'{"nvidia":"' + base64.b64encode(first_field(request, 1)) + b'"}')


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    made = Agent(tmp_path / "agent.sock")
    async with made.server:
        yield made


async def test_the_agent_over_ttrpc(agent: Agent) -> None:
    attester = AgentAttester(str(agent.server.path))
    assert await attester.tee() == "snp"
    assert await attester.evidence(DATA) == {"report": base64.b64encode(DATA).decode()}
    assert await attester.additional_evidence(DATA) == ""
    agent.devices = b"nvidia"
    assert json.loads(await attester.additional_evidence(DATA)) == {"nvidia": base64.b64encode(DATA).decode()}


async def test_an_agent_from_before_devices(agent: Agent) -> None:
    del agent.server.handlers[AGENT, "GetAdditionalTees"]
    assert await AgentAttester(str(agent.server.path)).additional_evidence(DATA) == ""


@pytest.mark.parametrize("tee", [b"sample", b"sampledevice", b"", b"other", b"\xff"])
async def test_an_agent_without_a_tee_is_not_used(agent: Agent, tee: bytes) -> None:
    agent.tee = tee
    with pytest.raises(KeyDenied):
        await AgentAttester(str(agent.server.path)).tee()


@pytest.mark.parametrize("evidence", [b"", b"[]", b"{", b"x" * (2 << 20)], ids=["empty", "list", "cut", "long"])
async def test_evidence_that_is_none(agent: Agent, evidence: bytes) -> None:
    agent.evidence = lambda _: evidence
    with pytest.raises(KeyDenied, match="attestation agent"):
        await AgentAttester(str(agent.server.path)).evidence(DATA)


@pytest.mark.parametrize("method", ["GetTeeType", "GetEvidence", "GetAdditionalTees", "GetAdditionalEvidence"])
@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\xff", b"\x0a\x05ab", b"\x0b", b"\x0a\x01\xff", b"\x0a" * 99])
async def test_answers_of_the_agent_that_are_none(agent: Agent, method: str, raw: bytes) -> None:
    agent.devices = b"nvidia"

    async def answers(_: bytes) -> tuple[int, bytes]:
        return 0, raw

    agent.server.handlers[AGENT, method] = answers
    attester = AgentAttester(str(agent.server.path))
    if method == "GetAdditionalTees" and raw == b"\x0a\x01\xff":  # says no more than that there is a device
        assert "nvidia" in await attester.additional_evidence(DATA)
        return
    with pytest.raises(KeyDenied, match="attestation agent"):
        await {"GetTeeType": attester.tee}.get(method, lambda: _evidence(attester))()


async def _evidence(attester: Attester) -> None:
    await attester.evidence(DATA)
    await attester.additional_evidence(DATA)


async def test_an_agent_that_never_ends(agent: Agent) -> None:
    agent.evidence = lambda _: b" " * (8 << 20)  # above what ttrpc carries
    with pytest.raises((KeyDenied, Unavailable)):
        await AgentAttester(str(agent.server.path)).evidence(DATA)


async def test_an_agent_that_is_away(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        await AgentAttester(str(tmp_path / "absent")).tee()


class Rest:
    """api-server-rest with feature attestation."""

    def __init__(self) -> None:
        self.status = 200
        self.device_status = 200
        self.devices = b""
        self.member = "report"  # of the evidence
        self.body: bytes | None = None
        self.hangs: asyncio.Event | None = None
        self.url = ""

    async def evidence(self, request: web.Request) -> web.Response:
        if self.hangs:
            await self.hangs.wait()
        if self.body is not None:
            return web.Response(body=self.body)
        assert request.query["encoding"] == "base64"
        data = base64.urlsafe_b64decode(request.query["runtime_data"] + "==")
        return web.json_response({"svn": "1", self.member: base64.b64encode(data).decode()}, status=self.status)

    async def additional(self, _: web.Request) -> web.Response:
        if self.hangs:
            await self.hangs.wait()
        return web.Response(status=self.device_status, body=self.devices)


@pytest.fixture
async def rest() -> AsyncIterator[Rest]:
    made, app = Rest(), web.Application()
    app.router.add_get("/aa/evidence", made.evidence)
    app.router.add_get("/aa/additional-evidence", made.additional)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


def over_rest(url: str, tee: str = "tdx", seconds: float = 10.0) -> RestAttester:
    return RestAttester(url, tee, SystemClock(), seconds)


async def test_the_endpoint_over_rest(rest: Rest) -> None:
    attester = over_rest(rest.url)
    assert await attester.tee() == "tdx"
    assert await attester.evidence(DATA) == {"svn": "1", "report": base64.b64encode(DATA).decode()}
    assert await attester.additional_evidence(DATA) == ""
    rest.devices = b'{"nvidia":{}}'
    assert await attester.additional_evidence(DATA) == '{"nvidia":{}}'
    rest.device_status = 404
    assert await attester.additional_evidence(DATA) == ""


async def test_an_endpoint_that_refuses_or_fails(rest: Rest) -> None:
    rest.status = rest.device_status = 403
    for ask in (over_rest(rest.url).evidence, over_rest(rest.url).additional_evidence):
        with pytest.raises(KeyDenied, match="403"):
            await ask(DATA)
    rest.status = 500
    with pytest.raises(Unavailable, match="500"):
        await over_rest(rest.url).evidence(DATA)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"a"', b"\xff", b"x" * (2 << 20)], ids=["", "list", "cut", "bytes", "long"]
)
async def test_evidence_of_the_endpoint_that_is_none(rest: Rest, body: bytes) -> None:
    rest.body = body
    with pytest.raises(KeyDenied):
        await over_rest(rest.url).evidence(DATA)


async def test_an_endpoint_that_hangs(rest: Rest) -> None:
    rest.hangs = asyncio.Event()
    for ask in (over_rest(rest.url, seconds=0.3).evidence, over_rest(rest.url, seconds=0.3).additional_evidence):
        with pytest.raises(Unavailable):
            await ask(DATA)
    rest.hangs.set()


@pytest.mark.parametrize(
    ("url", "tee"),
    [
        ("http://192.0.2.1:8006", "snp"),
        ("https://kbs.example", "snp"),
        ("http://127.0.0.1:8006", ""),
        ("http://127.0.0.1:8006", "sample"),
        ("http://127.0.0.1:8006/aa", "snp"),
        ("unix:///x", "snp"),
        ("http://user:secret@127.0.0.1:8006", "snp"),
    ],
)
def test_endpoints_that_are_not_this_machines(url: str, tee: str) -> None:
    with pytest.raises(ConfigError, match=r"keys\.kbs"):
        over_rest(url, tee)


async def test_sample_evidence_is_what_a_kbs_expects() -> None:
    attester: Any = SampleAttester()
    assert await attester.evidence(DATA) == {"svn": "1", "report_data": base64.b64encode(DATA).decode()}


async def test_a_kbs_gets_the_agents_evidence_bound_to_its_nonce_and_our_key(agent: Agent, tmp_path: Path) -> None:
    """As far as a KBS without the vendor's certificates can tell."""
    agent.devices = b"nvidia"
    server = await kbs_dev(tmp_path)
    settings = Kbs(url="https://unused.example", agent_socket=str(agent.server.path))
    async with Between(server.url) as between:
        client = KbsClient(structs.replace(settings, url=between.url), AgentAttester(settings.agent_socket))
        with pytest.raises(KeyDenied, match="AttestationError"):  # only sample evidence is appraised there
            await client.get(ResourceUri("a", "b", "c"))
    await server.stop()
    request, sent = (json.loads(body) for body in between.bodies[:2])
    assert request["tee"] == "snp"
    challenge, jwk = rcar.Challenge(sent["runtime-data"]["nonce"]), sent["runtime-data"]["tee-pubkey"]
    devices = sent["tee-evidence"]["additional_evidence"]
    assert base64.b64decode(json.loads(devices)["nvidia"]) == challenge.device_report_data(jwk)
    primary = base64.b64decode(sent["tee-evidence"]["primary_evidence"]["report"])
    assert primary == challenge.report_data(jwk, devices)


@pytest.mark.parametrize("way", ["agent", "rest"])
async def test_a_key_is_released_for_evidence_of_the_guest(agent: Agent, rest: Rest, tmp_path: Path, way: str) -> None:
    """The development KBS appraises nothing but sample evidence, so this guest's has its form."""
    put(tmp_path, "a/b/c", b"secret")
    agent.evidence = lambda data: json.dumps({"svn": "1", "report_data": base64.b64encode(data).decode()}).encode()
    rest.member = "report_data"
    attester = AgentAttester(str(agent.server.path)) if way == "agent" else over_rest(rest.url, "snp")
    server = await kbs_dev(tmp_path)
    async with Between(server.url) as between:
        between.asked = lambda path, body: body.replace(b'"snp"', b'"sample"') if path == "auth" else body
        client = KbsClient(Kbs(url=between.url), attester)
        with await client.get(ResourceUri("a", "b", "c")) as secret:
            assert secret.expose() == b"secret"
    await server.stop()
    assert between.requests == ["auth", "attest", "resource/a/b/c"]
