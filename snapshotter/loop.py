"""The keeper's event loop: one thread, one selector, and signals as ordinary events. Standard library only."""

import selectors
import signal
import socket
import time
from collections.abc import Callable

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


class Loop:
    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._caught: set[int] = set()

    def watch(self, source: socket.socket | int, action: Callable[[], object]) -> None:
        """Call `action` whenever `source` is readable."""
        self._selector.register(source, selectors.EVENT_READ, action)

    def forget(self, source: socket.socket | int) -> None:
        self._selector.unregister(source)

    def step(self, timeout: float) -> None:
        """Handle what happens within `timeout` seconds, at least one event if there is one."""
        for key, _ in self._selector.select(max(timeout, 0)):
            key.data()

    def run_while(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while condition() and time.monotonic() < deadline:
            self.step(deadline - time.monotonic())

    def catch_signals(self) -> None:
        """Collect SIGNALS from now on; each wakes `step`. Those that were blocked across an exec arrive now."""
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self.watch(self._woken, lambda: self._woken.recv(64))
        signal.set_wakeup_fd(self._waker.fileno())
        for number in SIGNALS:
            signal.signal(number, lambda caught, _frame: self._caught.add(caught))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def told(self, *numbers: int) -> bool:
        """Whether one of these signals came."""
        return not self._caught.isdisjoint(numbers)

    def forget_signals(self, *numbers: int) -> None:
        self._caught.difference_update(numbers)
