"""Credential providers of the kubelet, and the patterns by which Kubernetes says for which images a login is."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from snapshotter.credentials.executable import Executables
from snapshotter.credentials.matching import key_matches, matches
from snapshotter.credentials.providers import CredentialProviders
from snapshotter.errors import ConfigError, Unavailable
from tests.harness.logs import everything

API = "credentialprovider.kubelet.k8s.io/v1"


class Cloud:
    """A directory with one provider, whose answers a test writes; every question is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.provider: dict[str, Any] = {
            "name": "cloud-provider",
            "matchImages": ["*.ecr.example", "other.example/team"],
            "defaultCacheDuration": "1h",
            "apiVersion": API,
            "args": ["get-credentials", "--flag=a b"],
            "env": [{"name": "PROFILE", "value": "blue"}],
        }
        self.now = 0.0
        script = directory / "cloud-provider"
        script.write_text(
            f'#!/bin/sh\ncd {directory}\n{{ cat; echo " $PROFILE $*"; }} >>asked\n. ./status\ncat answer\n'
        )
        script.chmod(stat.S_IRWXU)
        (directory / "status").write_text("")
        self.answer({"1.ecr.example": {"username": "user", "password": "first"}})

    def answer(self, auth: object, kind: str = "Registry", **more: object) -> None:
        response = {
            "kind": "CredentialProviderResponse", "apiVersion": API, "cacheKeyType": kind, "auth": auth, **more
        }  # fmt: skip
        (self.directory / "answer").write_text(json.dumps(response))

    def open(self, text: str | None = None) -> CredentialProviders:
        path = self.directory / "config.json"
        document = {"kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1"}
        path.write_text(text or json.dumps(document | {"providers": [self.provider]}))
        return CredentialProviders(str(path), str(self.directory), Executables(4096), lambda: self.now)

    @property
    def asked(self) -> list[str]:
        path = self.directory / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


async def secrets(providers: CredentialProviders, host: str, *, fresh: bool = False) -> list[bytes]:
    return [login.secret.expose() for login in await providers.find(host, "team/app", fresh=fresh)]


async def test_a_provider_is_asked_as_the_kubelet_asks_it(cloud: Cloud) -> None:
    providers = cloud.open()
    assert await secrets(providers, "1.ecr.example") == [b"first"]
    [asked] = cloud.asked
    question, _, rest = asked.partition("} ")
    assert json.loads(question + "}") == {
        "kind": "CredentialProviderRequest", "apiVersion": API, "image": "1.ecr.example/team/app"
    }  # fmt: skip
    assert rest == "blue get-credentials --flag=a b"
    assert await secrets(providers, "unknown.example") == []
    assert len(cloud.asked) == 1


async def test_answers_are_kept_as_long_as_they_say(cloud: Cloud) -> None:
    providers = cloud.open()
    await secrets(providers, "1.ecr.example")
    cloud.answer({"*.ecr.example": {"username": "user", "password": "second"}}, "Global", cacheDuration="10m")
    cloud.now = 3599
    assert await secrets(providers, "1.ecr.example") == [b"first"]
    cloud.now = 3600
    assert await secrets(providers, "1.ecr.example") == [b"second"]
    assert await secrets(providers, "2.ecr.example") == [b"second"]
    assert len(cloud.asked) == 2
    assert await secrets(providers, "2.ecr.example", fresh=True) == [b"second"]
    assert len(cloud.asked) == 3
    cloud.now += 601
    cloud.answer({"*.ecr.example": {"username": "user", "password": "third"}}, "Image", cacheDuration="0")
    for _ in range(2):
        assert await secrets(providers, "2.ecr.example") == [b"third"]
    assert len(cloud.asked) == 5


async def test_only_logins_for_the_image_are_taken_and_the_closest_first(cloud: Cloud) -> None:
    cloud.answer(
        {
            "*.ecr.example": {"username": "user", "password": "any"},
            "9.ecr.example": {"username": "user", "password": "another"},
            "1.ecr.example/team": {"username": "user", "password": "team"},
            "1.ecr.example/other": {"username": "user", "password": "other"},
            "1.ecr.example": {"username": "", "password": ""},
        }
    )
    assert await secrets(cloud.open(), "1.ecr.example") == [b"team", b"any"]


