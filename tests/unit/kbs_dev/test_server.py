"""The development KBS as a client that keeps no rule sees it."""

import base64
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from snapshotter.errors import ConfigError
from snapshotter.kbs_dev.appraisal import Policy, TokenSigner, init_data_claims
from snapshotter.kbs_dev.server import WARNING_HEADER, KbsDev
from snapshotter.keys import rcar, teekey
from snapshotter.keys.rcar import Challenge
from snapshotter.keys.teekey import TeeKey
from tests.harness.kbs import kbs_dev, put

SECRET = b"canary resource"
PATH = "resource/default/key/one"
ERRORS = "https://github.com/confidential-containers/kbs/errors/"
REQUEST = {"version": "0.4.0", "tee": "sample", "extra-params": {"supported-hash-algorithms": ["sha384"]}}


class Peer:
    """A client without scruples."""

    def __init__(self, server: KbsDev, http: aiohttp.ClientSession) -> None:
        self.server = server
        self.http = http
        self.key = TeeKey.generate("P-256")

    async def call(
        self, method: str, path: str, value: Any = None, raw: bytes | None = None, **headers: str
    ) -> tuple[int, Any]:
        body = raw if raw is not None else json.dumps(value).encode() if value is not None else None
        url = f"{self.server.url}/kbs/v0/{path}"
        async with self.http.request(method, url, data=body, headers=headers, allow_redirects=False) as answer:
            assert answer.headers[WARNING_HEADER[0]] == WARNING_HEADER[1]
            assert "kbs-dev" in answer.headers["Server"]
            self.cookie = answer.cookies.get(rcar.COOKIE)
            content = await answer.read()
            return answer.status, json.loads(content) if content.startswith(b"{") else content

    async def challenged(self) -> tuple[str, dict[str, Any]]:
        """A cookie and the attestation that answers its challenge."""
        status, challenge = await self.call("POST", "auth", REQUEST)
        assert status == 200
        assert self.cookie
        report = Challenge(challenge["nonce"]).report_data(self.key.jwk, "")
        evidence = {"svn": "1", "report_data": base64.b64encode(report).decode()}
        attestation = {
            "init-data": None,
            "runtime-data": {"nonce": challenge["nonce"], "tee-pubkey": self.key.jwk},
            "tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""},
        }
        return f"{rcar.COOKIE}={self.cookie.value}", attestation

    async def attested(self, **changes: Any) -> tuple[str, str]:
        cookie, attestation = await self.challenged()
        status, answer = await self.call("POST", "attest", attestation | changes, Cookie=cookie)
        assert status == 200
        return cookie, answer["token"]


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peer]:
    put(tmp_path, "default/key/one", SECRET)
    server = await kbs_dev(tmp_path)
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
        yield Peer(server, http)
    await server.stop()


def refused(answer: tuple[int, Any], variant: str, status: int = 401) -> str:
    assert answer[0] == status, answer
    assert answer[1]["type"] == ERRORS + variant
    assert "canary" not in json.dumps(answer[1])
    return str(answer[1]["detail"])


@pytest.mark.parametrize("kind", ["P-256", "P-521", "RSA"])
async def test_a_resource_by_cookie_and_by_bearer(peer: Peer, kind: teekey.Kind) -> None:
    peer.key = TeeKey.generate(kind)
    cookie, token = await peer.attested()
    for headers in (
        {"Cookie": cookie},
        {"Authorization": f"Bearer {token}"},
        {"Cookie": "x=1", "Authorization": f"Bearer {token}"},
    ):
        status, answer = await peer.call("GET", PATH, **headers)
        assert status == 200
        assert peer.key.open(json.dumps(answer).encode()).expose() == SECRET


@pytest.mark.parametrize("version", ["0.4.1", "0.4", "0.3.0", "1.0.0", "", None, 4])
async def test_other_versions(peer: Peer, version: object) -> None:
    assert "0.4.0" in refused(await peer.call("POST", "auth", REQUEST | {"version": version}), "ProtocolVersion")


