"""The KBS client against a development KBS, and against somebody between them."""

import asyncio
import base64
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from snapshotter.config import Kbs
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import ConfigError, KeyDenied, SnapshotterError, Unavailable
from snapshotter.kbs_dev.server import KbsDev
from snapshotter.keys import kbs, rcar
from snapshotter.keys.attesters import Attester, SampleAttester
from snapshotter.keys.cache import ResourceCache
from snapshotter.keys.kbs import KbsClient
from snapshotter.keys.resource import ResourceUri
from snapshotter.registry.retry import Clock
from tests.harness.kbs import Between, kbs_dev, put, times
from tests.harness.sim_registry import FakeClock

URI = ResourceUri("default", "image-kek", "one")
CANARY = b"canary-canary-canary-canary-can!"
ERRORS = "https://github.com/confidential-containers/kbs/errors/"


@dataclass
class World:
    """A KBS with one key, and somebody in between."""

    directory: Path
    server: KbsDev
    between: Between

    def client(
        self, attester: Attester | None = None, *, clock: Clock | None = None, url: str = "", **settings: Any
    ) -> KbsClient:
        chosen = Kbs(url=url or self.between.url, timeout_seconds=settings.pop("timeout_seconds", 10.0), **settings)
        return KbsClient(chosen, attester or SampleAttester(), clock)

    def signer(self, path: Path) -> str:
        """The token signer's public key in a file."""
        pem = self.server.signer.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        path.write_bytes(pem)
        return str(path)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    put(tmp_path / "resources", "default/image-kek/one", CANARY)
    server = await kbs_dev(tmp_path / "resources")
    async with Between(server.url) as between:
        yield World(tmp_path / "resources", server, between)
    await server.stop()


async def got(client: KbsClient, uri: ResourceUri = URI) -> bytes:
    with await client.get(uri) as secret:
        return secret.expose()


async def refusal(client: KbsClient, kind: type[SnapshotterError] = KeyDenied, uri: ResourceUri = URI) -> str:
    with pytest.raises(kind) as caught:
        await client.get(uri)
    assert caught.value.__cause__ is None
    assert len(client._cache) == 0, "nothing that is refused is kept"
    return str(caught.value)


# the exchange


@pytest.mark.parametrize("kind", ["P-256", "P-521", "RSA"])
async def test_attested_once_and_then_by_token(world: World, kind: Any) -> None:
    put(world.directory, "default/image-kek/two", b"another")
    client = world.client(tee_key=kind)
    assert await got(client) == CANARY
    assert await got(client, ResourceUri("default", "image-kek", "two")) == b"another"
    assert world.between.requests == [
        "auth",
        "attest",
        "resource/default/image-kek/one",
        "resource/default/image-kek/two",
    ]


async def test_the_signer_of_tokens_is_checked_if_it_is_known(world: World, tmp_path: Path) -> None:
    assert await got(world.client(token_signer=world.signer(tmp_path / "signer.pem"))) == CANARY
    stranger = await kbs_dev(world.directory)
    try:
        text = await refusal(world.client(url=stranger.url, token_signer=str(tmp_path / "signer.pem")))
    finally:
        await stranger.stop()
    assert "signature is not the attestation service's" in text


async def test_initdata_is_sent_as_a_whole(tmp_path: Path, world: World) -> None:
    (tmp_path / "init.toml").write_text('version = "0.1.0"\nalgorithm = "sha256"\n\n[data]\n"aa.toml" = "x = 1"\n')
    assert await got(world.client(init_data=str(tmp_path / "init.toml"))) == CANARY
    assert json.loads(world.between.bodies[1])["init-data"]["body"] == (tmp_path / "init.toml").read_text()


