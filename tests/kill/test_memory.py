"""Memory is short: reads of an image larger than what is left wait and are right, and we are the last to be killed."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tests.dataplane import BlobServer, build
from tests.harness.machine import Work
from tests.harness.process import Process
from tests.harness.serve import WORKERS, Serve
from tests.kill.test_keeper import Node

pytestmark = pytest.mark.root

MIB = 1 << 20
IMAGE_BYTES, LEFT_BYTES = 72 * MIB, 40 * MIB


class Group:
    """A memory cgroup, of version 1 or 2."""

    def __init__(self, name: str) -> None:
        first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        if (first / "memory.limit_in_bytes").exists():
            self.path, self._limit, self._usage = first / name, "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif "memory" in (second / "cgroup.subtree_control").read_text().split():
            self.path, self._limit, self._usage = second / name, "memory.max", "memory.current"
        else:
            pytest.skip("no memory controller")
        self.path.mkdir()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This process, and what it starts, belong to the group."""
        before = next(
            line.rpartition(":")[2]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if ":memory:" in line or line.startswith("0::")
        )
        top = self.path.parent
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (top / before.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))

    def leave(self, size: int) -> None:
        """Limit the group to `size` more than it uses."""
        (self.path / self._limit).write_text(str(int((self.path / self._usage).read_text()) + size))

    @property
    def reached(self) -> int:
        """How often the limit was reached."""
        if self._limit == "memory.max":
            return _field(self.path / "memory.events", "max")
        return int((self.path / "memory.failcnt").read_text())

    @property
    def killed(self) -> int:
        return _field(
            self.path / ("memory.events" if self._limit == "memory.max" else "memory.oom_control"), "oom_kill"
        )

    def close(self) -> None:
        for _ in range(100):  # a process that has ended leaves its group a moment later
            try:
                self.path.rmdir()
            except OSError:
                time.sleep(0.05)
            else:
                return
        self.path.rmdir()


def _field(path: Path, name: str) -> int:
    lines = (line.split() for line in path.read_text().splitlines())
    return next(int(line[1]) for line in lines if line[0] == name)


READER = """
import hashlib, sys
for _ in range(2):
    for path in sys.argv[2:]:
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(1 << 16):
                digest.update(piece)
        print(digest.hexdigest())
"""


def test_an_image_larger_than_the_memory_that_is_left(work: Work) -> None:
    group = Group(work.path.name)
    work.stack.callback(group.close)
    registry = BlobServer()
    work.stack.callback(registry.close)
    image = build({f"file-{number}": Random(number).randbytes(IMAGE_BYTES // 8) for number in range(8)})
    with group.inside():
        node = Node(work, registry, image)
    pids = node.serve.pids()
    group.leave(LEFT_BYTES)
    script = f'echo $$ >{group.path}/cgroup.procs; exec {sys.executable} -c "$0" "$@"'
    paths = [node.target / name for name in image.files]
    reader = Process(work, "reader", ["/bin/sh", "-c", script, READER, "-", *paths])
    assert reader.wait(100) == 0, reader.tail()
    expected = [hashlib.sha256(data).hexdigest() for data in image.files.values()]
    assert reader.output().split() == expected * 2
    node.unmount()
    assert group.reached > 0
    assert group.killed == 0
    assert node.serve.pids() == pids
    assert node.serve.status()["counters"]["eio"] == 0


def test_all_three_are_protected_where_root_may_do_that(work: Work) -> None:
    served = Serve(work)
    may = subprocess.run(["sh", "-c", "echo -900 >/proc/self/oom_score_adj"], capture_output=True).returncode == 0
    scores = {name: _score(pid) for name, pid in served.pids().items()}
    assert scores == dict.fromkeys(WORKERS, -900 if may else _score(os.getpid()))
    locked = Path(f"/proc/{served.pids()['blobd']}/status").read_text().split("VmLck:")[1].split()[0]
    assert int(locked) > 10_000, "kilobytes of blobd that are never swapped out"


def _score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
