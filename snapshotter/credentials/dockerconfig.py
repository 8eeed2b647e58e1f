"""Credentials as Docker keeps them: the `auths` of a config.json, and the helpers that it names.

Sources: docker/cli cli/config, docker-credential-helpers.
"""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from snapshotter.credentials.executable import Executables
from snapshotter.credentials.login import DOCKER_HUB, Login
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import ConfigError, Unavailable

_MAX_BYTES = 1 << 20
_HUB_HOSTS = ("index.docker.io", "registry-1.docker.io")
_HUB_SERVER = "https://index.docker.io/v1/"  # how Docker Hub is called by helpers
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NOT_FOUND = b"credentials not found"
_FOR_TOKEN = "<token>"  # noqa: S105 - the user name of an identity token


class _Answer(msgspec.Struct, rename="pascal"):
    """What a helper says."""

    username: str = ""
    secret: str = ""


class _Entry(msgspec.Struct):
    """One registry in `auths`."""

    username: str = ""
    password: str = ""
    auth: str = ""
    identitytoken: str = ""


class DockerConfig:
    """Read anew each time: short-lived passwords are rotated in place."""

    def __init__(self, path: str, executables: Executables) -> None:
        """`path` "": no credentials."""
        self._path = path
        self._executables = executables

    async def find(self, host: str, repository: str, *, fresh: bool) -> Sequence[Login]:  # noqa: ARG002 - see Logins
        """See Logins. The helper for the host, or else the store, comes before the file itself."""
        if not self._path:
            return ()
        config = self._read()
        found: list[Login] = []
        failure: Unavailable | None = None
        if name := helper_for(config, host) or config.get("credsStore"):
            try:
                found += await self._ask(name, host)
            except Unavailable as error:
                failure = error
        try:
            found += logins(config, host)
        except ValueError:
            raise self._bad() from None
        if failure is not None and not found:
            raise failure
        return found

    def _read(self) -> dict[str, Any]:
        try:
            with Path(self._path).open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"config: registry.docker_config {self._path}: {error.strerror}") from None
        try:
            return parse(content)
        except ValueError:
            raise self._bad() from None

    def _bad(self) -> ConfigError:
        return ConfigError(f"config: registry.docker_config {self._path}: not a docker config.json")

    async def _ask(self, name: object, host: str) -> Sequence[Login]:
        """The login that helper `name` has for `host`."""
        if not isinstance(name, str) or not _HELPER.fullmatch(name):
            raise self._bad()
        program = f"docker-credential-{name}"
        server = _HUB_SERVER if host == DOCKER_HUB else host
        status, output = await self._executables.ask([program, "get"], server.encode())
        if status and _NOT_FOUND in output.lower():
            return ()
        try:
            answer = msgspec.json.decode(output, type=_Answer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            answer = _Answer()
        if status or not answer.secret:
            raise Unavailable(f"credential program {program}: ends with {status} and has no credentials")
        username = "" if answer.username == _FOR_TOKEN else answer.username
        return [Login(username, SecretBytes(answer.secret.encode()))]


def parse(content: bytes) -> dict[str, Any]:
    """Raises ValueError."""
    if len(content) > _MAX_BYTES:
        raise ValueError("longer than any docker config.json")
    try:
        config = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(config, dict):
        raise ValueError("not an object")
    return config


def helper_for(config: dict[str, Any], host: str) -> object:
    """The helper that is named for `host`; None if there is none."""
    helpers = config.get("credHelpers")
    if not isinstance(helpers, dict):
        return None
    return next((name for server, name in helpers.items() if same_registry(server, host)), None)


def logins(config: dict[str, Any], host: str) -> list[Login]:
    """What the `auths` of a document have for `host`. Raises ValueError."""
    auths = config.get("auths", {})
    if not isinstance(auths, dict):
        raise ValueError("auths is not an object")
    entry = next((entry for name, entry in auths.items() if same_registry(name, host)), None)
    login = None if entry is None else read_entry(entry)
    return [] if login is None else [login]


def read_entry(entry: object) -> Login | None:
    """One entry of `auths`; None if there is no login in it. Raises ValueError."""
    found = msgspec.convert(entry, _Entry)
    if found.identitytoken:
        return Login("", SecretBytes(found.identitytoken.encode()))
    username, password = found.username, found.password
    if found.auth:
        username, _, password = base64.b64decode(found.auth, validate=True).decode().partition(":")
    username.encode()  # a lone surrogate of JSON is no text that could be sent
    return Login(username, SecretBytes(password.encode())) if username and password else None


def same_registry(name: str, host: str) -> bool:
    """Docker writes `host[:port]`, a URL of it, or for Docker Hub `https://index.docker.io/v1/`."""
    bare, _, path = name.removeprefix("https://").removeprefix("http://").partition("/")
    if path.strip("/") not in ("", "v1", "v2"):
        return False
    return (DOCKER_HUB if bare in _HUB_HOSTS else bare.lower()) == host