async def test_additional_evidence_is_bound_into_the_primary(world: World) -> None:
    class Devices(SampleAttester):
        asked: list[bytes]

        def __init__(self) -> None:
            self.asked = []

        async def evidence(self, report_data: bytes) -> dict[str, Any]:
            self.asked.append(report_data)
            return await super().evidence(report_data)

        async def additional_evidence(self, report_data: bytes) -> str:
            self.asked.append(report_data)
            return '{"nvidia":{}}'

    attester = Devices()
    await refusal(world.client(attester))  # the development KBS appraises no devices
    body = json.loads(world.between.bodies[1])
    challenge, jwk = rcar.Challenge(body["runtime-data"]["nonce"]), body["runtime-data"]["tee-pubkey"]
    assert attester.asked[:2] == [challenge.device_report_data(jwk), challenge.report_data(jwk, '{"nvidia":{}}')]
    assert body["tee-evidence"]["additional_evidence"] == '{"nvidia":{}}'


async def test_over_tls_with_the_only_authority_that_is_trusted(world: World, tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    for name, ca in (("ca", authority), ("stranger", stranger)):
        ca.cert_pem.write_to_path(str(tmp_path / f"{name}.pem"))
    server = await KbsDev(world.directory, world.server._policy).start("127.0.0.1", 0, context)
    try:
        assert await got(world.client(url=server.url, ca_file=str(tmp_path / "ca.pem"))) == CANARY
        for ca_file in (str(tmp_path / "stranger.pem"), ""):
            assert "TLS failed" in await refusal(world.client(url=server.url, ca_file=ca_file), Unavailable)
    finally:
        await server.stop()


# memory


async def test_a_released_key_is_used_again_for_a_while(world: World) -> None:
    clock = FakeClock()
    clock.time = lambda: 1.8e9  # type: ignore[method-assign]  # tokens are judged by another clock
    world.server._clock = lambda: 1.8e9
    client = world.client(clock=clock, cache_seconds=60)
    assert [await got(client) for _ in range(3)] == [CANARY] * 3
    assert len(world.between.requests) == 3
    clock.now += 59
    await got(client)
    assert len(world.between.requests) == 3
    clock.now += 2
    put(world.directory, "default/image-kek/one", b"rotated")
    assert await got(client) == b"rotated"
    assert len(world.between.requests) == 4


async def test_nothing_is_kept_when_that_is_the_wish(world: World) -> None:
    client = world.client(cache_seconds=0)
    await got(client)
    await got(client)
    assert len(world.between.requests) == 4
    assert len(client._cache) == 0


async def test_who_asks_at_the_same_time_shares_one_attestation(world: World) -> None:
    client = world.client()
    assert await asyncio.gather(*(got(client) for _ in range(20))) == [CANARY] * 20
    assert len(world.between.requests) == 3


async def test_the_cache_overwrites_what_it_lets_go(tmp_path: Path) -> None:
    clock = FakeClock()
    cache = ResourceCache(10, clock)
    uris = [ResourceUri("a", "b", str(n)) for n in range(300)]
    for uri in uris:
        cache.put(uri, SecretBytes(b"x"))
    assert len(cache) == 256
    assert cache.get(uris[0]) is None
    held = cache._held[uris[-1]][0]
    copy = cache.get(uris[-1])
    assert copy is not None
    copy.wipe()
    assert cache.get(uris[-1]) == SecretBytes(b"x")
    clock.now += 11
    assert cache.get(uris[-1]) is None
    assert len(cache) == len(held) == 0
    cache.put(uris[0], SecretBytes(b"x"))
    cache.clear()
    assert len(cache) == 0


async def test_an_expired_entry_goes_without_anybody_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, timers = FakeClock(), []
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda seconds, call: timers.append((seconds, call)))
    cache = ResourceCache(10, clock)
    cache.put(URI, SecretBytes(b"x"))
    held = cache._held[URI][0]
    [(seconds, expire)] = timers
    clock.now += seconds
    expire()
    assert len(held) == len(cache) == 0


# tokens that end, servers that restart


async def test_a_token_is_replaced_before_it_expires(world: World) -> None:
    world.server.signer._seconds = 5  # less than a token must have left to be used again
    client = world.client(cache_seconds=0)
    await got(client)
    await got(client)
    assert world.between.requests.count("attest") == 2


async def test_a_token_that_is_not_accepted_any_more_is_replaced(world: World) -> None:
    client = world.client(cache_seconds=0)
    await got(client)
    world.server._sessions.clear()
    world.server.signer = type(world.server.signer)(300)  # a restart: other signing key, no sessions
    assert await got(client) == CANARY
    assert world.between.requests.count("attest") == 2


