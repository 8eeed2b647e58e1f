"""Notices workers that live and do not answer. Standard library only, like everything that the keeper imports.

Time is counted in probes: while the whole machine stands still nobody is asked, and nobody is late. A busy worker that
still answers, however slowly, is left alone; a killed one costs containers nothing but time.
"""

import contextlib
import signal
import socket
import time
from collections.abc import Sequence

from snapshotter import control
from snapshotter.loop import Loop
from snapshotter.workers import Worker, log

PROBE_SECONDS = 5.0
MISSED = 6  # probes without an answer: 30 s
MISSED_STARTING = 24  # before it said that it serves: 120 s
HOPELESS = 36  # probes since the last answer, restarts and all


class _Probe:
    """A worker of one name, asked over and over again, one question at a time."""

    def __init__(self, loop: Loop) -> None:
        self.silent = 0  # probes since the last answer of any process
        self._loop = loop
        self._pid = 0
        self._missed = 0
        self._sock: socket.socket | None = None

    def step(self, worker: Worker) -> None:
        self.silent += 1
        if worker.pid != self._pid:
            self._close()
            self._pid, self._missed = worker.pid, 0
        if not worker.pid:
            return
        if self._sock is None:
            self._ask(worker.socket)
        self._missed += 1
        if self._missed > (MISSED if worker.ready else MISSED_STARTING):
            log("error", "worker does not answer and is killed", worker=worker.name, pid=worker.pid)
            worker.hangs += 1
            worker.kill(signal.SIGKILL)
            self._missed = 0

    def _ask(self, path: str) -> None:
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:  # out of descriptors: we could not hear it anyway
            self._missed -= 1
            return
        sock.setblocking(False)
        try:
            sock.connect(path)
            control.send(sock, {"op": "ping"})
        except OSError:  # not there yet, or too many wait already
            sock.close()
        else:
            self._sock = sock
            self._loop.watch(sock, self._heard)

    def _heard(self) -> None:
        assert self._sock is not None
        with contextlib.suppress(OSError, EOFError):
            control.receive(self._sock)  # whatever it says
            self._missed = self.silent = 0
        self._close()

    def _close(self) -> None:
        if self._sock is not None:
            self._loop.forget(self._sock)
            self._sock.close()
            self._sock = None


class Watchdog:
    """`workers` is looked at whenever they are asked: one may be replaced by another of its name."""

    def __init__(self, workers: Sequence[Worker], loop: Loop) -> None:
        self._workers = workers
        self._probes = {worker.name: _Probe(loop) for worker in workers}
        self._due = time.monotonic()

    def remaining(self) -> float:
        """Seconds until `step` is due."""
        return self._due - time.monotonic()

    def step(self) -> None:
        """Ask every worker, if it is time to; kill the ones that have been silent for too long."""
        if self.remaining() <= 0:
            self._due = time.monotonic() + PROBE_SECONDS
            for worker in self._workers:
                self._probes[worker.name].step(worker)

    @property
    def helpless(self) -> list[str]:
        """Workers that do not answer although they were started again."""
        return [name for name, probe in self._probes.items() if probe.silent > HOPELESS]
