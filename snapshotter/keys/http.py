"""Requests to a key service: one connection each, everything bounded, nothing followed or remembered.

Key requests are rare, so no connection is kept. Errors name method, host and path (paths hold names, never secrets).
"""

import asyncio
import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Final

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from snapshotter import __version__
from snapshotter.errors import ConfigError, KeyDenied, Unavailable
from snapshotter.registry.retry import TRANSIENT_STATUS, Clock, Transient, retry_after_seconds

_CONNECT_SECONDS = 10.0
_HEADER_BYTES: Final = 16 << 10


@dataclass(frozen=True, slots=True)
class Reply:
    """A final answer, whatever its status."""

    status: int
    body: bytes = field(repr=False)
    cookies: Mapping[str, str] = field(repr=False)


class KeyService:
    """One base URL. HTTPS, or plain HTTP to loopback only."""

    def __init__(self, url: str, clock: Clock, *, option: str, ca_file: str = "", loopback_only: bool = False) -> None:
        """`ca_file`: PEM of the only authorities to trust. Raises ConfigError naming `option`."""
        self._clock = clock
        self._base = _base(url, option)
        local = is_loopback(self._base.host or "")
        if not local and (loopback_only or self._base.scheme == "http"):
            raise ConfigError(f"config: {option}: {'loopback only' if loopback_only else 'plain HTTP is for loopback'}")
        self._tls: ssl.SSLContext | None = None
        if self._base.scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=ca_file or None)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"config: {option}: ca_file {ca_file}: {error.strerror or 'not PEM'}") from error
        self.name = f"{self._base.host}:{self._base.port}"

    async def call(
        self,
        method: str,
        path: str,
        *,
        deadline: float,
        limit: int,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Reply:
        """One exchange until `deadline` (clock.monotonic).

        Raises Transient for no answer, 408, 429 and 5xx; Unavailable for TLS that fails; KeyDenied for an answer longer
        than `limit` bytes.
        """
        what = f"{method} {self.name}{path}"
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock.monotonic())):
                return await self._exchange(what, method, path, body, headers, query, limit)
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError):
            raise Unavailable(f"{what}: TLS failed", hint="is its authority the configured one?") from None
        except TimeoutError:
            raise Transient(f"{what}: no answer in time") from None
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise Transient(f"{what}: {reason}") from None

    async def _exchange(
        self,
        what: str,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str] | None,
        query: Mapping[str, str] | None,
        limit: int,
    ) -> Reply:
        connector = aiohttp.TCPConnector(ssl=self._tls if self._tls else True, force_close=True)
        async with (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                max_line_size=_HEADER_BYTES,
                max_field_size=_HEADER_BYTES,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            ) as session,
            session.request(
                method,
                self._base.with_path(path).with_query(query),
                data=body,
                headers={"User-Agent": f"coco-snapshotter/{__version__}", "Accept-Encoding": "identity"}
                | ({"Content-Type": "application/json"} if body is not None else {})
                | dict(headers or {}),
                allow_redirects=False,
            ) as response,
        ):
            if response.status in TRANSIENT_STATUS:
                pause = retry_after_seconds(response.headers.get("Retry-After"), self._clock.time())
                raise Transient(f"{what}: answers {response.status}", retry_after_seconds=pause)
            content = bytearray()
            while piece := await response.content.readany():
                content += piece
                if len(content) > limit:
                    raise KeyDenied(f"{what}: answers more than {limit} bytes")
            return Reply(response.status, bytes(content), _cookies(response.headers.getall("Set-Cookie", ())))


def _base(url: str, option: str) -> URL:
    try:
        base = URL(url)
        usable = base.scheme in ("http", "https") and bool(base.host) and base.port is not None
    except ValueError:
        usable = False
    if not usable or base.path not in ("", "/") or base.query or base.user or base.password or base.fragment:
        raise ConfigError(f"config: {option}: must be http(s)://host[:port] and nothing else")
    return base


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _cookies(values: object) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values if isinstance(values, list | tuple) else ():
        try:
            found |= {name: morsel.value for name, morsel in SimpleCookie(value).items()}
        except CookieError:
            continue
    return found