@pytest.mark.parametrize(
    "changes",
    [{"tee": None}, {"tee": {}}, {"tee": 7}, {"tee": "nonsense"}, {"tee": ""}, {"extra-params": 7},
     {"extra-params": []}, {"extra-params": "x"}, {"extra-params": None}, {"more": 1}],
    ids=str,
)  # fmt: skip
async def test_requests_of_another_form(peer: Peer, changes: dict[str, Any]) -> None:
    refused(await peer.call("POST", "auth", REQUEST | changes), "AttestationError")
    assert peer.cookie is None


async def test_each_session_has_its_nonce_and_cookie(peer: Peer) -> None:
    made = [await peer.challenged() for _ in range(3)]
    assert len({cookie for cookie, _ in made}) == 3
    nonces = {attestation["runtime-data"]["nonce"] for _, attestation in made}
    assert len(nonces) == 3
    assert {len(base64.b64decode(nonce)) for nonce in nonces} == {32}


async def test_tokens_are_as_a_kbs_makes_them(peer: Peer) -> None:
    init = 'version = "0.1.0"\nalgorithm = "sha256"\n[data]\n"aa.toml" = "x = 1"\n"policy.rego" = "package p"\n'
    _, token = await peer.attested(**{"init-data": {"format": "toml", "body": init}})
    claims = peer.server.signer.verify(token, peer.server._clock())
    assert claims["exp"] - claims["iat"] == 300
    evidence = claims["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
    assert evidence["runtime_data_claims"]["tee-pubkey"] == peer.key.jwk
    assert evidence["init_data"] == hashlib.sha256(init.encode()).hexdigest()
    assert evidence["init_data_claims"] == {"aa.toml": {"x": 1}}
    assert evidence["sample"]["svn"] == "1"
    assert "not for production" in claims["iss"]


async def test_attesting_again_gives_the_same_token_whatever_is_sent(peer: Peer) -> None:
    cookie, attestation = await peer.challenged()
    _, first = await peer.call("POST", "attest", attestation, Cookie=cookie)
    attestation["tee-evidence"]["primary_evidence"] = {}
    assert await peer.call("POST", "attest", attestation, Cookie=cookie) == (200, first)


def changed(value: dict[str, Any], path: str, new: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(value))
    *parents, last = path.split("/")
    inner = copy
    for name in parents:
        inner = inner[name]
    inner[last] = new
    return copy


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ("runtime-data/nonce", base64.b64encode(bytes(32)).decode()),
        ("runtime-data/nonce", None),
        ("runtime-data/nonce", ["x"]),
        ("runtime-data/tee-pubkey", TeeKey.generate("P-256").jwk),
        ("runtime-data/tee-pubkey", TeeKey.generate("RSA").jwk | {"alg": "RSA1_5"}),
        ("runtime-data/tee-pubkey", {"kty": "oct"}),
        ("runtime-data/tee-pubkey", None),
        ("runtime-data", []),
        ("runtime-data", None),
        ("tee-evidence", ""),
        ("tee-evidence/primary_evidence", None),
        ("tee-evidence/primary_evidence", {}),
        ("tee-evidence/primary_evidence/report_data", base64.b64encode(bytes(48)).decode()),
        ("tee-evidence/primary_evidence/report_data", ""),
        ("tee-evidence/primary_evidence/report_data", 7),
        ("tee-evidence/primary_evidence/more", 7),
        ("tee-evidence/primary_evidence/svn", 1),
        ("tee-evidence/additional_evidence", "{}"),
        ("tee-evidence/additional_evidence", "\ud800"),
        ("init-data", {"format": "json", "body": "{}"}),
        ("init-data", {"format": "toml", "body": "= ="}),
        ("init-data", {"format": "toml", "body": 'algorithm = "md5"'}),
        ("init-data", {"format": "toml", "body": 'algorithm = ["sha256"]'}),
        ("init-data", {"format": "toml", "body": 'algorithm = "sha256"\n[data]\n"a.toml" = 1'}),
        ("init-data", []),
        ("unknown", 1),
    ],
    ids=map(str, range(26)),
)
async def test_attestations_that_are_wrong_anywhere(peer: Peer, path: str, new: Any) -> None:
    cookie, attestation = await peer.challenged()
    refused(await peer.call("POST", "attest", changed(attestation, path, new), Cookie=cookie), "AttestationError")
    refused(await peer.call("GET", PATH, Cookie=cookie), "TokenNotFound")


