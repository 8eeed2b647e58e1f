"""The image service of the kubelet: calls go through unchanged, and logins are kept of pulls that work."""

import asyncio
import base64
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapshotter.api.cri_pb2 import AuthConfig, ImageSpec, PullImageRequest
from snapshotter.config import ImageService as Settings
from snapshotter.config import Limits
from snapshotter.credentials.remembered import RememberedLogins
from snapshotter.errors import ConfigError, SnapshotterError, Unavailable
from snapshotter.service.image_service import ImageService, read_login
from tests.harness.logs import everything

PULL = "/runtime.v1.ImageService/PullImage"


class Backend(grpc.GenericRpcHandler):
    """containerd's place: answers what a test says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes, dict[str, str | bytes], float | None]] = []
        self.refusal: grpc.StatusCode | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.cancelled = asyncio.Event()

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        method = details.method

        async def answer(request: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
            self.asked.append((method, request, dict(context.invocation_metadata() or ()), context.time_remaining()))
            await context.send_initial_metadata((("first", "1"),))
            context.set_trailing_metadata((("last-bin", b"\x00\xff"),))
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            if self.refusal is not None:
                await context.abort(self.refusal, "no such image", (("last-bin", b"\x00\xff"),))
            return b"answer to " + request

        return grpc.unary_unary_rpc_method_handler(answer)


class Shared:
    """What was handed to the others."""

    def __init__(self) -> None:
        self.sets: list[list[bytes]] = []
        self.error: SnapshotterError | None = None

    async def share_logins(self, memfd: int) -> None:
        if self.error:
            raise self.error
        known = RememberedLogins()
        known.load(memfd)
        self.sets.append([login.secret.expose() for login in await known.find("h.example", "team/app", fresh=False)])


class Rig:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.backend, self.shared, self.remembered = Backend(), Shared(), RememberedLogins()
        self.listen = path / "sub" / "kubelet.sock"

    async def start(self) -> None:
        self.server = grpc.aio.server(handlers=(self.backend,))
        self.server.add_insecure_port(f"unix:{self.path}/containerd.sock")
        await self.server.start()
        settings = Settings(listen=str(self.listen), backend=f"{self.path}/containerd.sock")
        self.service = ImageService(settings, Limits(), self.remembered, self.shared)
        await self.service.start()
        self.channel = grpc.aio.insecure_channel(f"unix:{self.listen}")

    async def stop(self) -> None:
        await self.channel.close()
        await self.service.stop(0)
        await self.server.stop(0)

    def call(self, method: str, request: bytes, **options: Any) -> "grpc.aio.UnaryUnaryCall[bytes, bytes]":
        start: Any = self.channel.unary_unary(method)
        call: grpc.aio.UnaryUnaryCall[bytes, bytes] = start(request, **options)
        return call


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    await rig.start()
    yield rig
    await rig.stop()


def pull(word: str = "", image: str = "h.example/team/app:1", **auth: str) -> bytes:
    if word:
        auth |= {"username": "user", "password": word}
    return PullImageRequest(image=ImageSpec(image=image), auth=AuthConfig(**auth) if auth else None).SerializeToString()


async def test_calls_go_through_as_they_are(rig: Rig) -> None:
    request = bytes(range(256))
    call = rig.call("/any.Service/Method", request, metadata=(("key", "v"), ("k-bin", b"\xff")), timeout=30)
    assert await call == b"answer to " + request
    assert ("first", "1") in [(key, value) for key, value in await call.initial_metadata()]
    assert ("last-bin", b"\x00\xff") in [(key, value) for key, value in await call.trailing_metadata()]
    [(method, asked, metadata, seconds)] = rig.backend.asked
    assert (method, asked, metadata["key"], metadata["k-bin"]) == ("/any.Service/Method", request, "v", b"\xff")
    assert seconds is not None
    assert 0 < seconds < 31  # gRPC rounds what it sends up
    assert rig.listen.stat().st_mode & 0o777 == 0o600


async def test_refusals_go_through_as_they_are(rig: Rig) -> None:
    rig.backend.refusal = grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.call("/runtime.v1.ImageService/RemoveImage", b"x")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "no such image")
    assert ("last-bin", b"\x00\xff") in [(key, value) for key, value in caught.value.trailing_metadata()]


async def test_giving_up_goes_through(rig: Rig) -> None:
    rig.backend.gate.clear()
    call = rig.call(PULL, pull("word"))
    while not rig.backend.asked:  # noqa: ASYNC110 - a few turns of the loop
        await asyncio.sleep(0.01)
    call.cancel()
    await asyncio.wait_for(rig.backend.cancelled.wait(), 10)


async def test_a_containerd_that_is_away_is_unavailable_until_it_is_back(rig: Rig) -> None:
    await rig.server.stop(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.call(PULL, pull("word"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_login_of_a_pull_is_remembered_before_it_goes_on_and_shared(rig: Rig) -> None:
    rig.backend.gate.clear()
    call = rig.call(PULL, pull("word"))
    while not rig.backend.asked:  # noqa: ASYNC110 - a few turns of the loop
        await asyncio.sleep(0.01)
    assert rig.backend.asked[0][1] == pull("word")
    assert rig.shared.sets == [[b"word"]]
    rig.backend.gate.set()
    await call
    await rig.call(PULL, pull("word"))
    await rig.call(PULL, pull("newer"))
    await rig.call(PULL, pull())
    assert rig.shared.sets[-1] == [b"newer", b"word"]


async def test_the_login_of_a_pull_that_fails_is_forgotten(rig: Rig) -> None:
    await rig.call(PULL, pull("word"))
    rig.backend.refusal = grpc.StatusCode.UNKNOWN
    for word in ("wrong", "word"):
        with pytest.raises(grpc.aio.AioRpcError):
            await rig.call(PULL, pull(word))
    assert rig.shared.sets[-1] == [b"word"], "one that has worked stays"


@pytest.mark.allow_warnings
async def test_nothing_about_logins_fails_a_pull(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.shared.error = Unavailable("blobd does not answer")
    assert await rig.call(PULL, pull("hunter2"))
    for request in (b"\xff\xff", pull("hunter2", image="/bad/"), pull(auth="%%%"), pull("hunter2" * 10_000)):
        assert await rig.call(PULL, request) == b"answer to " + request
    assert "hunter2" not in everything(caplog.records)


def test_logins_are_read_as_containerd_reads_them() -> None:
    def found(**auth: str) -> tuple[str, str, str, bytes] | None:
        sent = read_login(pull(**auth), 1 << 16)
        return sent and (
            sent.reference.host,
            sent.reference.repository,
            sent.login.username,
            sent.login.secret.expose(),
        )

    encoded = base64.b64encode(b"user:a:b").decode()
    assert found(auth=encoded) == ("h.example", "team/app", "user", b"a:b")
    assert found(identity_token="token") == ("h.example", "team/app", "", b"token")
    assert found(word="word", server_address="https://h.example/v2/") == ("h.example", "team/app", "user", b"word")
    assert found(word="word", server_address="other.example") is None
    assert found(image="busybox", word="word", server_address="https://index.docker.io/v1/") == (
        "docker.io", "library/busybox", "user", b"word"
    )  # fmt: skip
    assert found() is None
    assert found(username="user") is None
    assert found(auth=base64.b64encode(b"user:").decode()) is None
    assert found(auth=base64.b64encode(b":").decode()) is None
    assert read_login(b"", 10) is None


@pytest.mark.parametrize("name", ["file/s", "file", "containerd.sock"])
async def test_a_socket_that_cannot_be_bound_is_a_config_error_and_nothing_is_removed(rig: Rig, name: str) -> None:
    (rig.path / "file").write_text("")
    settings = Settings(listen=str(rig.path / name))
    service = ImageService(settings, Limits(), RememberedLogins(), Shared())
    with pytest.raises(ConfigError, match=r"image_service\.listen"):
        await service.start()
    await service.stop(0)
    assert {"file", "containerd.sock"} <= set(os.listdir(rig.path))


async def test_the_socket_of_a_process_that_was_killed_is_replaced(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    service = ImageService(Settings(listen=str(path)), Limits(), RememberedLogins(), Shared())
    await service.start()
    await service.stop(0)
