"""The monitor address: `/metrics`, `/healthz`, `/readyz` over HTTP, for whoever can reach it.

Nothing here may disturb serving: an address that cannot be bound is logged, other processes are asked with little
patience, and however often somebody asks, the answer is made once a second.
"""

import asyncio
import os
import socket
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import structlog
from aiohttp import web

from snapshotter.config import listen_address
from snapshotter.monitor import dataplane, node, processes
from snapshotter.monitor.exposition import CONTENT_TYPE, render
from snapshotter.monitor.peers import Peer
from snapshotter.monitor.trail import Trail

log = structlog.get_logger(__name__)

_FRESH_SECONDS = 1.0

_T = TypeVar("_T")


class Node(Protocol):
    """What snapshotd knows; asked on its loop."""

    def state(self) -> node.State: ...

    def require_readable(self) -> None:
        """Raises sqlite3.Error, OSError."""

    def require_writable(self) -> None:
        """Raises sqlite3.Error, OSError."""


class Monitor:
    """`address`: where containerd connects. `root`: where the control sockets of the others are."""

    def __init__(self, known: Node, calls: node.Calls, trail: Trail, root: Path, address: str, mode: str) -> None:
        self._node = known
        self._calls = calls
        self._trail = trail
        self._address = address
        self._mode = mode
        self._keeper, self._blobd = Peer(root / "keeper.sock"), Peer(root / "blobd.sock")
        self._pids = {"snapshotd": os.getpid()}
        self._metrics = _Fresh(self._scrape)
        self._readiness = _Fresh(self._check)
        application = web.Application()
        application.add_routes(
            [
                web.get("/metrics", self._answer_metrics),
                web.get("/healthz", self._answer_health),
                web.get("/readyz", self._answer_readiness),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)

    async def start(self, listen: str) -> None:
        """Listen at "host:port" or "unix:/path"."""
        await self._runner.setup()
        address = listen_address(listen)
        site: web.BaseSite
        if isinstance(address, str):  # noqa: SIM108 - the types differ
            site = web.UnixSite(self._runner, address)
        else:
            site = web.TCPSite(self._runner, *address)
        try:
            await site.start()
        except OSError as error:
            log.error("monitor cannot listen: no metrics until the next reload", listen=listen, error=str(error))
        else:
            log.info("monitor listens", address=_shown(self._runner.addresses[0]))

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _answer_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=(await self._metrics.get()).encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _answer_health(self, _: web.Request) -> web.Response:
        """This process turns its loop, or there would be no answer, and has its database."""
        try:
            self._node.require_readable()
        except (sqlite3.Error, OSError) as error:
            return web.Response(text=f"database: {error}\n", status=503)
        return web.Response(text="ok\n")

    async def _answer_readiness(self, _: web.Request) -> web.Response:
        failed = {name: text for name, text in (await self._readiness.get()).items() if text}
        return web.json_response({"ready": not failed, "failed": failed}, status=503 if failed else 200)

    async def _scrape(self) -> str:
        keeper, blobd = await asyncio.gather(self._keeper.ask("status"), self._blobd.ask("metrics"))
        self._pids |= (keeper or {}).get("pids", {})
        looked = {name: processes.look(pid) for name, pid in self._pids.items() if pid}
        found = {name: process for name, process in looked.items() if process is not None}
        state = self._node.state()
        answers = {"keeper": keeper is not None, "snapshotd": True, "blobd": blobd is not None}
        return render(
            [
                *node.of_processes(self._mode, answers, keeper, found),
                *node.of_calls(self._calls),
                *node.of_pulls(self._trail),
                *node.of_state(state),
                *dataplane.families(blobd, state.images),
            ]
        )

    async def _check(self) -> Mapping[str, str]:
        """What has to work for a pull and a start to work: name → what is wrong, "" if nothing is."""
        keeper, blobd = await asyncio.gather(self._keeper.ask("status"), self._blobd.ask("ping"))
        try:
            self._node.require_writable()
            database = ""
        except (sqlite3.Error, OSError) as error:
            database = str(error)
        return {
            "keeper": "" if keeper else "does not answer",
            "blobd": "" if blobd is not None else "does not answer",  # it ends with its FUSE session
            "socket": self._accepts(),
            "database": database,
        }

    def _accepts(self) -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            try:
                client.connect(self._address)
            except OSError as error:
                return str(error)
        return ""


def _shown(address: Any) -> str:
    """As it may be written in `listen`."""
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Fresh(Generic[_T]):
    """What `make` makes, at most once a second however many ask."""

    def __init__(self, make: Callable[[], Awaitable[_T]]) -> None:
        self._make = make
        self._lock = asyncio.Lock()
        self._made: tuple[float, Any] = (-_FRESH_SECONDS, None)

    async def get(self) -> _T:
        async with self._lock:
            if time.monotonic() - self._made[0] > _FRESH_SECONDS:
                made = await self._make()
                self._made = (time.monotonic(), made)
            found: _T = self._made[1]
            return found
