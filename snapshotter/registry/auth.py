"""How a registry is told who asks: challenges, credentials of a docker config.json, bearer tokens and their cache.

Credentials go to the registry they are configured for and to the token server (realm) it names, nowhere else: never
across a redirect, never over plain HTTP unless the registry itself is spoken to that way. Errors and reprs show none.
Sources: RFC 9110 §11, distribution docs/spec/auth/token.md and oauth.md.
"""

import asyncio
import base64
import binascii
import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urlencode
from weakref import WeakValueDictionary

import msgspec
from yarl import URL

from snapshotter.config import Limits
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import ConfigError, LimitExceeded, RegistryDenied
from snapshotter.registry.endpoint import Endpoint, Scope
from snapshotter.registry.reference import DOCKER_HUB
from snapshotter.registry.retry import TRANSIENT_STATUS, Clock, Transient, retry_after_seconds
from snapshotter.registry.wire import Answer, Wire

_MAX_CHALLENGE = 8 << 10  # characters of all WWW-Authenticate headers of an answer
_MAX_DOCKER_CONFIG = 1 << 20
_MAX_GRANTS = 1024
_DEFAULT_TOKEN_SECONDS = 60.0  # token.md: when expires_in is absent
_LONGEST_TOKEN_SECONDS = 3600.0
_CLIENT_ID = "coco-snapshotter"

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME = re.compile(rf"[\s,]*({_WORD})(?=[\s,]|\Z)(?!\s*=)")
_TOKEN68 = re.compile(r"[ \t]+[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|\Z)")
_PARAMETER = re.compile(rf'[\s,]*({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))')
_BEARER_TOKEN = re.compile(r"[!-~]+")


class Challenge(NamedTuple):
    """One demand of a WWW-Authenticate header; scheme and parameter names in lower case."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """Read WWW-Authenticate headers. What is malformed ends its header; nothing is raised."""
    challenges: list[Challenge] = []
    budget = _MAX_CHALLENGE
    for value in values:
        budget -= len(value)
        if budget < 0:
            break
        challenges.extend(_parse_header(value))
    return challenges


def _parse_header(value: str) -> list[Challenge]:
    challenges: list[Challenge] = []
    position = 0
    while scheme := _SCHEME.match(value, position):
        position = scheme.end()
        parameters: dict[str, str] = {}
        if skipped := _TOKEN68.match(value, position):
            position = skipped.end()
        while parameter := _PARAMETER.match(value, position):
            name, quoted, bare = parameter.groups()
            parameters.setdefault(name.lower(), bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted))
            position = parameter.end()
        challenges.append(Challenge(scheme[1].lower(), parameters))
    return challenges


@dataclass(frozen=True, slots=True)
class Login:
    """What is configured for one registry: user and password, or an identity token (`username` is then "")."""

    username: str
    secret: SecretBytes

    def basic(self) -> str:
        """Value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(self.username.encode() + b":" + self.secret.expose()).decode()


class Logins(Protocol):
    """Where credentials come from."""

    def find(self, host: str) -> Login | None:
        """For `host` as in a reference (`docker.io` for Docker Hub). Raises ConfigError."""


class DockerConfig:
    """The `auths` of a docker config.json, read anew each time: short-lived passwords are rotated in place."""

    def __init__(self, path: str) -> None:
        """`path` "": no credentials."""
        self._path = path

    def find(self, host: str) -> Login | None:
        if not self._path:
            return None
        try:
            with Path(self._path).open("rb") as file:
                content = file.read(_MAX_DOCKER_CONFIG + 1)
        except OSError as error:
            raise ConfigError(f"config: registry.docker_config {self._path}: {error.strerror}") from None
        return find_login(content, host, self._path)