@pytest.mark.parametrize("before", ["attest", "resource"])
async def test_a_kbs_that_restarts_in_the_middle(world: World, before: str) -> None:
    done = False

    async def restart(request: web.Request) -> None:
        nonlocal done
        if before in request.path and not done:
            done = True
            world.server._sessions.clear()
            world.server.signer = type(world.server.signer)(300)

    world.between.before = restart
    assert await got(world.client()) == CANARY
    assert world.between.requests.count("auth") == 2


# answers that mean no


async def test_wrong_evidence_is_refused_and_nothing_is_kept(world: World) -> None:
    class Wrong(SampleAttester):
        async def evidence(self, report_data: bytes) -> dict[str, Any]:
            return await super().evidence(bytes(len(report_data)))

    client = world.client(Wrong())
    assert "AttestationError" in await refusal(client)
    assert "resource/default/image-kek/one" not in world.between.requests
    assert len(client._cache) == 0
    assert client._attested is None


async def test_a_policy_that_wants_other_claims(tmp_path: Path, world: World) -> None:
    for policy in ({"allow_sample": False}, {"expect": {"svn": "2"}}, {"expect": {"init_data": "00"}}):
        server = await kbs_dev(world.directory, **policy)
        try:
            client = world.client(url=server.url)
            assert "PolicyDeny" in await refusal(client)
            assert len(client._cache) == 0
        finally:
            await server.stop()


async def test_a_missing_resource(world: World) -> None:
    text = await refusal(world.client(), uri=ResourceUri("default", "image-kek", "absent"))
    assert "kbs:///default/image-kek/absent: refused with 401 PluginInternalError" in text
    assert world.between.requests.count("auth") == 1


async def test_an_empty_resource_is_none(world: World) -> None:
    put(world.directory, "default/image-kek/one", b"")
    assert "is empty" in await refusal(world.client())


@pytest.mark.parametrize("path", ["auth", "attest", "resource"])
@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 410, 501])
async def test_a_no_is_final_after_few_requests(world: World, path: str, status: int) -> None:
    world.between.before = times(99, status, path=path)
    text = await refusal(world.client())
    assert f"refused with {status}" in text
    assert "canary" not in text
    assert len(world.between.requests) <= 9
    if status != 401:
        assert world.between.requests.count("auth") == 1


async def test_an_answer_of_401_names_its_kind_and_not_its_words(world: World) -> None:
    world.between.before = times(99, 401, path="attest", body={"type": ERRORS + "AttestationError", "detail": "canary"})
    text = await refusal(world.client())
    assert text.endswith("attestation refused with 401 AttestationError")


# no answer


@pytest.mark.parametrize("path", ["auth", "attest", "resource"])
@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_errors_that_pass_are_tried_again(world: World, path: str, status: int) -> None:
    world.between.before = times(3, status, path=path)
    clock = FakeClock()
    world.server._clock = clock.time
    assert await got(world.client(clock=clock)) == CANARY
    assert clock.slept == [0.2, 0.4, 0.8]


@pytest.mark.parametrize("path", ["auth", "attest", "resource"])
async def test_errors_that_stay_are_given_up(world: World, path: str) -> None:
    world.between.before = times(99, 500, path=path)
    clock = FakeClock()
    world.server._clock = clock.time
    client = world.client(clock=clock, retries=3)
    assert "answers 500" in await refusal(client, Unavailable)
    assert len(clock.slept) == 3
    assert len(client._cache) == 0


@pytest.mark.parametrize("path", ["auth", "attest", "resource"])
async def test_a_kbs_that_hangs(world: World, path: str) -> None:
    async def before(request: web.Request) -> web.StreamResponse | None:
        return await world.between.hang(request) if path in request.path else None

    world.between.before = before
    client = world.client(timeout_seconds=0.4)
    both = asyncio.gather(refusal(client, Unavailable), refusal(client, Unavailable))
    async with asyncio.timeout(5):  # whoever waits for the first waits no longer than it
        assert all("no answer in time" in text for text in await both)
    world.between.before = None
    assert await got(world.client()) == CANARY


