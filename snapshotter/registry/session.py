"""Requests as a registry expects them: authorised, redirected, and each refusal as its own error.

Redirects are followed by hand: Authorization only ever goes to the registry's own origin, HTTPS never steps down, and
the signed target of a blob is used again until it expires or refuses.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress

from yarl import URL

from snapshotter.errors import NotFound, RegistryDenied, RegistryUnavailable
from snapshotter.registry import redirects
from snapshotter.registry.auth import Authenticator
from snapshotter.registry.endpoint import Endpoint, Scope
from snapshotter.registry.retry import TRANSIENT_STATUS, Clock, Transient, retry_after_seconds
from snapshotter.registry.wire import Answer, Body, Wire

_STALE_TARGET_STATUS = frozenset({400, 401, 403, 404})  # S3 answers 400 ExpiredToken


class Session:
    """Sends requests to registries."""

    def __init__(self, wire: Wire, authenticator: Authenticator, clock: Clock) -> None:
        self._wire = wire
        self._authenticator = authenticator
        self._clock = clock
        self._targets = redirects.RedirectCache()
        self._renewals: dict[Hashable, asyncio.Event] = {}  # targets that somebody asks for anew

    @asynccontextmanager
    async def send(
        self,
        endpoint: Endpoint,
        method: str,
        url: URL,
        *,
        what: str,
        scope: Scope,
        deadline: float,
        expect: Collection[int],
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Body] | None = None,
        remember: Hashable = None,
        patience_seconds: float | None = None,
        hurries: bool = False,
    ) -> AsyncIterator[Answer]:
        """Yield the answer if its status is in `expect`.

        `what` names the object in errors; `body` makes the content anew for each try; `remember` is the key under
        which the target of a redirect may be used again. Redirects of requests with a body are refused. `hurries`:
        see Wire. Raises Transient, RegistryDenied, NotFound, RegistryUnavailable.
        """
        first, hops, resolved_again = url, 0, False
        rejected: frozenset[str] = frozenset()
        may_renew = True
        if remember is not None:
            url = self._targets.get(remember, self._clock.monotonic()) or first
        with ExitStack() as turn:
            while True:
                own = redirects.same_origin(url, endpoint.url)
                authorization = await self._authenticator.header(endpoint, scope, deadline) if own else None
                answered = False
                try:
                    async with self._wire.exchange(
                        method,
                        url,
                        headers={
                            **(endpoint.own_headers if own else {}),
                            **(headers or {}),
                            **({"Authorization": authorization} if authorization else {}),
                        },
                        via=endpoint,
                        deadline=deadline,
                        body=body() if body else None,
                        patience_seconds=patience_seconds,
                        hurries=hurries,
                    ) as answer:
                        answered = True
                        if answer.status in expect:
                            yield answer
                            return
                        await answer.discard()
                except RegistryUnavailable:
                    if not answered:
                        self._targets.drop(remember, url)  # the next try asks the registry for another one
                    raise
                # Only now, with the connection given back, ask anything else.
                denied = answer.status == 401 or (answer.status == 403 and authorization is not None)
                if answer.status in redirects.REDIRECT_STATUS and body is None and hops < redirects.MAX_HOPS:
                    hops += 1
                    url = redirects.next_hop(what, url, answer.headers.get("Location"))
                    self._remember(remember, endpoint, url)
                elif not own and answer.status in _STALE_TARGET_STATUS and not resolved_again:
                    resolved_again, hops = True, 0
                    self._targets.drop(remember, url)
                    url = await self._newer_target(remember, deadline, turn) or first
                elif own and denied and may_renew:
                    rejected |= {authorization} if authorization else set()
                    challenges = answer.values("WWW-Authenticate")
                    may_renew = await self._authenticator.renew(endpoint, scope, challenges, rejected, deadline)
                else:
                    self._targets.drop(remember, url)
                    raise self._refusal(what, answer)

    def _remember(self, key: Hashable, endpoint: Endpoint, url: URL) -> None:
        if key is not None and not redirects.same_origin(url, endpoint.url):
            life = redirects.lifetime_seconds(url, self._clock.time())
            self._targets.put(key, url, self._clock.monotonic() + life)
            self._let_others(key)

    async def _newer_target(self, key: Hashable, deadline: float, turn: ExitStack) -> URL | None:
        """The target that somebody else has got meanwhile, or gets; None if it is our turn, until `turn` ends."""
        if key is None:
            return None
        if busy := self._renewals.get(key):
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, deadline - self._clock.monotonic())):
                    await busy.wait()
        newer = self._targets.get(key, self._clock.monotonic())
        if newer is None and key not in self._renewals:
            self._renewals[key] = asyncio.Event()
            turn.callback(self._let_others, key)
        return newer

    def _let_others(self, key: Hashable) -> None:
        if busy := self._renewals.pop(key, None):
            busy.set()

    def _refusal(self, what: str, answer: Answer) -> Exception:
        status = answer.status
        if status in TRANSIENT_STATUS:
            pause = retry_after_seconds(answer.headers.get("Retry-After"), self._clock.time())
            return Transient(f"{what}: registry answers {status}", retry_after_seconds=pause)
        if status in (401, 403):
            return RegistryDenied(f"{what}: registry answers {status}")
        if status == 404:
            return NotFound(f"{what}: not in the registry")
        if status in redirects.REDIRECT_STATUS:
            return RegistryUnavailable(f"{what}: too many redirects, or a redirect of an upload")
        return RegistryUnavailable(f"{what}: registry answers {status}")