def find_login(content: bytes, host: str, path: str) -> Login | None:
    """The login for `host` in a docker config.json. Raises ConfigError, which shows nothing of the content."""
    bad = ConfigError(f"config: registry.docker_config {path}: not a docker config.json")
    if len(content) > _MAX_DOCKER_CONFIG:
        raise bad
    try:
        auths = json.loads(content).get("auths", {})
        entry = next((entry for name, entry in auths.items() if _same_registry(name, host)), None)
        if entry is None:
            return None
        if token := entry.get("identitytoken", ""):
            return Login("", SecretBytes(token.encode()))
        username, password = entry.get("username", ""), entry.get("password", "")
        if auth := entry.get("auth", ""):
            username, _, password = base64.b64decode(auth, validate=True).decode().partition(":")
        return Login(username, SecretBytes(password.encode())) if username and password else None
    except (ValueError, AttributeError, TypeError, RecursionError, binascii.Error):
        raise bad from None


def _same_registry(name: str, host: str) -> bool:
    """Docker writes `host[:port]`, a URL of it, or for Docker Hub `https://index.docker.io/v1/`."""
    bare, _, path = name.removeprefix("https://").removeprefix("http://").partition("/")
    if path.strip("/") not in ("", "v1", "v2"):
        return False
    if bare in ("index.docker.io", "registry-1.docker.io"):
        bare = DOCKER_HUB
    return bare.lower() == host


