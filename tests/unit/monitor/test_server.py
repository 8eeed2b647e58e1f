"""The monitor address with stand-ins for the rest of the node: it answers in time whatever they do."""

import asyncio
import json
import os
import socket
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from snapshotter import config, control
from snapshotter.errors import ConfigError
from snapshotter.monitor.node import State
from snapshotter.monitor.server import Monitor
from snapshotter.monitor.trail import Trail
from snapshotter.service.interceptors import ErrorInterceptor
from tests.harness.metrics import Metric, get, parse


class Node:
    """A snapshotd without anything."""

    broken: Exception | None = None
    asked = 0

    def state(self) -> State:
        self.asked += 1
        return State({"active": 2}, {7: "app"}, 1)

    def require_readable(self) -> None:
        if self.broken:
            raise self.broken

    require_writable = require_readable


class Rig:
    """A monitor on a unix socket; `answers` are what keeper and blobd say, None: they are frozen."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.node = Node()
        self.address = root / "coco.sock"
        self.listen = f"unix:{root}/monitor.sock"
        self.monitor = Monitor(self.node, ErrorInterceptor(), Trail(), root, str(self.address), "open")
        self.service = socket.socket(socket.AF_UNIX)
        self.service.bind(str(self.address))
        self.service.listen()
        self.connections = {"keeper": 0, "blobd": 0}
        self.frozen: set[str] = set()
        self.thawed = asyncio.Event()
        self.listeners = [control.listen(root / f"{name}.sock") for name in self.connections]
        handlers = map(self.handler, self.connections)
        self.peers = [control.AsyncServer(*pair) for pair in zip(self.listeners, handlers, strict=True)]

    def handler(self, name: str) -> control.Handler:
        async def handle(message: control.Message, _: list[int]) -> control.Reply:
            self.connections[name] += 1
            if name in self.frozen:
                await self.thawed.wait()
            if name == "keeper":
                return {"pids": {"keeper": os.getpid()}, "workers": {"blobd": {"starts": 3, "hangs": 1}}}, ()
            return {"images": [], "counters": {"reads": 5}}, ()

        return handle

    async def close(self) -> None:
        """The end of keeper, blobd and the socket for containerd."""
        for peer in self.peers:
            await peer.stop()
        for sock in (*self.listeners, self.service):
            sock.close()

    async def get(self, path: str) -> tuple[int, str]:
        return await asyncio.to_thread(get, self.listen, path)

    async def scrape(self) -> dict[str, Metric]:
        return parse((await self.get("/metrics"))[1])

    async def readiness(self) -> dict[str, str]:
        status, text = await self.get("/readyz")
        answer = json.loads(text)
        assert status == (200 if answer["ready"] else 503)
        found: dict[str, str] = answer["failed"]
        return found


@asynccontextmanager
async def running(root: Path) -> AsyncIterator[Rig]:
    rig = Rig(root)
    for peer in rig.peers:
        peer.start()
    await rig.monitor.start(rig.listen)
    try:
        yield rig
    finally:
        rig.thawed.set()
        await rig.monitor.stop()
        await rig.close()


async def test_all_is_well(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        found = await rig.scrape()
        assert {found["coco_up"].value(process=name) for name in ("keeper", "snapshotd", "blobd")} == {1}
        assert found["coco_worker_starts_total"].value(process="blobd") == 3
        assert found["coco_reads_total"].value() == 5
        assert found["coco_snapshots"].value(kind="active") == 2
        assert found["coco_process_resident_memory_bytes"].value(process="snapshotd") > 1 << 20
        assert found["coco_process_open_fds"].value(process="keeper") > 3
        assert abs(found["coco_process_start_time_seconds"].value(process="keeper") - time.time()) < 7 * 86400
        assert await rig.get("/healthz") == (200, "ok\n")
        assert await rig.readiness() == {}
        assert (await rig.get("/nothing"))[0] == 404


async def test_a_frozen_process_is_zero_and_holds_nobody_up(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.scrape()
        rig.frozen.add("blobd")
        asked = rig.connections["blobd"]
        await asyncio.sleep(1.05)  # what was just told is told again for a second
        begin = time.monotonic()
        found = await rig.scrape()
        assert time.monotonic() - begin < 5
        assert found["coco_up"].value(process="blobd") == 0
        assert found["coco_up"].value(process="keeper") == 1
        assert not found["coco_reads_total"].samples
        assert await rig.readiness() == {"blobd": "does not answer"}
        await rig.get("/readyz")
        assert rig.connections["blobd"] - asked <= 2, "one question of a kind, however often we are asked"
        rig.thawed.set()
        rig.frozen.clear()
        await asyncio.sleep(1.05)
        assert (await rig.scrape())["coco_up"].value(process="blobd") == 1


async def test_many_who_ask_get_one_answer(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        answers = await asyncio.gather(*(rig.get("/metrics") for _ in range(50)))
        assert {status for status, _ in answers} == {200}
        assert rig.node.asked <= 3


async def test_what_is_broken_is_named(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.node.broken = sqlite3.OperationalError("attempt to write a readonly database")
        await rig.close()
        failed = await rig.readiness()
        assert failed.keys() == {"keeper", "blobd", "socket", "database"}
        assert "readonly" in failed["database"]
        assert (await rig.get("/healthz"))[0] == 503
        assert (await rig.scrape())["coco_up"].value() == 1, "metrics are there all the same"


@pytest.mark.allow_warnings
async def test_an_address_that_is_taken_is_no_reason_to_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        rig = Rig(tmp_path)
        await rig.monitor.start(f"127.0.0.1:{other.getsockname()[1]}")
        await rig.monitor.stop()
        await rig.close()
    assert "monitor cannot listen" in caplog.text


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "monitor.sock"))
    async with running(tmp_path) as rig:
        assert (await rig.get("/healthz"))[0] == 200


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:9470", ("127.0.0.1", 9470)),
        ("[::1]:9470", ("::1", 9470)),
        (":9470", None),
        ("unix:/run/m.sock", "/run/m.sock"),
        ("unix:m.sock", None),
        ("9470", None),
        ("localhost:http", None),
        ("localhost:70000", None),
    ],
)
def test_addresses(listen: str, expected: object) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match=r"monitor\.listen"):
            config.listen_address(listen)
    else:
        assert config.listen_address(listen) == expected