async def test_a_kbs_that_is_away(world: World) -> None:
    await world.server.stop()
    client = world.client(url=world.server.url, clock=FakeClock(), retries=2)
    assert "auth" in await refusal(client, Unavailable)


@pytest.mark.parametrize("path", ["auth", "attest", "resource"])
async def test_a_kbs_that_floods(world: World, path: str) -> None:
    async def flood(request: web.Request) -> web.StreamResponse | None:
        if path not in request.path:
            return None
        answer = web.StreamResponse()
        await answer.prepare(request)
        try:
            while not world.between.stopping.is_set():
                await answer.write(b"x" * 65536)
        except ConnectionError:
            pass
        return answer

    world.between.before = flood
    assert re.search(r"answers more than \d{5,7} bytes", await refusal(world.client()))


# somebody in between


Change = Callable[[str, bytes], bytes]


def replaced(path: str, **members: Any) -> Change:
    def after(seen: str, body: bytes) -> bytes:
        return json.dumps(json.loads(body) | members).encode() if seen.startswith(path) else body

    return after


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (replaced("auth", nonce=base64.b64encode(bytes(32)).decode()), "AttestationError"),
        (replaced("auth", nonce="AAAA"), "challenge: nonce"),
        (replaced("auth", nonce=7), "challenge: nonce"),
        (replaced("auth", **{"extra-params": {"selected-hash-algorithm": "md5"}}), "hash algorithm"),
        (replaced("auth", **{"extra-params": {"selected-hash-algorithm": "sha256"}}), "AttestationError"),
        (replaced("auth", unknown=1), "unknown member"),
        (replaced("attest", token="a.b.c"), "token"),
        (replaced("attest", token=None), "token"),
        (replaced("attest", extra=1), "unknown member"),
        (replaced("resource", tag="AAAAAAAAAAAAAAAAAAAAAA"), "does not authenticate"),
        (replaced("resource", encrypted_key="AAAA"), "content key"),
        (replaced("resource", iv="AAAA"), "iv is not 12 bytes"),
        (replaced("resource", aad="AAAA"), "unknown member"),
        (lambda _, body: body[:-3], "not a JSON object"),
        (lambda _, body: body + body, "not a JSON object"),
        (lambda *_: b"[]", "not a JSON object"),
        (lambda *_: b"\xff", "not a JSON object"),
        (lambda *_: b"", "not a JSON object"),
    ],
    ids=map(str, range(18)),
)
async def test_changed_answers_are_refused_with_the_failed_check(world: World, change: Change, check: str) -> None:
    world.between.after = change
    client = world.client()
    assert check in await refusal(client)
    assert len(client._cache) == 0


