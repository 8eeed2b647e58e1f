"""What the keeper tells systemd, if it was started by it: sd_notify(3) and signs of life. Standard library only."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Systemd:
    """Takes its variables out of the environment, so that workers do not speak in the keeper's name."""

    def __init__(self) -> None:
        self.environment: Mapping[str, str] = {
            name: os.environ.pop(name) for name in _VARIABLES if name in os.environ
        }  # for the program that takes our place
        usec, pid = self.environment.get("WATCHDOG_USEC", ""), self.environment.get("WATCHDOG_PID", "")
        ours = usec.isdecimal() and pid in ("", str(os.getpid()))
        self._interval = int(usec) / 2e6 if ours and int(usec) else 0.0  # seconds between two signs of life; 0: none
        self._due = time.monotonic()
        self._status = ""
        self._ready = False

    def serving(self, waiting: list[str]) -> None:
        """Say, whenever it changes, which workers are waited for; and when there are none, that we are ready."""
        status = f"waiting for {' and '.join(waiting)}" if waiting else "serving"
        if not waiting and not self._ready:
            self._ready = True
            self._tell("READY=1", f"MAINPID={os.getpid()}", f"STATUS={status}")
        elif status != self._status:
            self._tell(f"STATUS={status}")
        self._status = status

    def reloading(self) -> None:
        """Until `serving` is told again by this program or the one that takes its place."""
        self._ready = False
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reloading")

    def stopping(self) -> None:
        self._tell("STOPPING=1", "STATUS=stopping")

    def remaining(self) -> float:
        """Seconds until `alive` is due."""
        return self._due - time.monotonic() if self._interval else 3600.0

    def alive(self, well: bool) -> None:
        """Give a sign of life, if it is time for one and all is well."""
        if self.remaining() <= 0:
            self._due = time.monotonic() + self._interval
            if well:
                self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        path = self.environment.get("NOTIFY_SOCKET", "")
        if not path:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.setblocking(False)  # a manager that does not listen must not stop us
            sock.sendto("\n".join(lines).encode(), path.replace("@", "\0", 1) if path.startswith("@") else path)
