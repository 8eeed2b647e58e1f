"""Pull secrets of a Kubernetes cluster: secrets of type kubernetes.io/dockerconfigjson, listed from its API.

The list is asked for when somebody needs a login and it is a minute old, or the logins in it were refused. While the
API does not answer, the last list counts.
"""

import asyncio
import base64
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
import msgspec
import structlog
from yarl import URL

from snapshotter.config import KubeSecrets
from snapshotter.credentials import kubeconfig
from snapshotter.credentials.dockerconfig import parse, read_entry
from snapshotter.credentials.login import Login
from snapshotter.credentials.matching import key_matches
from snapshotter.errors import SnapshotterError, Unavailable

log = structlog.get_logger(__name__)

_TYPE = "kubernetes.io/dockerconfigjson"
_KEY = ".dockerconfigjson"
_LIST_SECONDS = 60.0
_REFUSED_SECONDS = 5.0
_CALL_SECONDS = 10.0
_PAGE = 500
_MAX_PAGES = 1000


class _Secret(msgspec.Struct):
    data: dict[str, str] | None = None
    type: str = ""


class _Metadata(msgspec.Struct):
    next: str = msgspec.field(default="", name="continue")


class _SecretList(msgspec.Struct):
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)
    items: list[_Secret] = []


class KubernetesSecrets:
    """A `Logins` over the API of one cluster."""

    def __init__(self, config: KubeSecrets, max_bytes: int, now: Callable[[], float] = time.monotonic) -> None:
        """`max_bytes`: of one list."""
        self._config = config
        self._max_bytes = max_bytes
        self._now = now
        self._known: list[tuple[str, Login]] | None = None
        self._listed = -math.inf  # when the API was asked last
        self._reason = ""  # why it had no answer
        self._lock = asyncio.Lock()

    async def find(self, host: str, repository: str, *, fresh: bool) -> Sequence[Login]:
        """See Logins: those of the longest matching keys first, as the kubelet sorts them."""
        async with self._lock:
            age = self._now() - self._listed
            if age > (_REFUSED_SECONDS if fresh or self._known is None else _LIST_SECONDS):
                await self._refresh()
            if self._known is None:
                raise Unavailable(f"Kubernetes secrets cannot be listed: {self._reason}")
        return [login for key, login in self._known if key_matches(key, host, repository)]

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                found = [entry async for entry in self._list()]
        except (SnapshotterError, aiohttp.ClientError, OSError, TimeoutError, ValueError, RecursionError) as error:
            # Texts of the HTTP client may hold parts of requests.
            reason = str(error) if isinstance(error, SnapshotterError) else type(error).__name__
            self._reason = reason
            if self._known is not None:
                log.warning("Kubernetes secrets cannot be listed, the last list counts", error=reason)
        else:
            self._known = sorted(found, key=lambda entry: entry[0], reverse=True)
        self._listed = self._now()

    async def _list(self) -> AsyncIterator[tuple[str, Login]]:
        api = await asyncio.to_thread(kubeconfig.load, self._config.kubeconfig)
        left = self._max_bytes
        token = await asyncio.to_thread(api.token)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=api.tls, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Authorization": f"Bearer {token}"} if token else {},
        ) as session:
            for namespace in self._config.namespaces or ("",):
                path = f"/api/v1/namespaces/{namespace}/secrets" if namespace else "/api/v1/secrets"
                url = api.server.joinpath(path.lstrip("/"))
                following = ""
                for _ in range(_MAX_PAGES):
                    raw = await self._page(session, url, following, left)
                    left -= len(raw)
                    page = msgspec.json.decode(raw, type=_SecretList)
                    for secret in page.items:
                        for entry in _entries(secret):
                            yield entry
                    following = page.metadata.next
                    if not following:
                        break

    async def _page(self, session: aiohttp.ClientSession, url: URL, following: str, limit: int) -> bytes:
        query = {"fieldSelector": f"type={_TYPE}", "limit": str(_PAGE)}
        if self._config.label_selector:
            query["labelSelector"] = self._config.label_selector
        if following:
            query["continue"] = following
        async with session.get(url, params=query, allow_redirects=False) as answer:
            if answer.status != 200:
                raise Unavailable(f"the API answers {answer.status}")
            content = bytearray()
            while piece := await answer.content.readany():
                content += piece
                if len(content) > limit:
                    raise Unavailable("more than limits.kube_secrets_bytes")
            return bytes(content)


def _entries(secret: _Secret) -> list[tuple[str, Login]]:
    """The logins of one secret; one that is no docker config has none, which its owner sees in the cluster."""
    if secret.type != _TYPE:
        return []
    try:
        config = parse(base64.b64decode((secret.data or {}).get(_KEY, "")))
        auths = msgspec.convert(config.get("auths", {}), dict[str, Any])
        return [(key, login) for key, entry in auths.items() if (login := read_entry(entry)) is not None]
    except ValueError:
        return []