@pytest.mark.parametrize("path", ["auth", "attest", "resource"])
async def test_every_answer_cut_short_anywhere(world: World, path: str) -> None:
    async with asyncio.timeout(60):
        for part in (1, 9, 33, 50, 77, 99):
            world.between.after = (
                lambda seen, body, part=part: (  # type: ignore[misc]
                    body[: len(body) * part // 100] if seen.startswith(path) else body
                )
            )
            await refusal(world.client())


async def test_a_cookie_that_is_missing_or_hostile(world: World) -> None:
    for cookie in ("", "other=1", 'kbs-session-id="a b"', "kbs-session-id=", "kbs-session-id=" + "a" * 300):

        async def before(request: web.Request, cookie: str = cookie) -> web.StreamResponse | None:
            headers = {"Set-Cookie": cookie} if cookie else {}
            nonce = base64.b64encode(bytes(32)).decode()
            return web.json_response({"nonce": nonce, "extra-params": ""}, headers=headers)

        world.between.before = before
        assert "no usable cookie" in await refusal(world.client())


async def test_a_replayed_attestation_is_refused(world: World) -> None:
    """It is bound to the nonce of its own session."""
    await got(world.client())
    assert "AttestationError" in await refusal(ReplayingClient.of(world, world.between.bodies[1]))


class ReplayingClient(KbsClient):
    """Sends a recorded attestation instead of its own."""

    recorded = b""

    @classmethod
    def of(cls, world: World, recorded: bytes) -> "ReplayingClient":
        made = cls(Kbs(url=world.server.url, timeout_seconds=10), SampleAttester())
        made.recorded = recorded
        return made

    async def _attestation(self, challenge: rcar.Challenge, key: Any) -> bytes:
        return self.recorded


async def test_a_token_of_somebody_else_is_not_taken(world: World) -> None:
    tokens: list[bytes] = []

    def after(path: str, body: bytes) -> bytes:
        if path == "attest":
            tokens.append(body)
            return tokens[0]
        return body

    world.between.after = after
    await got(world.client())
    assert "not about this attestation's key" in await refusal(world.client())


async def test_a_resource_answer_of_another_attestation_does_not_open(world: World) -> None:
    answers: list[bytes] = []

    def after(path: str, body: bytes) -> bytes:
        if path.startswith("resource"):
            answers.append(body)
            return answers[0]
        return body

    world.between.after = after
    await got(world.client())
    assert "not encrypted to this attestation's key" in await refusal(world.client())


# hygiene


async def test_errors_and_logs_hold_neither_keys_nor_tokens(
    world: World, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    texts: list[str] = []
    with caplog.at_level("DEBUG"):
        client = world.client(cache_seconds=0)
        await got(client)
        assert client._attested
        token = client._attested.token.text
        texts += [repr(client._attested), repr(vars(client))]
        changes: list[tuple[Change | None, Callable[[web.Request], Awaitable[Any]] | None]] = [
            (replaced("resource", tag="AAAAAAAAAAAAAAAAAAAAAA"), None),
            (lambda path, body: body[:-3] if path.startswith("resource") else body, None),
            (None, times(99, 401, path="resource", body={"detail": CANARY.decode()})),
            (None, times(99, 403, path="resource", body={"type": ERRORS + "X", "detail": CANARY.decode()})),
        ]
        for after, before in changes:
            world.between.after, world.between.before = after, before
            with pytest.raises(SnapshotterError) as caught:
                await client.get(URI)
            error: BaseException | None = caught.value
            while error is not None:
                texts.append(repr(error))
                error = error.__cause__ or error.__context__
    text = "".join(texts) + caplog.text
    for secret in (CANARY.decode(), base64.b64encode(CANARY).decode()[:30], repr(CANARY), CANARY.hex(), token[-40:]):
        assert secret not in text


# configuration


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"url": "http://kbs.example:8080"}, "keys.kbs.url"),
        ({"url": "kbs.example"}, "keys.kbs.url"),
        ({"url": "https://kbs.example/prefix"}, "keys.kbs.url"),
        ({"url": "https://u:canary@kbs.example"}, "keys.kbs.url"),
        ({"url": "https://[::1"}, "keys.kbs.url"),
        ({"url": "https://kbs.example", "ca_file": "/absent"}, "ca_file"),
        ({"url": "https://kbs.example", "token_signer": "/absent"}, "token_signer"),
        ({"url": "https://kbs.example", "token_signer": __file__}, "token_signer"),
        ({"url": "https://kbs.example", "init_data": "/absent"}, "init_data"),
        ({"url": "https://kbs.example", "attester": "rest"}, "keys.kbs.tee"),
        ({"url": "https://kbs.example", "attester": "rest", "tee": "sample"}, "keys.kbs.tee"),
        ({"url": "https://kbs.example", "attester": "rest", "tee": "snp", "rest_url": "http://192.0.2.1"}, "rest_url"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=option) as caught:
        kbs.client(Kbs(**settings))
    assert "canary" not in str(caught.value)


async def test_sample_evidence_only_when_it_was_asked_for(world: World, tmp_path: Path) -> None:
    client = kbs.client(Kbs(url=world.between.url, agent_socket=str(tmp_path / "absent")))
    assert "absent" in await refusal(client, Unavailable)
    assert not world.between.requests


@pytest.mark.allow_warnings
async def test_made_up_evidence_is_warned_about(world: World, caplog: pytest.LogCaptureFixture) -> None:
    assert await got(kbs.client(Kbs(url=world.between.url, insecure_sample_attester=True))) == CANARY
    assert "insecure_sample_attester" in caplog.text
