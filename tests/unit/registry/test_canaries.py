"""Secrets of every source are used where they belong, and are found in no log, no error and no file that we write."""

import base64
import json
import logging
import stat
import traceback
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from snapshotter.config import CredentialProviders, KubeSecrets, Limits, Registry
from snapshotter.credentials.login import Login
from snapshotter.credentials.remembered import RememberedLogins
from snapshotter.crypto.secret import SecretBytes
from snapshotter.digest import Digest
from snapshotter.errors import SnapshotterError
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.reference import Reference
from tests.harness import sim_registry as faults
from tests.harness.kube_api import KubeApi
from tests.harness.logs import everything
from tests.harness.sim_registry import SimRegistry

CONTENT = b"content of a blob" * 100
DIGEST = Digest.of(CONTENT)
HELPER, PROVIDER, FILE, PULLED, SECRET = "cnry-helper", "cnry-provider", "cnry-file", "cnry-pulled", "cnry-secret"
HEADER, PROXY, SIGNATURE, ENVIRONMENT, API_TOKEN = (
    "cnry-header", "cnry-proxy", "cnry-signature", "cnry-environment", "cnry-api-token"
)  # fmt: skip
PASSWORDS = (PULLED, HELPER, FILE, PROVIDER, SECRET)  # in the order of the sources
API = "credentialprovider.kubelet.k8s.io/v1"


def shown_in(text: str) -> list[str]:
    """The canaries that a text shows, plainly or as an Authorization header has them."""
    encoded = [base64.b64encode(f"user:{word}".encode()).decode() for word in PASSWORDS]
    return [canary for canary in ("cnry", *encoded) if canary in text]


class Sources:
    """Every source of credentials, configured for one registry."""

    def __init__(self, directory: Path, registry: str, api: KubeApi) -> None:
        self.directory = directory
        api.add("default", registry, SECRET)
        api.token = API_TOKEN
        api.kubeconfig()
        self._program("docker-credential-canary", f"echo {HELPER} >&2; echo '{json.dumps(_helper(HELPER))}'")
        response = {
            "kind": "CredentialProviderResponse", "apiVersion": API, "cacheKeyType": "Registry",
            "auth": {registry: {"username": "user", "password": PROVIDER}},
        }  # fmt: skip
        self._program("canary-provider", f"cat >/dev/null; echo $CANARY >&2; echo '{json.dumps(response)}'")
        provider = {
            "name": "canary-provider", "matchImages": [registry], "apiVersion": API, "defaultCacheDuration": "1h",
            "env": [{"name": "CANARY", "value": ENVIRONMENT}],
        }  # fmt: skip
        self._write("providers.json", {"kind": "CredentialProviderConfig", "providers": [provider]})
        auth = base64.b64encode(f"user:{FILE}".encode()).decode()
        self._write("docker.json", {"auths": {registry: {"auth": auth}}, "credHelpers": {registry: "canary"}})
        (directory / "certs.d" / registry).mkdir(parents=True)
        (directory / "certs.d" / registry / "hosts.toml").write_text(f'[header]\nX-Secret = "{HEADER}"\n')
        self.remembered = RememberedLogins()
        self.remembered.add(registry, "team/app", Login("user", SecretBytes(PULLED.encode())))

    def _program(self, name: str, script: str) -> None:
        path = self.directory / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(stat.S_IRWXU)

    def _write(self, name: str, content: object) -> None:
        (self.directory / name).write_text(json.dumps(content))

    def client(self, proxy_host: str = "") -> RegistryClient:
        config = Registry(
            hosts_dir=str(self.directory / "certs.d"),
            docker_config=str(self.directory / "docker.json"),
            credential_providers=CredentialProviders(str(self.directory / "providers.json"), str(self.directory)),
            kube_secrets=KubeSecrets(str(self.directory / "kubeconfig")),
            plain_http=(proxy_host,),
            progress_timeout_seconds=0.5,
            retries=0,
        )
        return RegistryClient(config, Limits(), remembered=self.remembered)


def _helper(secret: str) -> dict[str, str]:
    return {"ServerURL": "", "Username": "user", "Secret": secret}


@pytest.fixture
async def sources(tmp_path: Path, sim: SimRegistry, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sources]:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    sim.add_blob(CONTENT)
    async with KubeApi(tmp_path) as api:
        yield Sources(tmp_path, sim.address, api)


