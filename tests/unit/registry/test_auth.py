"""Challenges, tokens and passwords: who gets them, how long they live, and that they are never shown."""

import asyncio
import base64
import json
import logging
import os
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trustme

from snapshotter.config import CredentialProviders, Limits
from snapshotter.credentials.login import Login
from snapshotter.credentials.remembered import RememberedLogins
from snapshotter.crypto.secret import SecretBytes
from snapshotter.digest import Digest
from snapshotter.errors import ConfigError, LimitExceeded, RegistryDenied, RegistryUnavailable
from snapshotter.registry.auth import parse_challenges
from snapshotter.registry.reference import Reference
from tests.harness import sim_registry as faults
from tests.harness.sim_registry import FakeClock, SimRegistry, docker_config
from tests.unit.registry.conftest import Clients, until

CONTENT = b"content of a blob" * 100


@pytest.fixture
def blob(sim: SimRegistry) -> Digest:
    return Digest.parse(sim.add_blob(CONTENT))


@pytest.fixture
def logins(tmp_path: Path, sim: SimRegistry) -> str:
    """A docker config.json with a password for the registry."""
    path = tmp_path / "config.json"
    path.write_text(docker_config(sim.address, "user", "hunter2"))
    return str(path)


async def test_an_anonymous_token_is_fetched_once_for_a_repository(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    sim.auth.scheme = "bearer"
    client = await clients.make()
    for _ in range(3):
        assert await client.read_range(image, blob, 5, 10, len(CONTENT)) == CONTENT[5:15]
    assert sim.kinds() == ["blobs", "token", "blobs", "blobs", "blobs"]
    assert sim.of("token")[0].path == "/token?service=sim&scope=repository:team/app:pull"
    assert sim.of("token")[0].authorization is None


async def test_parallel_reads_share_one_token(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    sim.auth.scheme = "bearer"
    client = await clients.make()
    await asyncio.gather(*(client.read_range(image, blob, i, 10, len(CONTENT)) for i in range(12)))
    assert sim.kinds().count("token") == 1


async def test_one_connection_is_enough_for_the_token_dance(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    sim.auth.scheme = "bearer"
    client = await clients.make(connections=1)
    assert await client.blob(image, blob, len(CONTENT), 1 << 20) == CONTENT


async def test_a_token_is_renewed_before_it_expires_and_nobody_waits_for_that(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, clock: FakeClock
) -> None:
    sim.auth.scheme, sim.auth.expires_in = "bearer", 300
    client = await clients.make()
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    first = sim.seen[-1].authorization
    clock.now += 199
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    assert sim.kinds().count("token") == 1
    clock.now += 2
    sim.fail(faults.silent(), on="token")  # a token server that hangs holds up nobody
    await asyncio.gather(*(client.read_range(image, blob, i, 10, len(CONTENT)) for i in range(5)))
    assert {seen.authorization for seen in sim.seen[-5:] if seen.kind == "blobs"} == {first}
    assert sim.kinds().count("token") == 2
    clock.now += 31
    await client.__aexit__()


async def test_a_renewal_that_fails_is_repeated_and_the_old_token_used_until_its_end(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, clock: FakeClock
) -> None:
    sim.auth.scheme, sim.auth.expires_in = "bearer", 300
    client = await clients.make()

    async def read() -> str | None:
        await client.read_range(image, blob, 1, 10, len(CONTENT))
        return sim.of("blobs")[-1].authorization

    await read()
    first = await read()
    sim.fail(faults.status(503), on="token")
    clock.now += 201
    assert await read() == first
    await until(lambda: sim.kinds().count("token") == 2)
    assert await read() == first
    clock.now += 6
    assert await read() == first
    await until(lambda: sim.kinds().count("token") == 3)
    await until_changed(read, first)
    sim.auth.tokens.clear()
    clock.now += 400
    sim.seen.clear()
    await read()
    assert sim.kinds() == ["token", "blobs"]  # an expired one is not even sent


async def until_changed(read: Callable[[], Awaitable[str | None]], before: str | None) -> None:
    async with asyncio.timeout(10):
        while await read() == before:
            pass


async def test_a_basic_login_that_still_holds_is_used_on(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, logins: str, clock: FakeClock
) -> None:
    sim.auth.scheme, sim.auth.username, sim.auth.password = "basic", "user", "hunter2"
    client = await clients.make(docker_config=logins)
    for _ in range(4):
        await client.blob(image, blob, len(CONTENT), 1 << 20)
        clock.now += 3000
    assert len(sim.seen) == 5


async def test_parallel_reads_share_one_refusal(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    sim.auth.scheme, sim.auth.username = "bearer", "somebody else"
    client = await clients.make()
    results = await asyncio.gather(
        *(client.read_range(image, blob, i, 10, len(CONTENT)) for i in range(8)), return_exceptions=True
    )
    assert all(isinstance(result, RegistryDenied) for result in results)
    assert sim.kinds().count("token") < 8


async def test_a_token_without_expiry_lives_a_minute(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, clock: FakeClock
) -> None:
    sim.auth.scheme, sim.auth.expires_in = "bearer", None
    client = await clients.make()
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    clock.now += 51
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    assert sim.kinds().count("token") == 2


async def test_a_revoked_token_is_replaced_once(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    sim.auth.scheme = "bearer"
    client = await clients.make()
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    sim.auth.tokens.clear()
    sim.seen.clear()
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    assert sim.kinds() == ["blobs", "token", "blobs"]


async def test_a_403_to_a_kept_token_is_worth_a_new_one(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    """Some registries answer an expired token with 403 and no challenge."""
    sim.auth.scheme = "bearer"
    client = await clients.make()
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    sim.fail(faults.status(403), on="blobs")
    assert await client.blob(image, blob, len(CONTENT), 1 << 20) == CONTENT
    assert sim.kinds().count("token") == 2


async def test_a_registry_that_refuses_fresh_tokens_is_asked_only_twice(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    sim.auth.scheme = "bearer"
    client = await clients.make()
    sim.fail(faults.status(401, WWW_Authenticate=f'Bearer realm="{sim.origin}/token"'), on="blobs", times=10)
    with pytest.raises(RegistryDenied):
        await client.blob(image, blob, len(CONTENT), 1 << 20)
    assert sim.kinds() == ["blobs", "token", "blobs"]


async def test_user_and_password_go_to_the_token_server(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, logins: str
) -> None:
    sim.auth.scheme, sim.auth.username, sim.auth.password = "bearer", "user", "hunter2"
    client = await clients.make(docker_config=logins)
    assert await client.blob(image, blob, len(CONTENT), 1 << 20) == CONTENT
    assert all(not (seen.authorization or "").startswith("Basic") for seen in sim.of("blobs"))


async def test_an_identity_token_is_traded_for_an_access_token(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, tmp_path: Path
) -> None:
    sim.auth.scheme, sim.auth.refresh_token = "bearer", "identity-token"
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"auths": {sim.address: {"identitytoken": "identity-token"}}}))
    client = await clients.make(docker_config=str(path))
    assert await client.blob(image, blob, len(CONTENT), 1 << 20) == CONTENT
    [asked] = sim.of("token")
    assert asked.method == "POST"
    assert b"grant_type=refresh_token" in asked.body


async def test_a_basic_challenge_is_answered_and_remembered(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, logins: str
) -> None:
    sim.auth.scheme, sim.auth.username, sim.auth.password = "basic", "user", "hunter2"
    client = await clients.make(docker_config=logins)
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    assert len(sim.seen) == 3


async def test_a_password_changed_on_disk_is_picked_up(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, logins: str
) -> None:
    sim.auth.scheme, sim.auth.username, sim.auth.password = "basic", "user", "hunter2"
    client = await clients.make(docker_config=logins)
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    sim.auth.password = "rotated"
    with pytest.raises(RegistryDenied):
        await client.blob(image, blob, len(CONTENT), 1 << 20)
    Path(logins).write_text(docker_config(sim.address, "user", "rotated"))  # noqa: ASYNC240
    assert await client.blob(image, blob, len(CONTENT), 1 << 20) == CONTENT


@pytest.mark.parametrize("scheme", ["basic", "bearer"])
async def test_logins_are_tried_in_order_until_one_is_accepted(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, logins: str, scheme: str
) -> None:
    sim.auth.scheme, sim.auth.username, sim.auth.password = scheme, "user", "hunter2"
    remembered = RememberedLogins()
    for word in ("old", "older"):
        remembered.add(image.host, image.repository, Login("user", SecretBytes(word.encode())))
    remembered.add(image.host, "team/another", Login("user", SecretBytes(b"another")))
    client = await clients.make(docker_config=logins, remembered=remembered)
    assert await client.blob(image, blob, len(CONTENT), 1 << 20) == CONTENT
    asked = [seen.authorization for seen in sim.of("blobs" if scheme == "basic" else "token")]
    words = [base64.b64decode(sent[6:]).partition(b":")[2] for sent in asked if sent and sent.startswith("Basic ")]
    assert words == [b"older", b"old", b"hunter2"]
    sim.seen.clear()
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    assert sim.kinds() == ["blobs"]


async def test_a_token_that_opens_nothing_is_no_reason_not_to_try_the_next_login(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, logins: str, clock: FakeClock
) -> None:
    """Docker Hub gives any user a token, with what he may do in it."""
    sim.auth.scheme, sim.auth.username, sim.auth.password, sim.auth.generous = "bearer", "user", "hunter2", True
    remembered = RememberedLogins()
    for name in ("one", "two"):
        remembered.add(image.host, image.repository, Login(name, SecretBytes(b"word")))
    client = await clients.make(docker_config=logins, remembered=remembered)
    assert await client.blob(image, blob, len(CONTENT), 1 << 20) == CONTENT
    names = [base64.b64decode((seen.authorization or "")[6:]).partition(b":")[0] for seen in sim.of("token")]
    assert names == [b"two", b"one", b"user"]
    sim.seen.clear()
    clock.now += 400  # the token has expired
    assert await client.blob(image, blob, len(CONTENT), 1 << 20) == CONTENT
    assert len(sim.of("token")) == 1, "the one that opened something is asked first from then on"
    sim.auth.password = "changed"
    clock.now += 400
    with pytest.raises(RegistryDenied):
        await client.blob(image, blob, len(CONTENT), 1 << 20)


async def test_an_expired_login_of_a_provider_is_asked_for_anew_although_its_answer_was_to_be_kept(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, tmp_path: Path
) -> None:
    """Amazon's registry answers 403 without a challenge when a password has expired."""
    provider = {"name": "cloud", "matchImages": ["127.0.0.1:*", sim.address], "defaultCacheDuration": "12h"}
    provider["apiVersion"] = "credentialprovider.kubelet.k8s.io/v1"
    (tmp_path / "p.json").write_text(json.dumps({"kind": "CredentialProviderConfig", "providers": [provider]}))
    (tmp_path / "cloud").write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n")
    (tmp_path / "cloud").chmod(0o700)

    def answer(password: str) -> None:
        auth = {sim.address: {"username": "user", "password": password}}
        head = {"kind": "CredentialProviderResponse", "apiVersion": provider["apiVersion"], "cacheKeyType": "Registry"}
        (tmp_path / "answer").write_text(json.dumps(head | {"auth": auth}))

    answer("first")
    sim.auth.scheme, sim.auth.username, sim.auth.password = "basic", "user", "first"
    client = await clients.make(credential_providers=CredentialProviders(str(tmp_path / "p.json"), str(tmp_path)))
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    answer("second")
    sim.auth.password = "second"
    sim.fail(faults.status(403), on="blobs")
    sim.seen.clear()
    await client.blob(image, blob, len(CONTENT), 1 << 20)
    assert len(sim.seen) == 2


async def test_a_provider_whose_every_password_is_new_and_refused_is_asked_twice(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "docker-credential-new"
    answer = """echo '{"Username":"u","Secret":"'$(date +%N)'"}'"""
    helper.write_text(f"#!/bin/sh\necho >>{tmp_path}/runs\n{answer}\n")
    helper.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "config.json").write_text('{"credsStore": "new"}')
    sim.auth.scheme, sim.auth.username, sim.auth.password = "basic", "u", "another"
    client = await clients.make(docker_config=str(tmp_path / "config.json"))
    with pytest.raises(RegistryDenied):
        await client.blob(image, blob, len(CONTENT), 1 << 20)
    assert len((tmp_path / "runs").read_text()) == 3, "two that are sent, and one to see that it ends"
    assert len(sim.of("blobs")) == 3


@pytest.mark.allow_warnings
async def test_a_source_that_does_not_answer_is_no_reason_to_refuse_what_everybody_may_read(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"credsStore":"missing"}')
    client = await clients.make(docker_config=str(tmp_path / "config.json"), retries=1)
    sim.auth.scheme = "bearer"
    assert await client.blob(image, blob, len(CONTENT), 1 << 20) == CONTENT
    sim.auth.username, sim.auth.password = "user", "hunter2"
    sim.auth.tokens.clear()
    with pytest.raises(RegistryUnavailable, match="docker-credential-missing"):
        await client.blob(image, blob, len(CONTENT), 1 << 20)


@pytest.mark.parametrize("scheme", ["basic", "bearer"])
async def test_wrong_credentials_are_denied_without_being_shown(
    sim: SimRegistry,
    clients: Clients,
    image: Reference,
    blob: Digest,
    logins: str,
    scheme: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    sim.auth.scheme, sim.auth.username, sim.auth.password = scheme, "user", "something else"
    client = await clients.make(docker_config=logins)
    with pytest.raises(RegistryDenied) as caught:
        await client.blob(image, blob, len(CONTENT), 1 << 20)
    encoded = base64.b64encode(b"user:hunter2").decode()
    shown = f"{caught.value} {caught.value!r} {caught.value.__cause__!r} {caplog.text}"
    assert "hunter2" not in shown
    assert encoded not in shown


async def test_no_credentials_for_basic_is_denied_with_a_hint(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    sim.auth.scheme = "basic"
    client = await clients.make()
    with pytest.raises(RegistryDenied, match="docker_config"):
        await client.blob(image, blob, len(CONTENT), 1 << 20)


async def test_credentials_of_one_registry_are_not_sent_to_another(
    sim: SimRegistry, clients: Clients, blob: Digest, logins: str
) -> None:
    async with SimRegistry() as other:
        other.auth.scheme = "bearer"
        other.add_blob(CONTENT)
        client = await clients.make(docker_config=logins)
        reference = Reference.parse(f"{other.address}/team/app:1")
        assert await client.blob(reference, blob, len(CONTENT), 1 << 20) == CONTENT
        assert other.of("token")[0].authorization is None
    assert sim.seen == []


async def test_a_token_answer_at_the_limit_is_taken_and_one_above_is_not(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    def grow(response: faults.web.Response) -> None:
        assert isinstance(response.body, bytes)
        response.body = response.body.ljust(4096)

    sim.auth.scheme = "bearer"
    for limit in (4096, 4095):
        sim.fail(faults.changed(grow), on="token")
        client = await clients.make(Limits(token_bytes=limit))  # type: ignore[arg-type]
        if limit == 4096:
            assert await client.blob(image, blob, len(CONTENT), 1 << 20) == CONTENT
        else:
            with pytest.raises(LimitExceeded, match="token_bytes"):
                await client.blob(image, blob, len(CONTENT), 1 << 20)


async def test_an_endless_token_answer_is_refused(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    sim.auth.scheme = "bearer"
    sim.fail(faults.endless(), on="token")
    client = await clients.make()
    with pytest.raises(LimitExceeded, match="token_bytes"):
        await client.blob(image, blob, len(CONTENT), 1 << 20)


@pytest.mark.parametrize(
    "answer",
    [b"", b"{", b"[]", b'{"token":7}', b'{"token":""}', b'{"token":"a b"}', b'{"token":"a\\r\\nX: y"}', b"[" * 5000],
    ids=range(8),
)
async def test_a_broken_token_answer_is_denied(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, answer: bytes
) -> None:
    def replace(response: faults.web.Response) -> None:
        response.body = answer

    sim.auth.scheme = "bearer"
    sim.fail(faults.changed(replace), on="token")
    client = await clients.make()
    with pytest.raises(RegistryDenied):
        await client.blob(image, blob, len(CONTENT), 1 << 20)


async def test_a_busy_token_server_is_asked_again(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, clock: FakeClock
) -> None:
    sim.auth.scheme = "bearer"
    sim.fail(faults.status(429, Retry_After="7"), on="token")
    client = await clients.make()
    assert await client.blob(image, blob, len(CONTENT), 1 << 20) == CONTENT
    assert clock.slept == [7.0]


async def test_a_token_server_that_redirects_is_not_followed(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, logins: str
) -> None:
    async with SimRegistry() as thief:
        sim.auth.scheme, sim.auth.username = "bearer", "user"
        sim.fail(faults.status(307, Location=f"{thief.origin}/token"), on="token")
        client = await clients.make(docker_config=logins)
        with pytest.raises(RegistryDenied):
            await client.blob(image, blob, len(CONTENT), 1 << 20)
        assert thief.seen == []


@pytest.mark.parametrize("realm", ["", "ftp://host/token", "http://user:word@127.0.0.1/token", "/token", "http://[::1"])
async def test_a_realm_that_is_no_token_server_is_denied(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest, realm: str
) -> None:
    sim.fail(faults.status(401, WWW_Authenticate=f'Bearer realm="{realm}"'), on="blobs")
    client = await clients.make()
    with pytest.raises(RegistryDenied, match="no usable token server"):
        await client.blob(image, blob, len(CONTENT), 1 << 20)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


async def test_a_registry_with_tls_may_not_name_a_token_server_without(
    clients: Clients, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reference, "is_loopback", False)  # so that it is spoken to as any other host
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with SimRegistry(tls=server_context(authority)) as secure, SimRegistry() as plain:
        digest = Digest.parse(secure.add_blob(CONTENT))
        reference = Reference.parse(f"{secure.address}/team/app:1")
        client = await clients.make(ca_file=str(tmp_path / "ca.pem"))
        assert await client.blob(reference, digest, len(CONTENT), 1 << 20) == CONTENT
        secure.auth.scheme, secure.auth.realm = "bearer", f"{plain.origin}/token"
        with pytest.raises(RegistryDenied, match="without TLS"):
            await client.blob(reference, digest, len(CONTENT), 1 << 20)
        assert plain.seen == []


async def test_an_unknown_certificate_is_refused_at_once_with_a_hint(
    clients: Clients, authority: trustme.CA, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reference, "is_loopback", False)
    async with SimRegistry(tls=server_context(authority)) as secure:
        client = await clients.make()
        with pytest.raises(RegistryUnavailable, match="ca_file"):
            await client.manifest(Reference.parse(f"{secure.address}/team/app:1"))
    assert clock.slept == []


async def test_a_ca_file_that_is_none_is_a_config_error(clients: Clients, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(ConfigError, match="ca_file"):
            await clients.make(ca_file=str(tmp_path / name))


# parsers


def test_challenges_of_all_shapes() -> None:
    assert parse_challenges(['Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"']) == [
        ("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"})
    ]
    assert parse_challenges(['BASIC Realm = "a \\"quoted\\" one", charset=UTF-8']) == [
        ("basic", {"realm": 'a "quoted" one', "charset": "UTF-8"})
    ]
    assert [c.scheme for c in parse_challenges(['Negotiate, Bearer realm="x", Basic realm="y"', "NTLM abc=="])] == [
        "negotiate",
        "bearer",
        "basic",
        "ntlm",
    ]
    assert parse_challenges(["", ",,", "=", 'realm="x"']) == []
    assert parse_challenges(['Bearer realm="unclosed']) == [("bearer", {})]
    assert parse_challenges(["Basic realm=x", "y" * 9000]) == [("basic", {"realm": "x"})]


async def test_a_missing_docker_config_is_a_config_error(
    sim: SimRegistry, clients: Clients, image: Reference, blob: Digest
) -> None:
    sim.auth.scheme = "basic"
    client = await clients.make(docker_config="/nonexistent/config.json")
    with pytest.raises(ConfigError, match="No such file"):
        await client.blob(image, blob, len(CONTENT), 1 << 20)
