"""One HTTP exchange: TLS, proxies, timeouts, and every failure as a typed error. No authentication, no redirects.

HTTP/1.1 over several kept connections per host. Nothing here follows, remembers or sends anything by itself: cookies,
netrc, decompression and automatic redirects are off. Errors name method and host, never a path or query, since
redirect targets carry signatures there.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from typing import Self, TypeAlias, TypeVar

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from snapshotter.config import Registry
from snapshotter.errors import RegistryUnavailable
from snapshotter.registry.endpoint import Endpoint
from snapshotter.registry.proxies import proxy_for
from snapshotter.registry.retry import Clock, Transient
from snapshotter.registry.tls import TlsContexts

_MAX_HEADER_BYTES = 16 << 10  # signed URLs in Location are long
_DRAIN_BYTES = 64 << 10  # bodies of redirects and errors that are worth reading to keep the connection
_DRAIN_SECONDS = 1.0
_HURRIED_SHARE = 1 / 3  # of the usual patience
_KEEP_SECONDS = 60.0  # an idle connection; a TLS handshake costs two round trips

_T = TypeVar("_T")
Body: TypeAlias = bytes | AsyncIterator[bytes]


class Answer:
    """Status and headers of a response, and its body piece by piece."""

    def __init__(self, response: aiohttp.ClientResponse, what: str, deadline: float, clock: Clock) -> None:
        self._response = response
        self._what = what
        self._deadline = deadline
        self._clock = clock
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self.url = response.url

    def values(self, name: str) -> list[str]:
        """All values of a header that may be repeated."""
        return list(self._response.headers.getall(name, ()))

    async def read(self) -> bytes:
        """The next piece of the body, b"" at its end. Raises Transient when it stalls or is cut."""
        return await guarded(self._what, self._deadline - self._clock.monotonic(), self._response.content.readany())

    async def read_all(self, limit: int) -> bytes | None:
        """The rest of the body; None, and the connection dropped, if it is longer than `limit`."""
        pieces: list[bytes] = []
        size = 0
        while piece := await self.read():
            size += len(piece)
            if size > limit:
                self.drop()
                return None
            pieces.append(piece)
        return b"".join(pieces)

    async def discard(self) -> None:
        """Read away a small body so that the connection can be used again, else drop it.

        The body of a 416 is not waited for: docker-registry 2.8 announces the blob's length there and sends less.
        """
        length = self.headers.get("Content-Length", "")
        short = len(length) <= 6 and length.isascii() and length.isdigit() and int(length) <= _DRAIN_BYTES
        try:
            if not short or self.status == 416:
                return
            await guarded(self._what, _DRAIN_SECONDS, self._response.read())
        except RegistryUnavailable:
            pass
        finally:
            if not self._response.content.at_eof():
                self.drop()

    def drop(self) -> None:
        """Give the connection up together with whatever the server still sends."""
        self._response.close()


class Wire:
    """Connections to registries, token servers and redirect targets."""

    def __init__(self, config: Registry, tls: TlsContexts, user_agent: str, clock: Clock) -> None:
        self._config = config
        self._tls = tls
        self._headers = {"User-Agent": user_agent, "Accept-Encoding": "identity"}
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                limit_per_host=self._config.connections,
                keepalive_timeout=_KEEP_SECONDS,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # would also read netrc and send its passwords to redirect targets
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        url: URL,
        *,
        headers: Mapping[str, str],
        via: Endpoint,
        deadline: float,
        body: Body | None = None,
        patience_seconds: float | None = None,
        hurries: bool = False,
    ) -> AsyncIterator[Answer]:
        """Send one request. Raises Transient when there is no answer until `deadline` (on the clock's monotonic).

        `via`: the host whose TLS counts, also where it redirects to. `patience_seconds`: how long the server may be
        silent, instead of `progress_timeout_seconds`. `hurries`: it is given up sooner, as others can be asked.
        """
        if self._session is None:
            raise RuntimeError("registry client is used outside its context")
        what = f"{method} {url.scheme}://{(url.raw_host or '')[:100]}"
        proxy, proxy_headers = proxy_for(url)
        request = self._session.request(
            method,
            url,
            headers={**self._headers, **headers, **({} if url.scheme == "https" else proxy_headers)},
            data=body,
            allow_redirects=False,
            proxy=proxy,
            proxy_headers=proxy_headers,  # of a CONNECT; a plain request carries them itself
            ssl=self._tls.get(via.tls),
            timeout=self._timeout(via, patience_seconds, hurries),
        )
        response = await guarded(what, deadline - self._clock.monotonic(), request)
        try:
            yield Answer(response, what, deadline, self._clock)
        except BaseException:
            response.close()
            raise
        finally:
            # A body that was read to its end leaves the connection usable; an unread one closes it.
            response.release()

    def _timeout(self, via: Endpoint, patience_seconds: float | None, hurries: bool) -> aiohttp.ClientTimeout:
        share = _HURRIED_SHARE if hurries else 1.0
        return aiohttp.ClientTimeout(
            total=None,  # the deadline covers retries too, so the caller keeps it
            sock_connect=via.connect_seconds or self._config.connect_timeout_seconds * share,
            sock_read=patience_seconds or self._config.progress_timeout_seconds * share,
        )


async def guarded(what: str, seconds: float, operation: Awaitable[_T]) -> _T:
    """Turn what can go wrong on a connection into Transient, or RegistryUnavailable where trying again is useless.

    Causes are cut off: their texts hold URLs.
    """
    try:
        async with asyncio.timeout(seconds):
            return await operation
    except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
        raise RegistryUnavailable(
            f"{what}: TLS failed: {_reason(error.__cause__)}",
            hint="set registry.ca_file, or registry.plain_http for a registry without TLS",
        ) from None
    except aiohttp.ClientConnectorError as error:
        raise Transient(f"{what}: cannot connect: {_reason(error.os_error)}") from None
    except TimeoutError:
        raise Transient(f"{what}: no answer in time") from None
    except ValueError:  # aiohttp.InvalidURL, and UnicodeError for a host that IDNA cannot encode
        raise RegistryUnavailable(f"{what}: not a usable URL") from None
    except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
        raise Transient(f"{what}: {_reason(error)}") from None


def _reason(error: BaseException | None) -> str:
    if isinstance(error, ssl.SSLError):
        return str(getattr(error, "verify_message", "") or error.reason or "handshake")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return {
        "ServerDisconnectedError": "connection closed",
        "ClientPayloadError": "body cut short",
        "ClientResponseError": "not HTTP",
    }.get(type(error).__name__, type(error).__name__)