@pytest.mark.parametrize(
    ("status", "answer"),
    [("exit 3", None), ("", "hunter2"), ("", '{"kind":"Other"}'), ("yes hunter2", None)],
)
@pytest.mark.allow_warnings
async def test_a_provider_that_fails_is_unavailable_and_not_quoted(
    cloud: Cloud, status: str, answer: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    (cloud.directory / "status").write_text(status)
    if answer:
        (cloud.directory / "answer").write_text(answer)
    with pytest.raises(Unavailable, match="cloud-provider") as caught:
        await secrets(cloud.open(), "1.ecr.example")
    assert "hunter2" not in f"{caught.value!r} {everything(caplog.records)}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"apiVersion": "credentialprovider.kubelet.k8s.io/v1beta1"}, "apiVersion must be"),
        ({"name": "../sh"}, "name of a program"),
        ({"defaultCacheDuration": "soon"}, "not a duration"),
        ({"tokenAttributes": {}}, "tokens of pods"),
        ({"matchImages": 7}, "Expected `array`"),
    ],
)
async def test_a_configuration_that_is_wrong_is_refused(cloud: Cloud, change: dict[str, Any], words: str) -> None:
    providers = cloud.open()
    assert await secrets(providers, "1.ecr.example") == [b"first"]
    cloud.provider |= change
    cloud.open()
    with pytest.raises(ConfigError, match=words):
        await secrets(providers, "1.ecr.example")


async def test_a_configuration_that_is_no_json_is_refused_with_a_hint(cloud: Cloud) -> None:
    providers = cloud.open("kind: CredentialProviderConfig\nproviders: []\n")
    with pytest.raises(ConfigError, match="it must be JSON"):
        await secrets(providers, "1.ecr.example")


# patterns, as kubernetes keyring_test.go has them


@pytest.mark.parametrize(
    ("pattern", "image", "expected"),
    [
        ("kubernetes.io", "kubernetes.io/a", True),
        ("*.kubernetes.io", "prefix.kubernetes.io/a", True),
        ("prefix.*.io", "prefix.kubernetes.io/a", True),
        ("prefix.kubernetes.*", "prefix.kubernetes.io/a", True),
        ("*-good.kubernetes.io", "prefix-good.kubernetes.io/a", True),
        ("prefix.kubernetes.io/path", "prefix.kubernetes.io/path/a", True),
        ("*.kubernetes.io", "kubernetes.io/a", False),
        ("kubernetes.io", "prefix.kubernetes.io/a", False),
        ("*.io", "prefix.kubernetes.io/a", False),
        ("*kubernetes.io", "a.kubernetes.io/a", False),
        ("kubernetes.io:443", "kubernetes.io/a", False),
        ("kubernetes.io:443", "kubernetes.io:443/a", True),
        ("kubernetes.io", "kubernetes.io:80/a", False),
        ("kubernetes.io/other", "kubernetes.io/a", False),
        ("[^x]a.io", "ya.io/a", True),
        ("[^x]a.io", "xa.io/a", False),
    ],
)
def test_patterns(pattern: str, image: str, expected: bool) -> None:
    host, _, repository = image.partition("/")
    assert matches(pattern, host, repository) is expected


@pytest.mark.parametrize(
    ("key", "host", "expected"),
    [
        ("https://index.docker.io/v1/", "docker.io", True),
        ("docker.io/team", "docker.io", True),
        ("docker.io/other", "docker.io", False),
        ("https://h.example/v2/", "h.example", True),
        ("h.example/v2/team", "h.example", True),
        ("h.example/v2x", "h.example", False),
        ("", "h.example", False),
    ],
)
def test_keys_of_auths(key: str, host: str, expected: bool) -> None:
    assert key_matches(key, host, "team/app") is expected
