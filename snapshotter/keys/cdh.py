"""Keys from a Confidential Data Hub (CDH) that runs in this guest.

Over its ttrpc socket it opens packets itself (UnWrapKey, so it may ask any key service it knows) or hands out the KEK
(GetResource); over the guest's REST endpoint it does the latter.
"""

from typing import Final

from snapshotter import config
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import ConfigError, KeyDenied, Unavailable
from snapshotter.keys import ttrpc
from snapshotter.keys.http import KeyService
from snapshotter.keys.packet import PacketKeys
from snapshotter.keys.protocol import ProviderKeys, TtrpcService
from snapshotter.keys.provider import KeyProvider
from snapshotter.keys.resource import RESOURCE_BYTES, Resources, ResourceUri, denying
from snapshotter.registry.retry import Clock, SystemClock, Transient

_UNIX: Final = "unix://"


class CdhResources:
    """CDH's GetResource over ttrpc."""

    def __init__(self, client: ttrpc.Client) -> None:
        self._client = client

    async def get(self, uri: ResourceUri) -> SecretBytes:
        """See Resources."""
        answer = await self._client.call("api.GetResourceService", "GetResource", ttrpc.text_field(1, str(uri)))
        with denying("CDH"):
            return _resource(ttrpc.last_bytes(ttrpc.parse(answer), 1), uri)


class CdhRestResources:
    """GET /cdh/resource/… of api-server-rest, loopback only."""

    def __init__(self, url: str, clock: Clock, timeout_seconds: float = ttrpc.TIMEOUT_SECONDS) -> None:
        """Raises ConfigError."""
        self._service = KeyService(url, clock, option="keys.cdh.address", loopback_only=True)
        self._clock = clock
        self._timeout_seconds = timeout_seconds

    async def get(self, uri: ResourceUri) -> SecretBytes:
        """See Resources. A 500 is how it says no, and how it says that the KBS is away."""
        deadline = self._clock.monotonic() + self._timeout_seconds
        path = f"/cdh/resource/{uri.path}"
        try:
            reply = await self._service.call("GET", path, deadline=deadline, limit=RESOURCE_BYTES)
        except Transient as error:
            raise Unavailable(f"CDH {error}") from None
        if reply.status != 200:
            raise KeyDenied(f"CDH {self._service.name}: {uri}: answers {reply.status}")
        return _resource(reply.body, uri)


def provider(settings: config.Cdh, *, accept_a256ctr: bool) -> KeyProvider:
    """The provider behind `settings.address`. Raises ConfigError."""
    if settings.unwrap == "here":
        return PacketKeys(resources(settings), accept_a256ctr=accept_a256ctr)
    if not settings.address.startswith(_UNIX):
        raise ConfigError('config: keys.cdh.unwrap: must be "here" with a REST address, which only has resources')
    opener = TtrpcService(_client(settings), "CDH")
    return ProviderKeys({"attestation-agent": opener}, accept_a256ctr=accept_a256ctr)


def resources(settings: config.Cdh) -> Resources:
    """The resources behind `settings.address`. Raises ConfigError."""
    if settings.address.startswith(_UNIX):
        return CdhResources(_client(settings))
    return CdhRestResources(settings.address, SystemClock())


def _client(settings: config.Cdh) -> ttrpc.Client:
    path = settings.address.removeprefix(_UNIX)
    if not path.startswith("/"):
        raise ConfigError("config: keys.cdh.address: must be unix:///path or http://127.0.0.1:port")
    return ttrpc.Client(path)


def _resource(raw: bytes, uri: ResourceUri) -> SecretBytes:
    if not raw or len(raw) > RESOURCE_BYTES:
        raise KeyDenied(f"CDH: {uri}: is empty or longer than {RESOURCE_BYTES} bytes")
    return SecretBytes(raw)
