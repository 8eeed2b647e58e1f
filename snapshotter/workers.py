"""A worker process as the keeper sees it: started or adopted, watched by pidfd, restarted with a growing delay.

And a process that only has to show that it would work.

Standard library only, like everything that the keeper imports.
"""

import contextlib
import json
import math
import os
import select
import signal
import time
from collections.abc import Callable

from snapshotter import control, failpoints
from snapshotter.loop import Loop

TRIAL_SECONDS = 60
FIRST_DELAY, LAST_DELAY, STEADY_SECONDS = 0.1, 2.0, 10.0  # a worker that lived this long starts again at once


def log(level: str, event: str, **fields: object) -> None:
    """One JSON line to stderr, shaped like those of the workers."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = json.dumps({"event": event, **fields, "process": "keeper", "level": level, "timestamp": stamp})
    with contextlib.suppress(OSError):  # whoever read the log is gone: no reason to go, too
        os.write(2, f"{line}\n".encode())


class Worker:
    """`pid` is 0 while none lives. A living one holds `<root>/<name>.lock` and answers on `<root>/<name>.sock`."""

    def __init__(self, name: str, command: list[str], root: str) -> None:
        self.name, self.command = name, command
        self._lock, self.socket = f"{root}/{name}.lock", f"{root}/{name}.sock"
        self.pid, self.pidfd, self.ready = 0, -1, False
        self.due, self._started, self._delay = 0.0, 0.0, FIRST_DELAY
        self.starts = self.hangs = 0  # how often it was started, and killed for not answering

    def start(self) -> bool:
        # A session of its own: Ctrl-C and hang-up reach the keeper alone, and workers outlive its terminal.
        default = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
        pid = 0
        try:
            pid = os.posix_spawn(
                self.command[0], self.command, os.environ, setsid=True, setsigmask=(), setsigdef=default
            )
            pidfd = os.pidfd_open(pid)
        except OSError as error:  # out of memory, processes or descriptors: try again later
            if pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            log("error", "worker cannot be started", worker=self.name, error=str(error))
            self.due = time.monotonic() + LAST_DELAY
            return False
        failpoints.hit("keeper.started-worker")
        self.take_over(pid, pidfd)
        self.starts += 1
        log("info", "worker started", worker=self.name, pid=pid)
        return True

    def adopt(self, needed: set[str], patience: float) -> dict[str, int]:
        """Take over a living worker of an earlier keeper: the descriptors that it holds, by name; {} if there is none.

        One that does not hold all of `needed`, or does not answer for `patience` seconds (0: is not asked), is killed.
        """
        found: dict[str, int] = {}
        deadline = time.monotonic() + patience
        while not found and (pid := control.lock_holder(self._lock)) is not None:
            if time.monotonic() >= deadline:
                self.take_over(pid, os.pidfd_open(pid))
                return self._destroy()
            try:
                found, _ = control.fetch_all(self.socket, {"op": "dump"}, timeout=30)
            except (OSError, EOFError):  # it may be starting or ending
                time.sleep(0.1)
        if not found or pid is None:
            return {}
        self.take_over(pid, os.pidfd_open(pid))
        if not needed <= found.keys():
            control.close_all(found.values())
            return self._destroy()
        self.ready = True
        log("info", "worker adopted", worker=self.name, pid=pid, descriptors=len(found))
        return found

    def take_over(self, pid: int, pidfd: int) -> None:
        """This process is the worker from now on, living or not yet reaped."""
        self.pid, self.pidfd, self._started = pid, pidfd, time.monotonic()

    def announced(self, pid: int) -> None:
        """`pid` says that it serves."""
        if pid == self.pid:
            self.ready = True
        elif control.lock_holder(self._lock) == pid:
            # Started by an earlier keeper, it took the lock after we had looked, and our own child waits for it.
            log("warning", "worker of an earlier keeper is replaced", worker=self.name, pid=pid)
            os.kill(pid, signal.SIGKILL)

    def kill(self, number: int) -> None:
        if self.pid:
            signal.pidfd_send_signal(self.pidfd, number)

    def watch(self, loop: Loop) -> None:
        """Have `loop` note the end of this process."""

        def ended() -> None:
            loop.forget(self.pidfd)
            self._reap()

        loop.watch(self.pidfd, ended)

    def _reap(self) -> None:
        try:
            status: object = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:  # adopted: init reaps it
            status = "unknown"
        log("info", "worker ended", worker=self.name, pid=self.pid, status=status)
        self._delay = FIRST_DELAY if time.monotonic() - self._started >= STEADY_SECONDS else self._delay
        if failpoints.enabled("keeper.no-delay"):
            self._delay = FIRST_DELAY
        self.due, self._delay = time.monotonic() + self._delay, min(2 * self._delay, LAST_DELAY)
        os.close(self.pidfd)
        self.pid, self.pidfd, self.ready = 0, -1, False

    def _destroy(self) -> dict[str, int]:
        log("error", "worker cannot be adopted and is killed", worker=self.name, pid=self.pid)
        self.kill(signal.SIGKILL)
        select.select([self.pidfd], [], [], 10)
        self._reap()
        return {}


class Trial:
    """Runs `command` now and then to see whether it succeeds; one run at a time."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._pid, self._pidfd, self._said = 0, -1, -1
        self._deadline = math.inf

    @property
    def runs(self) -> bool:
        return self._pid > 0

    def start(self, loop: Loop, tell: Callable[[str | None], object]) -> None:
        """`tell` is called when the command has ended: with None for status 0, else with its last words."""
        with contextlib.ExitStack() as undone:
            try:
                self._said = os.memfd_create("trial", os.MFD_CLOEXEC)
                undone.callback(os.close, self._said)
                output = [(os.POSIX_SPAWN_DUP2, self._said, number) for number in (1, 2)]
                pid = os.posix_spawn(
                    self._command[0], self._command, os.environ, file_actions=output, setsid=True, setsigmask=()
                )
                undone.callback(os.waitpid, pid, 0)
                undone.callback(os.kill, pid, signal.SIGKILL)
                self._pidfd = os.pidfd_open(pid)
            except OSError as error:
                tell(str(error))
                return
            undone.pop_all()
        self._pid, self._deadline = pid, time.monotonic() + TRIAL_SECONDS

        def ended() -> None:
            loop.forget(self._pidfd)
            tell(self._verdict())

        loop.watch(self._pidfd, ended)

    def remaining(self) -> float:
        """Seconds until a run has to be over, after which it is ended."""
        if time.monotonic() >= self._deadline:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._deadline = math.inf
        return self._deadline - time.monotonic()

    def _verdict(self) -> str | None:
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        size = os.fstat(self._said).st_size
        words = os.pread(self._said, 2000, max(0, size - 2000)).decode(errors="replace").strip()
        os.close(self._pidfd)
        os.close(self._said)
        self._pid, self._deadline = 0, math.inf
        return None if status == 0 else words or f"status {status}"
