"""blobd killed at bad moments: reads wait for its successor and get the right bytes, none fails."""

import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.dataplane import CHUNK, Plane, build, compare, content, forget_pages, read_at, wait_until

pytestmark = pytest.mark.root

IMAGE = build({"big": content(1, 60 * CHUNK), "d/small": content(2, 300)})
RESEND = pytest.mark.parametrize("resend", ["", "blobd.no-resend:on,"], ids=["resend", "in-flight table"])


@RESEND
@pytest.mark.parametrize("driver", ["file", "loop"])
def test_a_read_that_was_taken_and_not_answered_is_answered_by_the_next(
    tmp_path: Path, resend: str, driver: str
) -> None:
    with Plane(tmp_path, driver=driver) as plane, ThreadPoolExecutor(4) as pool:
        machine, hold = plane.machine, tmp_path / "hold"
        machine.start(f"{resend}blobd.read.taken:hold:{hold}")
        target = plane.serve(1, IMAGE)
        compare(target, IMAGE)
        forget_pages(target / "big")
        machine.clear_cache()
        hold.touch()
        reads = [pool.submit(read_at, target / "big", number * CHUNK + 100, 5000) for number in (5, 20, 21, 40)]
        wait_until(hold.with_name("hold.held").exists, "a request is taken")
        machine.kill()
        hold.unlink()
        assert not all(read.done() for read in reads)
        machine.start()
        for number, read in zip((5, 20, 21, 40), reads, strict=True):
            assert read.result(30) == IMAGE.files["big"][number * CHUNK + 100 :][:5000]
        compare(target, IMAGE)


@RESEND
def test_reads_parked_at_a_frozen_registry_survive(tmp_path: Path, resend: str) -> None:
    with Plane(tmp_path) as plane, ThreadPoolExecutor(30) as pool:
        plane.machine.start(resend)
        target = plane.serve(1, IMAGE)
        plane.server.frozen.add("app")
        offsets = [number * CHUNK for number in range(20, 50)]
        reads = [pool.submit(read_at, target / "big", offset, 4096) for offset in offsets]
        try:
            for _ in range(2):
                wait_until(lambda: plane.machine.request({"op": "status"})["parked"] == 30, "all reads wait")
                plane.machine.kill()
                plane.machine.start(resend)
        finally:
            plane.server.frozen.clear()
        for offset, read in zip(offsets, reads, strict=True):
            assert read.result(30) == IMAGE.files["big"][offset : offset + 4096]


@RESEND
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_random_kills_under_load(tmp_path: Path, resend: str, number: signal.Signals) -> None:
    data = IMAGE.files["big"]
    with Plane(tmp_path) as plane, ThreadPoolExecutor(8) as pool:
        plane.machine.start(resend)
        big = plane.serve(1, IMAGE) / "big"
        stop = tmp_path / "stop"

        def reads(seed: int) -> int:
            rng, count = random.Random(seed), 0
            fd = os.open(big, os.O_RDONLY)
            try:
                while not stop.exists():
                    offset, length = rng.randrange(len(data)), rng.randrange(1, 2 * CHUNK)
                    assert os.pread(fd, length, offset) == data[offset : offset + length]
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    count += 1
            finally:
                os.close(fd)
            return count

        running: list[Future[int]] = [pool.submit(reads, seed) for seed in range(8)]
        try:
            for _ in range(5):
                done = plane.machine.counters()["reads"]
                wait_until(more_reads(plane, done + 50), "reads go on")
                plane.machine.kill(number)
                plane.machine.clear_cache()
                plane.machine.start(resend)
        finally:
            stop.touch()
        assert all(future.result(30) > 0 for future in running)
        assert plane.machine.request({"op": "status"})["images"][0]["open"] == 2


def more_reads(plane: Plane, count: int) -> Callable[[], bool]:
    return lambda: plane.machine.counters()["reads"] >= count


def test_a_worker_killed_before_it_answered_init(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start_expecting_death("blobd.reply:kill")
        plane.machine.start()
        compare(plane.serve(1, IMAGE), IMAGE)


@RESEND
def test_a_mount_in_progress_survives(tmp_path: Path, resend: str) -> None:
    """LOOKUP, OPEN and the reads of mount(2) are answered by the successor, and no open file is counted twice."""
    with Plane(tmp_path) as plane, ThreadPoolExecutor(1) as pool:
        machine, hold = plane.machine, tmp_path / "hold"
        machine.start(f"{resend}blobd.reply:hold:{hold}")
        hold.touch()
        mounting = pool.submit(plane.serve, 1, IMAGE)
        wait_until(hold.with_name("hold.held").exists, "a reply is held back")
        machine.kill()
        hold.unlink()
        machine.start(resend)
        target = mounting.result(30)
        compare(target, IMAGE)
        assert machine.request({"op": "status"})["images"][0]["open"] == 2
        machine.unmount(target)
        machine.request({"op": "detach", "id": 1})