@pytest.mark.parametrize("scheme", ["basic", "bearer"])
@pytest.mark.parametrize("accepted", [*PASSWORDS, "none of them"])
async def test_passwords(
    sim: SimRegistry, sources: Sources, image: Reference, scheme: str, accepted: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sim.auth.scheme, sim.auth.username, sim.auth.password = scheme, "user", accepted
    said = ""
    async with sources.client() as client:
        try:
            assert await client.blob(image, DIGEST, len(CONTENT), 1 << 20) == CONTENT
        except SnapshotterError as error:
            assert accepted == "none of them"
            said = "".join(traceback.format_exception(error)) + repr(error)
    tried = [base64.b64decode(seen.authorization[6:]).decode() for seen in sim.seen if _basic(seen)]
    last = PASSWORDS.index(accepted) if accepted in PASSWORDS else len(PASSWORDS) - 1
    assert list(dict.fromkeys(tried)) == [f"user:{word}" for word in PASSWORDS[: last + 1]]
    assert all(seen.headers["X-Secret"] == HEADER for seen in sim.seen)
    assert shown_in(said + everything(caplog.records)) == []


def _basic(seen: faults.Seen) -> bool:
    return (seen.authorization or "").startswith("Basic ")


@pytest.mark.parametrize(
    "fault",
    [faults.status(500), faults.status(403), faults.status(400), faults.hangs_up(), faults.silent(), faults.flipped(0)],
    ids=range(6),
)
@pytest.mark.parametrize("kind", ["blobs", "token", "cdn"])
@pytest.mark.allow_warnings
async def test_tokens_signed_urls_and_failures(
    sim: SimRegistry,
    sources: Sources,
    image: Reference,
    kind: str,
    fault: faults.Fault,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Tokens of the simulated registry are random; they are looked for as it has granted them."""
    caplog.set_level(logging.DEBUG)
    sim.auth.scheme, sim.auth.username, sim.auth.password = "bearer", "user", PULLED
    sim.redirect = lambda digest: f"{sim.origin}/cdn/{digest}?X-Amz-Signature={SIGNATURE}&X-Amz-Expires=600"
    said = ""
    async with sources.client() as client:
        for spoiled in (False, True, False):
            if spoiled:
                sim.fail(fault, on=kind, times=20)
                sim.auth.tokens |= {"another"}
            try:
                await client.blob(image, DIGEST, len(CONTENT), 1 << 20)
            except SnapshotterError as error:
                said += "".join(traceback.format_exception(error)) + repr(error)
    shown = said + everything(caplog.records)
    assert shown_in(shown) == []
    assert not [token for token in sim.auth.tokens if token in shown]


@pytest.mark.allow_warnings
async def test_the_password_of_a_proxy(
    sim: SimRegistry, sources: Sources, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    image = Reference.parse("registry.invalid/team/app:1")
    said = ""
    monkeypatch.delenv("no_proxy", raising=False)
    for proxy in (sim.address, "127.0.0.1:1", "[broken", "127.0.0.1:port"):
        monkeypatch.setenv("http_proxy", f"http://user:{PROXY}@{proxy}")
        async with sources.client("registry.invalid") as client:
            try:
                assert await client.blob(image, DIGEST, len(CONTENT), 1 << 20) == CONTENT
                assert proxy == sim.address
            except SnapshotterError as error:
                said += "".join(traceback.format_exception(error)) + repr(error)
    assert said
    assert shown_in(said + everything(caplog.records)) == []


@pytest.mark.allow_warnings
async def test_sources_that_are_broken(
    sim: SimRegistry, sources: Sources, image: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sim.auth.scheme, sim.auth.username, sim.auth.password = "bearer", "user", "none of them"
    said = ""
    names = ("docker.json", "docker-credential-canary", "canary-provider", "providers.json", "kubeconfig")
    for path in [*(sources.directory / name for name in names), *sources.directory.rglob("hosts.toml")]:
        whole = path.read_bytes()
        for broken in (whole[: len(whole) * 2 // 3], whole + b"\n}", whole.replace(b"cnry", b"\xff cnry"), b""):
            path.write_bytes(broken)
            async with sources.client() as client:
                try:
                    await client.blob(image, DIGEST, len(CONTENT), 1 << 20)
                except SnapshotterError as error:
                    said += "".join(traceback.format_exception(error)) + repr(error)
        path.write_bytes(whole)
    assert said
    assert shown_in(said + everything(caplog.records)) == []
