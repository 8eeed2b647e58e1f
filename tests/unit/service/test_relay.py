"""Bytes go through unchanged, both ways, at the receiver's pace; peers elsewhere are sent elsewhere."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from snapshotter import control
from snapshotter.service.relay import Relay
from tests.harness.machine import until

ECHO, REFUSAL = b"echo", b"refusal"


class Setup:
    """An echo server and a refusing one behind a relay."""

    def __init__(self, directory: Path) -> None:
        self.address = directory / "outer.sock"
        self.service, self.refusal = directory / "service.sock", directory / "refusal.sock"
        self.listener = control.bind(self.address, socket.SOCK_STREAM)
        self.relay = Relay(self.listener, self.service, self.refusal)
        self.held = asyncio.Event()

    async def start(self) -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(ECHO)  # gRPC's server speaks first, too
            await self.held.wait()
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.write(b"end")
            writer.close()

        async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(REFUSAL)
            writer.close()

        self.held.set()
        self.servers = [
            await asyncio.start_unix_server(echo, self.service),
            await asyncio.start_unix_server(refuse, self.refusal),
        ]
        self.relay.start()

    async def stop(self) -> None:
        await self.relay.stop()
        for server in self.servers:
            server.close()
            await server.wait_closed()
        self.listener.close()


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    found = Setup(tmp_path)
    await found.start()
    yield found
    await found.stop()


async def test_bytes_both_ways_and_half_a_close(setup: Setup) -> None:
    reader, writer = await asyncio.open_unix_connection(setup.address)
    assert await reader.readexactly(4) == ECHO
    data = os.urandom(5 << 20)

    async def send() -> None:
        writer.write(data)
        await writer.drain()
        writer.write_eof()

    sending = asyncio.create_task(send())
    assert await reader.readexactly(len(data)) == data
    assert await reader.read() == b"end"
    await sending
    writer.close()
    await writer.wait_closed()


async def test_a_connection_that_both_have_ended_is_given_back(setup: Setup) -> None:
    for _ in range(20):
        reader, writer = await asyncio.open_unix_connection(setup.address)
        assert await reader.readexactly(4) == ECHO
        writer.close()
        await writer.wait_closed()
    await asyncio.to_thread(until, lambda: not setup.relay._open, "both ends are closed", 10)


async def test_a_receiver_that_does_not_read_stops_the_sender(setup: Setup) -> None:
    setup.held.clear()
    reader, writer = await asyncio.open_unix_connection(setup.address)
    assert await reader.readexactly(4) == ECHO
    sock = socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))
    sent, stuck = 0, 0
    while stuck < 20:  # until nothing more goes out for a while
        try:
            sent += sock.send(bytes(65536), socket.MSG_DONTWAIT)
            stuck = 0
        except BlockingIOError:
            stuck += 1
        await asyncio.sleep(0.01)
    sock.close()
    assert sent < 4 << 20, "what is not read is not kept in memory"
    setup.held.set()
    writer.close()
    await writer.wait_closed()


async def test_a_lost_server_ends_the_connection(setup: Setup) -> None:
    reader, writer = await asyncio.open_unix_connection(setup.address)
    assert await reader.readexactly(4) == ECHO
    await setup.relay.stop()
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_connections_wait_for_the_next_process(setup: Setup) -> None:
    await setup.relay.pause()
    reader, writer = await asyncio.open_unix_connection(setup.address)
    setup.relay = Relay(setup.listener, setup.service, setup.refusal)
    setup.relay.start()
    assert await reader.readexactly(4) == ECHO
    writer.close()
    await writer.wait_closed()


READ = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(100).decode(), end='')"


@pytest.mark.root
@pytest.mark.allow_warnings
@pytest.mark.parametrize(("wrapper", "expected"), [([], ECHO), (["unshare", "--mount"], REFUSAL)])
async def test_a_client_in_another_mount_namespace_is_refused(
    setup: Setup, wrapper: list[str], expected: bytes
) -> None:
    command = [*wrapper, sys.executable, "-c", READ, str(setup.address)]
    result = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True)
    assert result.stdout == expected


@pytest.mark.allow_warnings
@pytest.mark.parametrize("pid", [0, 2**22 - 1])
async def test_a_client_that_cannot_be_seen_is_refused(setup: Setup, monkeypatch: pytest.MonkeyPatch, pid: int) -> None:
    """Gone already, or (pid 0) in a process namespace above ours."""
    monkeypatch.setattr(control, "peer_pid", lambda _: pid)
    reader, writer = await asyncio.open_unix_connection(setup.address)
    assert await reader.read() == REFUSAL
    writer.close()
    await writer.wait_closed()


@pytest.mark.allow_warnings
async def test_no_server_behind_it(setup: Setup) -> None:
    setup.servers[0].close()
    setup.service.unlink(missing_ok=True)
    reader, writer = await asyncio.open_unix_connection(setup.address)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_peers_without_root_are_hung_up_on(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "peer_is_root", lambda _: False)
    reader, writer = await asyncio.open_unix_connection(setup.address)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
