"""The ttrpc client against a server written from the wire format."""

import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from snapshotter.errors import KeyDenied, MalformedImage, SnapshotterError, Unavailable
from snapshotter.keys import ttrpc
from tests.harness.ttrpc import TtrpcServer

SERVICE, METHOD = "test.Service", "Echo"


async def echo(payload: bytes) -> tuple[int, bytes]:
    return 0, payload


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[TtrpcServer]:
    async with TtrpcServer(tmp_path / "t.sock", {(SERVICE, METHOD): echo}) as running:
        yield running


def test_the_request_of_a_published_vector() -> None:
    payload = ttrpc.text_field(1, "kbs:///default/key/1")
    assert ttrpc.encode_request("api.GetResourceService", "GetResource", payload).hex() == (
        "0000003d00000001010"
        "00a166170692e4765745265736f7572636553657276696365120b4765745265736f75726365"
        "1a160a146b62733a2f2f2f64656661756c742f6b65792f31"
    )


@pytest.mark.parametrize("size", [0, 1, 127, 128, 70_000, (4 << 20) - 100])
async def test_payloads_of_any_size_come_back(server: TtrpcServer, size: int) -> None:
    payload = bytes(size)
    assert await ttrpc.Client(str(server.path)).call(SERVICE, METHOD, payload) == payload


async def test_a_request_that_nobody_would_take(server: TtrpcServer) -> None:
    with pytest.raises(KeyDenied, match="longer"):
        await ttrpc.Client(str(server.path)).call(SERVICE, METHOD, bytes(4 << 20))
    assert not server.calls


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [(13, ttrpc.Refused, "INTERNAL"), (99, ttrpc.Refused, "status 99"), (14, Unavailable, "UNAVAILABLE")],
)
async def test_error_statuses_are_named_and_their_words_are_not(
    server: TtrpcServer, code: int, kind: type[SnapshotterError], text: str
) -> None:
    async def fail(_: bytes) -> tuple[int, bytes]:
        return code, b"canary"

    server.handlers[SERVICE, METHOD] = fail
    with pytest.raises(kind, match=text) as caught:
        await ttrpc.Client(str(server.path)).call(SERVICE, METHOD, b"")
    assert "canary" not in repr(caught.value)


async def test_unknown_methods(server: TtrpcServer) -> None:
    with pytest.raises(ttrpc.Refused) as caught:
        await ttrpc.Client(str(server.path)).call(SERVICE, "Other", b"")
    assert caught.value.code == ttrpc.UNIMPLEMENTED


async def test_a_service_that_is_silent_or_away(server: TtrpcServer, tmp_path: Path) -> None:
    server.silent = True
    with pytest.raises(Unavailable, match="no answer"):
        await ttrpc.Client(str(server.path), timeout_seconds=0.2).call(SERVICE, METHOD, b"")
    with pytest.raises(Unavailable, match="No such file"):
        await ttrpc.Client(str(tmp_path / "absent")).call(SERVICE, METHOD, b"")


def frame(body: bytes, *, length: int | None = None, stream: int = 1, kind: int = 2) -> bytes:
    return struct.pack(">IIBB", len(body) if length is None else length, stream, kind, 0) + body


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"", Unavailable),
        (frame(b"")[:9], Unavailable),
        (frame(b"", length=7), Unavailable),
        (frame(b"", length=(4 << 20) + 1), KeyDenied),
        (frame(b"", stream=3), KeyDenied),
        (frame(b"", kind=1), KeyDenied),
        (frame(b"", kind=3), KeyDenied),
        (frame(b"\xff" * 12), KeyDenied),
        (frame(b"\x0a"), KeyDenied),
        (frame(b"\x0a\x7f"), KeyDenied),
        (frame(b"\x08\x01"), KeyDenied),  # status as a number
        (frame(b"\x10\x01"), KeyDenied),  # payload as a number
        (frame(b"\x0a\x02\x0a\x00"), KeyDenied),  # code as bytes
        (frame(b"\x0b"), KeyDenied),  # a group
        (frame(b"\x02\x00"), KeyDenied),  # field 0
    ],
    ids=str,
)
async def test_answers_that_are_not_ttrpc(server: TtrpcServer, raw: bytes, kind: type[SnapshotterError]) -> None:
    server.raw = raw
    with pytest.raises(kind):
        await ttrpc.Client(str(server.path)).call(SERVICE, METHOD, b"")


def test_fields_of_every_wire_type() -> None:
    message = b"\x08\x96\x01" + b"\x11" + bytes(8) + b"\x1d" + bytes(4) + ttrpc.bytes_field(4, b"a") + b"\x22\x01b"
    assert ttrpc.parse(message) == {1: [150], 2: [bytes(8)], 3: [bytes(4)], 4: [b"a", b"b"]}
    assert ttrpc.last_bytes(ttrpc.parse(message), 4) == b"b"
    for size in range(1, len(message)):
        try:
            ttrpc.parse(message[:size])
        except MalformedImage:
            continue