async def test_attestations_of_other_tees_and_without_a_session(peer: Peer) -> None:
    _, attestation = await peer.challenged()
    refused(await peer.call("POST", "attest", attestation), "AttestationError")
    refused(await peer.call("POST", "attest", attestation, Cookie="kbs-session-id=00"), "AttestationError")
    cookie, _ = await peer.challenged()  # a replay: right evidence, another session's nonce
    refused(await peer.call("POST", "attest", attestation, Cookie=cookie), "AttestationError")
    await peer.call("POST", "auth", REQUEST | {"tee": "snp"})
    assert peer.cookie
    cookie = f"{rcar.COOKIE}={peer.cookie.value}"
    refused(await peer.call("POST", "attest", attestation, Cookie=cookie), "AttestationError")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b'{"a":1,"a":2}', b"[" * 9999, b"1e999999"])
async def test_bodies_that_are_none(peer: Peer, raw: bytes) -> None:
    cookie, _ = await peer.challenged()
    for path in ("auth", "attest"):
        refused(await peer.call("POST", path, raw=raw, Cookie=cookie), "AttestationError")


async def test_bodies_that_are_too_long(peer: Peer) -> None:
    for path in ("auth", "attest"):
        async with peer.http.post(f"{peer.server.url}/kbs/v0/{path}", data=io.BytesIO(b" " * (3 << 20))) as answer:
            assert answer.status == (413 if path == "auth" else 401), "without a session nothing is read"


async def test_sessions_end_and_are_bounded(tmp_path: Path) -> None:
    now = [1000.0]
    server = await kbs_dev(put(tmp_path, "a/b/c", SECRET).parents[2], clock=lambda: now[0], session_seconds=60)
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
        peer = Peer(server, http)
        cookie, attestation = await peer.challenged()
        now[0] += 61
        refused(await peer.call("POST", "attest", attestation, Cookie=cookie), "AttestationError")
        cookie, token = await peer.attested()
        now[0] += 200
        assert (await peer.call("GET", "resource/a/b/c", Authorization=f"Bearer {token}"))[0] == 200
        now[0] += 101
        detail = refused(
            await peer.call("GET", "resource/a/b/c", Authorization=f"Bearer {token}"), "TokenVerifierError"
        )
        assert "expired" in detail
        for _ in range(1100):
            await peer.call("POST", "auth", REQUEST)
        assert len(server._sessions) <= 1024
    await server.stop()


async def test_forged_tokens(peer: Peer) -> None:
    _, token = await peer.attested()
    claims = peer.server.signer.verify(token, peer.server._clock())
    head, body, tail = token.split(".")
    none = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    forged = [
        TokenSigner(300).sign(claims),
        f"{none}.{body}.",
        f"{none}.{body}.{tail}",
        f"{head}.{body}.{tail[:-4]}AAAA",
    ]
    for text in (*forged, "", "x", "a.b.c", "é"):
        for scheme in ("Bearer", "bearer", "Basic"):
            status, answer = await peer.call("GET", PATH, Authorization=f"{scheme} {text}")
            assert status == 401
            assert answer["type"] in (ERRORS + "TokenVerifierError", ERRORS + "TokenNotFound")
    refused(await peer.call("GET", PATH), "TokenNotFound")


