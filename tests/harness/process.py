"""A background process of a run: logged to a file, waited for, stopped."""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.harness.machine import Work, until


class Process:
    """Started at once; `stop()` is registered with the run and may be called earlier."""

    def __init__(
        self,
        work: Work,
        name: str,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
    ) -> None:
        self.name = name
        self.log = work.directory("log") / f"{name}.log"
        self._errors = self.log.with_suffix(".err")
        with self.log.open("ab") as out, self._errors.open("ab") as err:
            self._popen = subprocess.Popen(
                [str(part) for part in command],
                stdin=stdin,
                stdout=out,
                stderr=err,
                cwd=work.path,
                env=work.environment | dict(environment or {}),
                start_new_session=True,
            )
        work.stack.callback(self.stop)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    def output(self) -> str:
        """Standard output so far."""
        return self.log.read_text(errors="replace")

    def errors(self) -> str:
        """Standard error so far."""
        return self._errors.read_text(errors="replace")

    def tail(self, lines: int = 12) -> str:
        return "\n".join((self.output() + self.errors()).splitlines()[-lines:])

    def wait_until(self, condition: Callable[[], object], what: str, timeout: float = 30.0) -> None:
        """Wait for readiness; a process that ends first, or is late, is an error with its last words."""

        def ready() -> bool:
            if not self.running:
                raise RuntimeError(f"{self.name} ended with {self.returncode} before {what}:\n{self.tail()}")
            return bool(condition())

        try:
            until(ready, what, timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{self.name}: {error}\n{self.tail()}") from error

    def signal(self, number: int) -> None:
        """Signal this very process; one that has ended is left alone."""
        if self.running:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 30.0) -> int:
        return self._popen.wait(timeout)

    def stop(self, timeout: float = 15.0) -> int:
        """SIGTERM, then SIGKILL after `timeout`; returns the exit status."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            return self.wait()
