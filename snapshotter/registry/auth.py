"""How a registry is told who asks: challenges, logins, bearer tokens and their cache.

Credentials go to the registry they are configured for and to the token server (realm) it names, nowhere else: never
across a redirect, never over plain HTTP unless the registry itself is spoken to that way. Errors and reprs show none.
Sources: RFC 9110 §11, distribution docs/spec/auth/token.md and oauth.md.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias
from urllib.parse import urlencode

import msgspec
import structlog
from yarl import URL

from snapshotter.config import Limits
from snapshotter.credentials.login import Login, Logins
from snapshotter.errors import LimitExceeded, RegistryDenied, SnapshotterError, Unavailable
from snapshotter.registry.endpoint import Endpoint, Scope
from snapshotter.registry.retry import TRANSIENT_STATUS, Clock, Transient, retry_after_seconds
from snapshotter.registry.wire import Answer, Wire

_MAX_CHALLENGE = 8 << 10  # characters of all WWW-Authenticate headers of an answer
_MAX_GRANTS = 1024
_DEFAULT_TOKEN_SECONDS = 60.0  # token.md: when expires_in is absent
_LONGEST_TOKEN_SECONDS = 3600.0
_MARGIN_SECONDS = 10.0  # so that a token does not expire on its way
_RENEWAL_SECONDS = 30.0  # for a renewal that nobody waits for
_RENEWAL_PAUSE_SECONDS = 5.0  # between two of them
_CLIENT_ID = "coco-snapshotter"

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME = re.compile(rf"[\s,]*({_WORD})(?=[\s,]|\Z)(?!\s*=)")
_TOKEN68 = re.compile(r"[ \t]+[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|\Z)")
_PARAMETER = re.compile(rf'[\s,]*({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))')
_BEARER_TOKEN = re.compile(r"[!-~]+")


log = structlog.get_logger(__name__)

_Key: TypeAlias = tuple[Endpoint, Scope]


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


class _TokenAnswer(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""
    expires_in: float | None = None


@dataclass(slots=True)
class _Grant:
    """An Authorization header and the challenge that it answers."""

    header: str = field(repr=False)
    challenge: Challenge
    renew_at: float  # from then on somebody should get a new one
    expires: float
    used: tuple[Login, ...] = ()  # the login it was got with, after those whose headers were refused
    more: bool = False  # there are logins that have not been used


class Authenticator:
    """Authorization headers by registry and scope.

    One request at a time asks for one, and all who want it wait for that. A header is renewed in the background when
    two thirds of its life are over, so that nobody waits while it still works.
    """

    def __init__(self, wire: Wire, logins: Logins, limits: Limits, clock: Clock) -> None:
        self._wire = wire
        self._logins = logins
        self._limits = limits
        self._clock = clock
        self._grants: OrderedDict[_Key, _Grant] = OrderedDict()
        self._flights: dict[_Key, asyncio.Task[str]] = {}

    async def close(self) -> None:
        """Give up requests on their way."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def header(self, endpoint: Endpoint, scope: Scope, deadline: float) -> str | None:
        """What to send with a request; None while the registry never asked."""
        key = (endpoint, scope)
        grant = self._grants.get(key)
        if grant is None:
            return None
        now = self._clock.monotonic()
        if now >= grant.expires:
            return await self._renewed(key, grant.challenge, frozenset(), deadline)
        if now >= grant.renew_at and key not in self._flights:
            grant.renew_at = now + _RENEWAL_PAUSE_SECONDS  # should it fail
            self._fly(key, grant.challenge, frozenset(), now + _RENEWAL_SECONDS)
        return grant.header

    async def renew(
        self,
        endpoint: Endpoint,
        scope: Scope,
        challenges: Sequence[str],
        rejected: frozenset[str],
        deadline: float,
    ) -> bool:
        """Answer a 401 (or a 403) to a request with the headers `rejected`, the last ones that were sent for it.

        `challenges`: the WWW-Authenticate headers; when a registry sends none, its earlier challenge counts. Returns
        whether another login may be worth another call. Raises RegistryDenied when there is nothing better to say.
        """
        key = (endpoint, scope)
        challenge = _choose(parse_challenges(challenges))
        if challenge is None and (known := self._grants.get(key)):
            challenge = known.challenge
        if challenge is None:
            raise RegistryDenied(f"registry {endpoint.host}: access to {scope} denied")
        await self._renewed(key, challenge, rejected, deadline)
        found = self._grants.get(key)
        return challenge.scheme == "basic" or (found is not None and found.more)

    async def _renewed(self, key: _Key, challenge: Challenge, rejected: frozenset[str], deadline: float) -> str:
        """A header that is not one of the rejected, except where a token server gives the same token again."""
        known = self._grants.get(key)
        if known is not None and known.header not in rejected and self._clock.monotonic() < known.expires:
            return known.header  # somebody else was faster
        joined = self._flights.get(key)
        header = await self._wait(joined or self._fly(key, challenge, rejected, deadline), deadline)
        if joined is not None and header in rejected:
            header = await self._wait(self._flights.get(key) or self._fly(key, challenge, rejected, deadline), deadline)
        return header

    async def _wait(self, flight: "asyncio.Task[str]", deadline: float) -> str:
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock.monotonic())):
                return await asyncio.shield(flight)
        except TimeoutError:
            raise Transient("token server: no answer in time") from None

    def _fly(self, key: _Key, challenge: Challenge, rejected: frozenset[str], deadline: float) -> "asyncio.Task[str]":
        flight = self._flights[key] = asyncio.create_task(self._grant(key, challenge, rejected, deadline))
        flight.add_done_callback(lambda flight: flight.cancelled() or flight.exception())  # whoever waited may be gone
        return flight

    async def _grant(self, key: _Key, challenge: Challenge, rejected: frozenset[str], deadline: float) -> str:
        endpoint, scope = key
        used: tuple[Login, ...] = ()
        more = False
        try:
            if known := self._grants.get(key):  # a token server hands any user a token, with less in it
                used = known.used if known.header in rejected else known.used[:-1]
                if known.header in rejected:
                    del self._grants[key]
            if challenge.scheme == "basic":
                header, seconds = await self._basic(endpoint, scope, rejected), _LONGEST_TOKEN_SECONDS
            else:
                (header, seconds), login, more = await self._bearer(endpoint, scope, challenge, used, deadline)
                used = (*used, login) if login is not None and login not in used else used
        except SnapshotterError as error:
            log.info("access was not granted", registry=endpoint.host, scope=str(scope), error=str(error))
            raise
        finally:
            del self._flights[key]
        now = self._clock.monotonic()
        self._grants[key] = _Grant(
            header, challenge, now + seconds * 2 / 3, now + seconds - _MARGIN_SECONDS, used, more
        )  # fmt: skip
        self._grants.move_to_end(key)
        while len(self._grants) > _MAX_GRANTS:
            self._grants.popitem(last=False)
        return header

    async def _basic(self, endpoint: Endpoint, scope: Scope, rejected: frozenset[str]) -> str:
        logins = await self._find(endpoint, scope, fresh=bool(rejected))
        headers = [login.basic() for login in logins if login.username]
        if not headers:
            raise RegistryDenied(
                f"registry {endpoint.host}: wants a user name and password",
                hint="set registry.docker_config or another source of credentials",
            )
        for header in headers:
            # Passwords that are new each time end, too: every login had its known one and a fresh one refused.
            if header not in rejected and len(rejected) < 2 * len(headers):
                return header
        raise RegistryDenied(f"registry {endpoint.host}: refuses the configured user name and password")

    async def _bearer(
        self, endpoint: Endpoint, scope: Scope, challenge: Challenge, used: Sequence[Login], deadline: float
    ) -> tuple[tuple[str, float], Login | None, bool]:
        """A token for the first login that the token server accepts; for nobody if there is no login.

        Logins that were `used` come last. Also returns whose it is, and whether there are others.
        """
        refused: list[Login] = []
        for fresh in (False, True):
            failure: Transient | None = None
            try:
                logins: Sequence[Login | None] = await self._find(endpoint, scope, fresh=fresh) or [None]
            except Transient as error:  # perhaps everybody may read this
                logins, failure = [None], error
            for login in sorted(logins, key=lambda login: login in used):
                if login is None or login not in refused:
                    try:
                        token = await self._token(endpoint, scope, challenge, login, deadline)
                        others = [other for other in logins if other not in (*used, *refused, login)]
                        return token, login, bool(others) and login not in used
                    except RegistryDenied as error:
                        refusal = failure or error
                        refused += [login] if login else []
            if not refused:
                break
        raise refusal

    async def _find(self, endpoint: Endpoint, scope: Scope, *, fresh: bool) -> Sequence[Login]:
        """Raises Transient when somebody who would have to be asked does not answer."""
        try:
            return await self._logins.find(endpoint.host, scope.repository, fresh=fresh)
        except Unavailable as error:
            raise Transient(str(error)) from None

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