@pytest.mark.parametrize(
    ("path", "variant", "status"),
    [
        ("resource/default/key/absent", "PluginInternalError", 401),
        ("resource/default/key", "InvalidRequestPath", 404),
        ("resource/default/key/one/two", "InvalidRequestPath", 404),
        ("resource/default/key/%2e%2e", "InvalidRequestPath", 404),
        ("resource/default/key/.hidden", "InvalidRequestPath", 404),
        ("resource//key/one", "InvalidRequestPath", 404),
        ("other/default/key/one", "PluginNotFound", 404),
        ("", "InvalidRequestPath", 404),
    ],
)
async def test_paths(peer: Peer, path: str, variant: str, status: int) -> None:
    cookie, _ = await peer.attested()
    refused(await peer.call("GET", path, Cookie=cookie), variant, status)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_nothing_can_be_administered(peer: Peer, method: str) -> None:
    cookie, _ = await peer.attested()
    for path in (PATH, "resource/resource-policy/x/y"):
        refused(await peer.call(method, path, raw=b"x", Cookie=cookie), "AdminAuthAccess")


async def test_no_file_outside_the_directory(peer: Peer, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"canary outside")
    (tmp_path / "default" / "key" / "link").symlink_to(tmp_path / "secret")
    cookie, _ = await peer.attested()
    refused(await peer.call("GET", "resource/default/key/link", Cookie=cookie), "PluginInternalError")


@pytest.mark.parametrize(
    ("policy", "opens"),
    [
        (Policy(), False),
        (Policy(allow_sample=True), True),
        (Policy(allow_sample=True, expect={"svn": "1", "debug": "false", "launch_digest": "abcde"}), True),
        (Policy(allow_sample=True, expect={"svn": "2"}), False),
        (Policy(allow_sample=True, expect={"init_data": "00"}), False),
        (Policy(allow_sample=True, expect={"nonsense": "1"}), False),
    ],
    ids=map(str, range(6)),
)
async def test_policies(peer: Peer, policy: Policy, opens: bool) -> None:
    peer.server._policy = policy
    cookie, _ = await peer.attested()
    answer = await peer.call("GET", PATH, Cookie=cookie)
    if opens:
        assert answer[0] == 200
    else:
        refused(answer, "PolicyDeny")


async def test_health(peer: Peer) -> None:
    async with peer.http.get(f"{peer.server.url}/healthz") as answer:
        assert answer.status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
async def test_only_this_machine_is_served(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        await KbsDev(tmp_path, Policy()).start(host, 0)


async def test_a_port_that_is_taken(peer: Peer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        await KbsDev(tmp_path, Policy()).start("127.0.0.1", int(peer.server.url.rpartition(":")[2]))


def test_initdata_claims_of_none() -> None:
    assert init_data_claims(None) == {}


# the command


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "snapshotter", "kbs-dev", *map(str, arguments)]


def test_the_command_warns_says_where_it_is_and_ends(tmp_path: Path) -> None:
    started = subprocess.Popen(
        command("--resources", tmp_path, "--listen", "127.0.0.1:0", "--allow-sample"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    with started as process:
        try:
            assert process.stdout
            assert process.stdout.readline().startswith("http://127.0.0.1:")
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert "FOR DEVELOPMENT ONLY" in errors
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--listen", "0.0.0.0:0"], "loopback"),
        (["--listen", "127.0.0.1"], "HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "HOST:PORT"),
        (["--expect", "svn"], "CLAIM=VALUE"),
        (["--resources", "/absent"], "no such directory"),
    ],
)
def test_arguments_that_cannot_work(tmp_path: Path, arguments: list[str], word: str) -> None:
    result = subprocess.run(
        command("--resources", tmp_path, *arguments),
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        check=False,
    )
    assert result.returncode in (2, 3)
    assert word in result.stderr
    assert "Traceback" not in result.stderr
