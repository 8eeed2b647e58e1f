"""How long containerd waits for an answer, and how long it would wait for its own overlayfs snapshotter behind a proxy.

    python -m tests.bench.bench_rpc [--calls N] [--sizes N,N…]

Needs root, and Go the first time. Both are called by the same Go program over one connection, as containerd does it, in
turns, so that whatever else the machine does falls on both.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapshotter import control
from tests.bench.memory import resident_mb
from tests.bench.table import Row, show
from tests.clients import Client as Module
from tests.clients.__main__ import ensure
from tests.conformance.client import Client
from tests.conformance.pull import pull
from tests.harness import serve, tiny
from tests.harness.machine import Work, until
from tests.harness.process import Process
from tests.harness.registry import Registry
from tests.harness.serve import Serve

CALLS, ROUNDS = 100, 3  # of each operation in a round; rounds
SIZES = (10, 1000, 10_000)  # snapshots that just exist
COMPARED = 1000  # the size at which operations are compared one by one, and with several callers
CALLERS = 8
RATIO = 1.5  # target, p50
TARGETS = ("Prepare", "Commit", "Stat", "List", "Mounts", "Remove")
IMAGES = 100
PEER = Module("overlayd", "tests/bench/overlayd", ("overlayd",))


@dataclass
class Timing:
    """All calls of one operation."""

    ms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def rate(self) -> float:
        return len(self.ms) / self.seconds

    def __str__(self) -> str:
        return f"p50 {self.median:.2f} ms, p99 {statistics.quantiles(self.ms, n=100)[98]:.2f} ms"


Timings = dict[str, Timing]


class Pair:
    """Our daemon and the peer, side by side on one disk."""

    def __init__(self, work: Work) -> None:
        if ensure([PEER]):
            raise RuntimeError("overlayd cannot be built")
        self.program = PEER.program()
        self.ours = Serve(work, settings={"log": {"level": "info"}})
        self._sockets = {"ours": self.ours.address, "peer": work.path / "peer.sock"}
        command: list[str | Path] = [self.program, "serve", work.directory("peer"), self._sockets["peer"]]
        Process(work, "overlayd", command).wait_until(self._sockets["peer"].exists, "the peer serves")

    def measure(self, others: int, callers: int, calls: int) -> tuple[Timings, Timings]:
        """Of ours and of the peer, with `others` snapshots beside those that are made."""
        found: dict[str, Timings] = {name: defaultdict(Timing) for name in self._sockets}
        for _ in range(ROUNDS):
            for name, socket in self._sockets.items():
                for operation, result in self._load(socket, others, callers, calls).items():
                    found[name][operation].ms += result["ms"]
                    found[name][operation].seconds += result["seconds"]
        return found["ours"], found["peer"]

    def _load(self, socket: Path, *counts: int) -> dict[str, Any]:
        command = [str(self.program), "load", str(socket), *map(str, counts)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def compared(ours: Timings, peer: Timings) -> list[Row]:
    """One caller: an operation a row."""
    rows = []
    for name, timing in ours.items():
        ratio = timing.median / peer[name].median
        target = name in TARGETS
        rows.append(
            Row("rpc", name, str(timing), str(peer[name]), ratio, f"≤ {RATIO} ×" if target else "",
                ratio <= RATIO if target else None)
        )  # fmt: skip
    return rows


def rates(ours: Timings, peer: Timings, callers: int) -> list[Row]:
    return [
        Row("rpc", f"{name}, {callers} callers", f"{ours[name].rate:.0f}/s", f"{peer[name].rate:.0f}/s",
            peer[name].rate / ours[name].rate)
        for name in TARGETS
    ]  # fmt: skip


def growth(found: dict[int, tuple[Timings, Timings]], resident: dict[int, float]) -> list[Row]:
    """Figures by number of snapshots, ours and the peer's; the ratio is of the largest number to the smallest, ours."""
    sizes = sorted(found)
    rows = []
    for name in ("Prepare", "Stat", "Usage", "Mounts", "List of one", "List", "Remove"):
        ours, peer = (" / ".join(f"{found[size][who][name].median:.2f}" for size in sizes) + " ms" for who in (0, 1))
        ratio = found[sizes[-1]][0][name].median / found[sizes[0]][0][name].median
        rows.append(Row("rpc", f"{name} with {' / '.join(map(str, sizes))} snapshots", ours, peer, ratio))
    memory = " / ".join(f"{resident[size]:.0f}" for size in sizes)
    each = (resident[sizes[-1]] - resident[sizes[0]]) / (sizes[-1] - sizes[0]) * 1e3
    rows.append(Row("rpc", "snapshotd, resident", f"{memory} MB", f"{each:.1f} kB a snapshot"))
    return rows


