"""Reads through the mount as rows of the table: the three chunk sizes between which the default is chosen, and ext4."""

import tempfile
import time
from pathlib import Path

from tests.bench.bench_reads import material, run
from tests.bench.table import Row
from tests.dataplane import BlobServer, Machine, build

SIZE = 128 << 20
ROUNDS = 3
CHUNKS = (64 << 10, 128 << 10, 256 << 10)


def rows() -> list[Row]:
    found: list[Row] = []
    for chunk_size in CHUNKS:
        with tempfile.TemporaryDirectory(prefix="bench-reads-", dir="/dev/shm") as directory:
            figures = dict(run(SIZE, chunk_size, ROUNDS, "auto", Path(directory)))
        found += _rows(f"reads, {chunk_size >> 10} KiB chunks", figures)
    return [*found, warm()]


def _rows(group: str, figures: dict[str, str]) -> list[Row]:
    ratio = float(figures["  ratio (target ≥ 0.6)"])
    touch, target = figures["cold page, chunk not decoded"], figures["  target: floor + 1.3 × decode"]
    met = _number(touch) <= _number(target)
    return [
        Row(group, "cold sequential", figures["cold sequential read"], figures["bare decode, all cores"], ratio,
            "≥ 0.6 of the bare loop", ratio >= 0.6),
        Row(group, "first 4 KiB touch", touch, figures["bare decode of one chunk"], None, f"≤ {target}", met),
        Row(group, "floor through FUSE", figures["cold page, chunk decoded (floor)"]),
        Row(group, "blobd, idle / used", figures["blobd resident, idle / used"]),
    ]  # fmt: skip


def warm() -> Row:
    """Reading what is in the page cache, through the mount and from ext4, in turns; the best of each counts."""
    content = material(SIZE)
    image = build({"big.bin": content}, chunk_size=CHUNKS[-1])
    with tempfile.TemporaryDirectory(prefix="bench-warm-", dir="/var/tmp") as directory:
        ordinary = Path(directory) / "big.bin"
        ordinary.write_bytes(content)
        server, machine = BlobServer(dict(image.blobs)), Machine(Path(directory), driver="auto")
        try:
            machine.start()
            machine.attach(1, image, f"{server.host}/bench")
            target = machine.mount(1, image)
            paths = {"mount": target / "big.bin", "disk": ordinary}
            best = {name: _seconds(path) for name, path in paths.items()}
            for _ in range(5):
                best = {name: min(best[name], _seconds(path)) for name, path in paths.items()}
            machine.unmount(target)
        finally:
            machine.close()
            server.close()
    ratio = best["disk"] / best["mount"]
    speed = {name: f"{len(content) / seconds / 1e9:.2f} GB/s" for name, seconds in best.items()}
    return Row("reads, warm", "sequential", speed["mount"], f"{speed['disk']} from the disk's file system", ratio,
               "≥ 0.95 of ext4", ratio >= 0.95)  # fmt: skip


def _seconds(path: Path) -> float:
    buffer = bytearray(1 << 20)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - begin


def _number(text: str) -> float:
    return float(text.split()[0])
