"""Cold reads through EROFS with the ciphertext cached, against decoding the same chunks in a bare loop on all cores.

    python -m tests.bench.bench_reads [--size MiB] [--chunk KiB…] [--rounds N] [--driver auto|file|loop]

Needs root. "Cold" means: not in the page cache of the mount; the ciphertext cache lies on tmpfs, so what is measured is
software, not a disk. Rounds interleave all measurements, so that other work on the machine slows both sides alike.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from snapshotter.blobs.cache import ChunkCache
from snapshotter.blobs.chunks import Counters
from snapshotter.crypto import chunk as codec
from snapshotter.ondemand.attachment import Attachment, BlobTable
from tests.dataplane import BlobServer, Machine, build, forget_pages

PAGE = 4096
TOUCHES = 200


def material(size: int) -> bytes:
    """Real file content: shared objects and other files of this system, each used once."""
    out = bytearray()
    for path in sorted(Path("/usr/lib").rglob("*")):
        if len(out) >= size:
            break
        if path.is_file() and not path.is_symlink():
            out += path.read_bytes()
    return bytes(out[:size])


def decode_one(table: BlobTable, blob: memoryview, number: int) -> float:
    """Seconds to decode a chunk from memory."""
    begin = time.perf_counter()
    chunk = table.chunk(number)
    codec.decode(
        blob[chunk.stored_offset : chunk.stored_offset + chunk.stored_size], digest=chunk.digest, size=chunk.size,
        codec=chunk.codec, sealed_secret=chunk.secret, digester=table.digester,
    )  # fmt: skip
    return time.perf_counter() - begin


def decode_all(table: BlobTable, blob: memoryview, numbers: list[int]) -> float:
    """Seconds to decode these chunks, one thread per core."""
    cores = len(os.sched_getaffinity(0))
    shares = [numbers[core::cores] for core in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(len, shares))  # threads exist
        begin = time.perf_counter()
        list(pool.map(lambda share: [decode_one(table, blob, number) for number in share], shares))
        return time.perf_counter() - begin


def sequential(path: Path) -> float:
    forget_pages(path)
    buffer = bytearray(1 << 20)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - begin


def touches(path: Path, offsets: list[int]) -> float:
    """Median seconds of reading one cold page at each offset, with no read-ahead."""
    forget_pages(path)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    times = []
    for offset in offsets:
        begin = time.perf_counter()
        os.pread(fd, PAGE, offset)
        times.append(time.perf_counter() - begin)
    os.close(fd)
    return statistics.median(times)


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 2**20


def run(size: int, chunk_size: int, rounds: int, driver: str, directory: Path) -> list[tuple[str, str]]:
    """Figures by name. The ratio is the median of rounds that each measure both sides; times are the best of all."""
    image = build({"big.bin": material(size)}, chunk_size=chunk_size)
    size = len(image.files["big.bin"])
    server, machine = BlobServer(dict(image.blobs)), Machine(directory, driver=driver)
    memfd = image.pack(1, f"{server.host}/bench")
    table = Attachment(memfd).blobs[0]
    chunks = list(range(table.count))
    blob = memoryview(image.blobs[table.digest])
    try:
        machine.start()
        assert machine.process
        idle = resident_mib(machine.process.pid)
        cache = ChunkCache(machine.cache / "chunks", 1 << 40, Counters())
        for number in chunks:
            chunk = table.chunk(number)
            cache.put(chunk.name, blob[chunk.stored_offset : chunk.stored_offset + chunk.stored_size])
        machine.attach(1, image, f"{server.host}/bench")
        big = machine.mount(1, image) / "big.bin"
        picked = random.Random(1).sample(chunks, min(TOUCHES, len(chunks)))
        apart = [number * chunk_size for number in picked]
        inside = [page * PAGE for page in range(1, chunk_size // PAGE)]
        work: dict[str, Callable[[], float]] = {
            "bare": lambda: decode_all(table, blob, chunks),
            "sequential": lambda: sequential(big),
            "bare one": lambda: statistics.median(decode_one(table, blob, number) for number in picked),
            "floor": lambda: touches(big, inside),  # all in one chunk: decoded once, then the way through FUSE alone
            "touch": lambda: touches(big, apart),
        }
        taken = [{name: run() for name, run in work.items()} for _ in range(rounds)]
        assert not server.requests, "the cache should have had everything"
        used = resident_mib(machine.process.pid)
        machine.unmount(big.parent)
    finally:
        machine.close()
        server.close()
    best = {name: min(turn[name] for turn in taken) for name in work}
    ratio = statistics.median(turn["bare"] / turn["sequential"] for turn in taken)
    target = best["floor"] + 1.3 * best["bare one"]
    return [
        ("image", f"{size >> 20} MiB in chunks of {chunk_size >> 10} KiB, stored {table.size / size:.0%}"),
        ("bare decode, all cores", f"{size / best['bare'] / 1e9:.2f} GB/s"),
        ("cold sequential read", f"{size / best['sequential'] / 1e9:.2f} GB/s"),
        ("  ratio (target ≥ 0.6)", f"{ratio:.2f}"),
        ("bare decode of one chunk", f"{best['bare one'] * 1e6:.0f} µs"),
        ("cold page, chunk decoded (floor)", f"{best['floor'] * 1e6:.0f} µs"),
        ("cold page, chunk not decoded", f"{best['touch'] * 1e6:.0f} µs"),
        ("  target: floor + 1.3 × decode", f"{target * 1e6:.0f} µs"),
        ("blobd resident, idle / used", f"{idle:.0f} / {used:.0f} MiB"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="MiB")
    parser.add_argument("--chunk", type=int, nargs="*", default=[64, 256], help="KiB")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--driver", default="auto")
    options = parser.parse_args()
    for kib in options.chunk:
        with tempfile.TemporaryDirectory(prefix="bench-reads-", dir="/dev/shm") as directory:
            figures = run(options.size << 20, kib << 10, options.rounds, options.driver, Path(directory))
        sys.stdout.writelines(f"{name:36} {value}\n" for name, value in figures)


if __name__ == "__main__":
    main()