def restarts(work: Work) -> list[Row]:
    """Images mounted under as many plugin names, each with a mount of its own; then each process is killed."""
    registry = Registry(work)
    key, public = serve.key_pair(work.path)
    layout = tiny.layout(work.path / "layout")
    target = f"docker://{registry.address}/t/tiny:sealed"
    digest = serve.convert(work, f"oci:{layout.path}:tiny", target, "--recipient", f"jwe:{public}")
    node = Serve(work, "images", {"keys": {"files": [str(key)]}, "log": {"level": "info"}})
    idle = {name: resident_mb(pid) for name, pid in node.pids().items()}
    clients = [Client(node.address, f"plugin-{number}") for number in range(IMAGES)]
    begin = time.perf_counter()
    for client in clients:
        client.prepare("container", pull(client, registry, f"{registry.address}/t/tiny@{digest}"))
    each = (time.perf_counter() - begin) / IMAGES
    assert len(node.images_mounted()) == IMAGES
    rows = [Row("rpc", "pull, attach and mount of a small image", f"{each * 1e3:.0f} ms")]
    for name, megabytes in idle.items():
        more = resident_mb(node.pids()[name]) - megabytes
        rows.append(
            Row("rpc", f"{name} with {IMAGES} mounted images", f"{more:.1f} MB more", f"{megabytes:.1f} MB idle")
        )
    for name in ("snapshotd", "blobd"):
        begin = time.perf_counter()
        old = node.pids()[name]
        os.kill(old, signal.SIGKILL)
        killed = time.perf_counter()
        socket = node.root / f"{name}.sock"
        until(lambda socket=socket, old=old: _pid(socket) not in (0, old), f"{name} answers", 60, every=0.005)  # type: ignore[misc]
        seconds = time.perf_counter() - killed
        rows.append(Row("rpc", f"restart of {name} with {IMAGES} mounted images", f"{seconds:.2f} s"))
    for client in clients:
        while names := {info.name: info.parent for info in client.walk()}:
            for childless in names.keys() - set(names.values()):
                client.remove(childless)
        client.cleanup()
        client.close()
    return rows


def _pid(socket: Path) -> int:
    try:
        return int(control.request(socket, {"op": "status"}, timeout=2)[0]["pid"])
    except (OSError, EOFError):
        return 0


def rows(calls: int = CALLS, sizes: tuple[int, ...] = SIZES) -> list[Row]:
    with Work("bench-rpc") as work:
        pair = Pair(work)
        snapshotd = pair.ours.pids()["snapshotd"]
        found: dict[int, tuple[Timings, Timings]] = {}
        resident = {}
        shown: list[Row] = []
        for size in sorted(sizes):
            found[size] = pair.measure(size, 1, calls)
            resident[size] = resident_mb(snapshotd)
            if size == COMPARED:
                shown = compared(*found[size]) + rates(*pair.measure(size, CALLERS, calls * 2), CALLERS)
        shown += growth(found, resident)
    with Work("bench-images") as work:
        return shown + restarts(work)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=CALLS, help=f"of each operation in a round (default {CALLS})")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of snapshots")
    arguments = parser.parse_args()
    found = rows(arguments.calls, tuple(map(int, arguments.sizes.split(","))))
    print(show(found))
    return 0 if all(row.met is not False for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
