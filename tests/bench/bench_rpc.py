"""How long containerd waits for an answer: every operation over the socket of a running `serve`, one at a time.

    python -m tests.bench.bench_rpc [--calls N]

Needs root. The last rows compare the way through the relay with a connection to gRPC's own socket behind it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.bench.table import Row, show
from tests.conformance.client import Client
from tests.harness.machine import Work
from tests.harness.serve import Serve

CALLS = 300
CHAIN = 20  # layers below the snapshots that are made
OTHERS = 500  # snapshots that just exist
PREPARE_MS = 3.0  # target: half of the Prepares are answered within


def timed(call: Callable[[int], object], numbers: Iterable[int]) -> list[float]:
    """Milliseconds of each call."""
    found = []
    for number in numbers:
        begin = time.perf_counter()
        call(number)
        found.append((time.perf_counter() - begin) * 1e3)
    return found


def row(name: str, found: list[float], most: float | None = None) -> Row:
    median, high = statistics.median(found), statistics.quantiles(found, n=100)[98]
    target = f"p50 < {most:g} ms" if most else ""
    return Row(
        "rpc", name, f"p50 {median:.2f} ms, p99 {high:.2f} ms", target=target, met=median < most if most else None
    )


def populate(sn: Client) -> str:
    """A chain and many others; the name of the chain's top."""
    parent = ""
    for number in range(CHAIN):
        sn.prepare(f"layer-{number}", parent)
        parent = f"chain-{number}"
        sn.commit(parent, f"layer-{number}")
    for number in range(OTHERS):
        sn.view(f"other-{number}")
    return parent


def sync(directory: Path, calls: int) -> Row:
    """What makes a change durable, alone: the floor of Prepare, Update, Commit and Remove."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(28 << 10))
        file.flush()

        def write(_: int) -> None:
            os.pwrite(file.fileno(), bytes(28 << 10), 0)
            os.fdatasync(file.fileno())

        return row("fdatasync of 28 KiB on this disk", timed(write, range(calls)))


def measure(address: Path, inner: Path, calls: int) -> list[Row]:
    sn = Client(address, "bench")
    top = populate(sn)
    numbers = range(calls)
    rows = [
        row(f"Prepare on {CHAIN} layers", timed(lambda n: sn.prepare(f"key-{n}", top), numbers), PREPARE_MS),
        row("Mounts", timed(lambda n: sn.mounts(f"key-{n}"), numbers)),
        row("Stat", timed(lambda n: sn.stat(f"key-{n}"), numbers)),
        row("Usage of an active one", timed(lambda n: sn.usage(f"key-{n}"), numbers)),
        row("Usage of a committed one", timed(lambda _: sn.usage(top), numbers)),
        row("Update", timed(lambda n: sn.update(f"key-{n}", {"a": str(n)}, "labels.a"), numbers)),
        row("Commit", timed(lambda n: sn.commit(f"name-{n}", f"key-{n}"), numbers)),
        row("Remove", timed(lambda n: sn.remove(f"name-{n}"), numbers)),
        row("List of one by label", timed(lambda n: sn.walk(f'labels."a"=={n},parent==""'), numbers)),
        row(f"List of {OTHERS + CHAIN}", timed(lambda _: sn.walk(), range(max(10, calls // 20)))),
    ]
    relayed = timed(lambda _: sn.stat(top), numbers)
    direct_client = Client(inner, "bench")
    direct = timed(lambda _: direct_client.stat(top), numbers)
    more = statistics.median(relayed) - statistics.median(direct)
    compared = f"{statistics.median(direct):.2f} ms without"
    rows.append(Row("rpc", "Stat through the relay", f"{statistics.median(relayed):.2f} ms", compared, more))
    for client in (sn, direct_client):
        client.close()
    return rows


def rows(calls: int = CALLS) -> list[Row]:
    with Work("bench-rpc") as work:
        served = Serve(work, settings={"log": {"level": "info"}})
        return [sync(served.root, calls), *measure(served.address, served.root / "grpc.sock", calls)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=CALLS, help=f"of each operation (default {CALLS})")
    found = rows(parser.parse_args().calls)
    print(show(found))
    return 0 if all(row.met is not False for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
