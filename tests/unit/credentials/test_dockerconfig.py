"""A docker config.json: its own logins, and the helpers that it names."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshotter.credentials.dockerconfig import DockerConfig
from snapshotter.credentials.executable import Executables
from snapshotter.errors import ConfigError, Unavailable
from tests.harness.sim_registry import docker_config


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a shell script into PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")

    def write(name: str, text: str) -> Path:
        path = directory / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(stat.S_IRWXU)
        return path

    return write


async def find(path: Path, content: object, host: str, *, seconds: float = 20.0) -> list[tuple[str, bytes]]:
    path /= "config.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    config = DockerConfig(str(path), Executables(1024, seconds))
    logins = await config.find(host, "team/app", fresh=False)
    assert all(login.secret.expose().decode() not in repr(login) for login in logins)
    return [(login.username, login.secret.expose()) for login in logins]


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("registry.example", "registry.example"),
        ("https://registry.example", "registry.example"),
        ("http://registry.example/v2/", "registry.example"),
        ("registry.example:5000/v1/", "registry.example:5000"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
    ],
)
async def test_registries_are_named_in_many_ways(name: str, host: str, tmp_path: Path) -> None:
    content = docker_config(name, "user", "a:b").encode()
    assert await find(tmp_path, content, host) == [("user", b"a:b")]
    assert await find(tmp_path, content, "other.example") == []


@pytest.mark.parametrize("name", ["registry.example/team", "registry.example.evil", "evil-registry.example"])
async def test_logins_of_something_else_are_not_used(name: str, tmp_path: Path) -> None:
    assert await find(tmp_path, docker_config(name, "user", "word").encode(), "registry.example") == []


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b'{"auths":[]}', b'{"auths":{"h":7}}', b'{"auths":{"h":{"auth":"%%"}}}',
        b'{"auths":{"h":{"username":"\\ud800","password":"x"}}}', b"\xff", b"[" * 100_000,
        b'{"credsStore":7}', b'{"credsStore":"../../bin/sh"}', b'{"credHelpers":{"h":"a/b"}}', b" " * ((1 << 20) + 1),
    ],
    ids=range(12),
)  # fmt: skip
async def test_a_broken_file_is_a_config_error_that_shows_nothing(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        await find(tmp_path, content, "h")
    assert str(caught.value).endswith("config.json: not a docker config.json")


async def test_a_helper_is_asked_for_its_host_and_the_store_for_all_others(
    tmp_path: Path, program: Callable[[str, str], Path]
) -> None:
    for name in ("cloud", "store"):
        program(
            f"docker-credential-{name}",
            f'read server; echo "{{\\"Username\\":\\"{name}\\",\\"Secret\\":\\"$1 $server\\"}}"',
        )
    config = {"credHelpers": {"a.example": "cloud"}, "credsStore": "store", "auths": {"b.example": {}}}
    assert await find(tmp_path, config, "a.example") == [("cloud", b"get a.example")]
    assert await find(tmp_path, config, "b.example") == [("store", b"get b.example")]
    assert await find(tmp_path, config, "docker.io") == [("store", b"get https://index.docker.io/v1/")]


async def test_a_helper_may_have_a_token_or_nothing(tmp_path: Path, program: Callable[[str, str], Path]) -> None:
    program("docker-credential-token", """echo '{"Username":"<token>","Secret":"abc"}'""")
    program("docker-credential-none", "echo 'credentials not found in native keychain'; exit 1")
    assert await find(tmp_path, {"credsStore": "token"}, "h") == [("", b"abc")]
    both = json.loads(docker_config("h", "user", "word")) | {"credsStore": "none"}
    assert await find(tmp_path, both, "h") == [("user", b"word")]


@pytest.mark.parametrize(
    "script",
    [
        "echo hunter2; exit 1",
        "echo hunter2",
        """echo '{"Username":"hunter2"}'""",
        "exit 0",
        "yes hunter2",
        "echo hunter2; sleep 1000 & sleep 1000",
        "kill -9 $$",
    ],
)
async def test_a_helper_that_fails_floods_or_hangs_is_unavailable_and_not_quoted(
    tmp_path: Path, program: Callable[[str, str], Path], script: str
) -> None:
    program("docker-credential-bad", f"echo $$ >{tmp_path}/pid; {script}")
    with pytest.raises(Unavailable, match="credential program docker-credential-bad: ") as caught:
        await find(tmp_path, {"credsStore": "bad"}, "h", seconds=1.0 if "sleep" in script else 20.0)
    assert "hunter2" not in repr(caught.value)
    pid = (tmp_path / "pid").read_text().strip()
    assert not os.path.exists(f"/proc/{pid}")  # noqa: ASYNC240
    both = json.loads(docker_config("h", "user", "word")) | {"credsStore": "bad"}
    if "sleep" not in script:
        assert await find(tmp_path, both, "h") == [("user", b"word")]


async def test_a_helper_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        await find(tmp_path, {"credsStore": "missing"}, "h")