class _TokenAnswer(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""
    expires_in: float | None = None


@dataclass(frozen=True, slots=True)
class _Grant:
    """An Authorization header, the challenge that it answers, and when to get a new one."""

    header: str = field(repr=False)
    challenge: Challenge
    expires: float


class Authenticator:
    """Authorization headers by registry and scope. Parallel requests wait for one token, not for one each."""

    def __init__(self, wire: Wire, logins: Logins, limits: Limits, clock: Clock) -> None:
        self._wire = wire
        self._logins = logins
        self._limits = limits
        self._clock = clock
        self._grants: OrderedDict[tuple[Endpoint, Scope], _Grant] = OrderedDict()
        self._locks: WeakValueDictionary[tuple[Endpoint, Scope], asyncio.Lock] = WeakValueDictionary()

    async def header(self, endpoint: Endpoint, scope: Scope, deadline: float) -> str | None:
        """What to send with a request, renewed before it expires; None while the registry never asked."""
        grant = self._grants.get((endpoint, scope))
        if grant is None:
            return None
        if self._clock.monotonic() < grant.expires:
            return grant.header
        return await self._grant(endpoint, scope, grant.challenge, grant.header, deadline)

    async def renew(
        self, endpoint: Endpoint, scope: Scope, challenges: Sequence[str], rejected: str | None, deadline: float
    ) -> None:
        """Answer a 401 (or a 403 to the header `rejected`). Raises RegistryDenied when there is nothing better to say.

        `challenges`: the WWW-Authenticate headers; when a registry sends none, its earlier challenge counts.
        """
        challenge = _choose(parse_challenges(challenges))
        if challenge is None and (known := self._grants.get((endpoint, scope))):
            challenge = known.challenge
        if challenge is None:
            raise RegistryDenied(f"registry {endpoint.host}: access to {scope} denied")
        await self._grant(endpoint, scope, challenge, rejected, deadline)

    async def _grant(
        self, endpoint: Endpoint, scope: Scope, challenge: Challenge, rejected: str | None, deadline: float
    ) -> str:
        key = (endpoint, scope)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            known = self._grants.get(key)
            if known and known.header != rejected and self._clock.monotonic() < known.expires:
                return known.header  # somebody else was faster
            self._grants.pop(key, None)
            login = self._logins.find(endpoint.host)
            if challenge.scheme == "basic":
                header, seconds = self._basic(endpoint, login, rejected), _LONGEST_TOKEN_SECONDS
            else:
                header, seconds = await self._token(endpoint, scope, challenge, login, deadline)
            # Renewed after two thirds of its life, so that it does not expire on its way.
            self._grants[key] = _Grant(header, challenge, self._clock.monotonic() + seconds * 2 / 3)
            while len(self._grants) > _MAX_GRANTS:
                self._grants.popitem(last=False)
            return header

    def _basic(self, endpoint: Endpoint, login: Login | None, rejected: str | None) -> str:
        if login is None or not login.username:
            raise RegistryDenied(
                f"registry {endpoint.host}: wants a user name and password", hint="set registry.docker_config"
            )
        header = login.basic()
        if header == rejected:
            raise RegistryDenied(f"registry {endpoint.host}: refuses the configured user name and password")
        return header

    async def _token(
        self, endpoint: Endpoint, scope: Scope, challenge: Challenge, login: Login | None, deadline: float
    ) -> tuple[str, float]:
        """A bearer token from the registry's token server, and its life in seconds."""
        realm = _realm(endpoint, challenge)
        # The challenge names what the refused request needs, `scope` what the next ones will.
        wanted = sorted({str(scope), *challenge.parameters.get("scope", "").split()})
        service = challenge.parameters.get("service", "")
        if login is not None and not login.username:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": login.secret.expose().decode(),
                "service": service,
                "client_id": _CLIENT_ID,
                "scope": " ".join(wanted),
            }
            headers = {**endpoint.own_headers, "Content-Type": "application/x-www-form-urlencoded"}
            body = urlencode(form).encode()
            call = self._wire.exchange("POST", realm, headers=headers, via=endpoint, deadline=deadline, body=body)
        else:
            query = [("service", service)] if service else []
            url = realm.extend_query([*query, *(("scope", one) for one in wanted)])
            headers = {**endpoint.own_headers, **({"Authorization": login.basic()} if login else {})}
            call = self._wire.exchange("GET", url, headers=headers, via=endpoint, deadline=deadline)
        async with call as answer:
            return await self._read_token(endpoint, answer)

    async def _read_token(self, endpoint: Endpoint, answer: Answer) -> tuple[str, float]:
        what = f"token server of {endpoint.host}"
        if answer.status in TRANSIENT_STATUS:
            pause = retry_after_seconds(answer.headers.get("Retry-After"), self._clock.time())
            raise Transient(f"{what}: answers {answer.status}", retry_after_seconds=pause)
        if answer.status != 200:
            raise RegistryDenied(f"{what}: answers {answer.status}")
        raw = await answer.read_all(self._limits.token_bytes)
        if raw is None:
            raise LimitExceeded(f"{what}: answer is larger than limits.token_bytes = {self._limits.token_bytes}")
        try:
            decoded = msgspec.json.decode(raw, type=_TokenAnswer)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            raise RegistryDenied(f"{what}: answer is not a token") from None
        token = decoded.token or decoded.access_token
        if not _BEARER_TOKEN.fullmatch(token):
            raise RegistryDenied(f"{what}: answer has no usable token")
        stated = _DEFAULT_TOKEN_SECONDS if decoded.expires_in is None else decoded.expires_in
        return f"Bearer {token}", min(max(stated, _DEFAULT_TOKEN_SECONDS), _LONGEST_TOKEN_SECONDS)


def _choose(challenges: Sequence[Challenge]) -> Challenge | None:
    for scheme in ("bearer", "basic"):
        for challenge in challenges:
            if challenge.scheme == scheme:
                return challenge
    return None


def _realm(endpoint: Endpoint, challenge: Challenge) -> URL:
    """Raises RegistryDenied for a realm that credentials must not be sent to."""
    try:
        realm = URL(challenge.parameters.get("realm", "")).with_fragment(None)
        usable = bool(realm.host) and realm.user is None and realm.password is None
    except ValueError:
        usable = False
    if not usable or realm.scheme not in ("http", "https"):
        raise RegistryDenied(f"registry {endpoint.host}: names no usable token server")
    if realm.scheme == "http" and endpoint.url.scheme != "http":
        raise RegistryDenied(f"registry {endpoint.host}: names a token server without TLS")
    return realm
