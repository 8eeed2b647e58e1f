"""A CRI image service between the kubelet and containerd, for the sake of the logins in its pulls.

Every call goes on to containerd as it came, and the answers come back, byte for byte; of a PullImage the image and the
login are read on the way. They are remembered before the pull goes on, since it makes containerd ask us for layers, and
forgotten when it fails.
"""

import asyncio
import base64
import os
import socket
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias
from urllib.parse import quote

import grpc
import structlog
from google.protobuf.message import DecodeError

from snapshotter import control
from snapshotter.api.cri_pb2 import AuthConfig, PullImageRequest
from snapshotter.config import ImageService as Settings
from snapshotter.config import Limits
from snapshotter.credentials.dockerconfig import same_registry
from snapshotter.credentials.login import Login
from snapshotter.credentials.remembered import RememberedLogins
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import ConfigError, SnapshotterError
from snapshotter.registry.reference import Reference

log = structlog.get_logger(__name__)

_MAX_MESSAGE = 16 << 20  # as containerd's
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", _MAX_MESSAGE),
    ("grpc.max_reconnect_backoff_ms", 3000),
    ("grpc.default_authority", "localhost"),
)
_PULL = "ImageService/PullImage"
_OWN_METADATA = ("user-agent", "grpc-")  # each connection has its own

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]


class Sharing(Protocol):
    """Who else needs the logins: blobd, and successors of this process."""

    async def share_logins(self, memfd: int) -> None: ...


class _Sent(NamedTuple):
    """A login that came with a pull."""

    reference: Reference
    login: Login


class ImageService:
    """Serves between `start` and `stop`."""

    def __init__(self, settings: Settings, limits: Limits, remembered: RememberedLogins, sharing: Sharing) -> None:
        self._listen = Path(settings.listen)
        self._limit = limits.credential_bytes
        self._remembered = remembered
        self._sharing = sharing
        self._turn = asyncio.Lock()  # the last set that is shared is the newest
        self._server = grpc.aio.server(handlers=(_Everything(self._relay),), options=_OPTIONS)
        self._channel = grpc.aio.insecure_channel(f"unix:{quote(settings.backend)}", options=_OPTIONS)

    async def start(self) -> None:
        """Raises ConfigError if the socket cannot be bound."""
        before = os.umask(0o022)
        try:
            self._listen.parent.mkdir(parents=True, exist_ok=True)
            os.umask(0o177)
            control.remove_stale(str(self._listen), socket.SOCK_STREAM)  # of the process before this one
            self._server.add_insecure_port(f"unix:{quote(str(self._listen))}")
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", "") or "cannot be bound"
            raise ConfigError(f"config: registry.image_service.listen {self._listen}: {reason}") from None
        finally:
            os.umask(before)
        await self._server.start()
        log.info("image service for the kubelet", listen=str(self._listen))

    async def stop(self, grace: float) -> None:
        await self._server.stop(grace)
        await self._channel.close()

    async def _relay(
        self, method: str, requests: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[bytes, bytes]"
    ) -> AsyncIterator[bytes]:
        sent: list[tuple[_Sent, bool]] = []
        start: Any = self._channel.stream_stream(method)
        call: grpc.aio.StreamStreamCall[bytes, bytes] = start(
            self._noted(requests, sent) if method.endswith(_PULL) else requests,
            timeout=context.time_remaining(),
            metadata=_metadata(context.invocation_metadata()),
        )
        try:
            await context.send_initial_metadata(_metadata(await call.initial_metadata()))
            async for answer in call:
                yield answer
            code, details = await call.code(), str(await call.details())
            context.set_trailing_metadata(_metadata(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), str(error.details() or "")
            context.set_trailing_metadata(_metadata(error.trailing_metadata()))
        finally:
            call.cancel()
        if code is grpc.StatusCode.OK:
            await self._keep(sent)
        else:
            await self._forget(sent)
            await context.abort(code, details)

    async def _noted(self, requests: AsyncIterator[bytes], sent: list[tuple[_Sent, bool]]) -> AsyncIterator[bytes]:
        """The requests, after their logins have been remembered; new ones are put into `sent`."""
        async for request in requests:
            try:
                found = read_login(request, self._limit)
            except SnapshotterError as error:
                log.warning("login of a pull is not remembered", error=str(error))
                found = None
            if found is not None:
                reference, login = found
                is_new = self._remembered.add(reference.host, reference.repository, login)
                sent.append((found, is_new))
                if is_new:
                    log.info("login of a pull is remembered", registry=reference.host, repository=reference.repository)
                await self._share()
            yield request

    async def _keep(self, sent: Sequence[tuple[_Sent, bool]]) -> None:
        """After a pull that worked: another one with the same login, that failed, may have made us forget it."""
        again = [self._remembered.add(reference.host, reference.repository, login) for (reference, login), _ in sent]
        if any(again):
            await self._share()

    async def _forget(self, sent: Sequence[tuple[_Sent, bool]]) -> None:
        fresh = [found for found, is_new in sent if is_new]
        for reference, login in fresh:
            self._remembered.discard(reference.host, reference.repository, login)
        if fresh:
            await self._share()

    async def _share(self) -> None:
        async with self._turn:
            memfd = self._remembered.pack()
            try:
                await self._sharing.share_logins(memfd)
            except SnapshotterError as error:
                log.warning("logins of pulls are known to this process only", error=str(error))
            finally:
                os.close(memfd)


class _Everything(grpc.GenericRpcHandler):
    """Hands the bytes of every method to `relay`. On the wire, a call with one message is a stream of one."""

    def __init__(self, relay: Any) -> None:
        self._relay = relay

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        return grpc.stream_stream_rpc_method_handler(partial(self._relay, details.method))


def read_login(request: bytes, limit: int) -> _Sent | None:
    """The login of a PullImageRequest, for the repository of its image; None if it has none for that registry.

    Raises BadReference, and ConfigError for what cannot be a login; neither shows it.
    """
    try:
        pull = PullImageRequest.FromString(request)
    except DecodeError:
        raise ConfigError("pull: not a PullImageRequest") from None
    if not pull.HasField("auth"):
        return None
    if pull.auth.ByteSize() > limit:
        raise ConfigError(f"pull: a login of more than limits.credential_bytes = {limit}")
    reference = Reference.parse(pull.image.image)
    if pull.auth.server_address and not same_registry(pull.auth.server_address, reference.host):
        return None
    login = _login(pull.auth)
    return None if login is None else _Sent(reference, login)


def _login(auth: AuthConfig) -> Login | None:
    """As containerd reads it (CRI, ParseAuth); None without a password or token."""
    username, secret = auth.username, auth.password
    if not username and auth.identity_token:
        secret = auth.identity_token
    elif not username:
        try:
            username, _, secret = base64.b64decode(auth.auth, validate=True).decode().partition(":")
        except ValueError:
            raise ConfigError("pull: auth is not a user name and a password") from None
        secret = secret.strip("\0") if username else ""
    return Login(username, SecretBytes(secret.encode())) if secret else None


def _metadata(found: Any) -> "grpc.aio.Metadata":
    return grpc.aio.Metadata(*((key, value) for key, value in found or () if not key.startswith(_OWN_METADATA)))
