"""`kbs-dev` as a process of a run."""

import secrets
from pathlib import Path
from typing import Any

from tests.harness import serve
from tests.harness.kbs import put
from tests.harness.machine import Work
from tests.harness.process import Process

NAME = "default/image-kek/app"


class Broker:
    """`kbs-dev` as a process, with one key."""

    def __init__(self, work: Work, *options: str | Path, label: str = "kbs") -> None:
        self.directory = work.directory(f"{label}-resources")
        self.key = put(self.directory, NAME, secrets.token_bytes(32))
        command = [*serve.PROGRAM, "kbs-dev", "--resources", self.directory, "--listen", "127.0.0.1:0", *options]
        environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
        self.process = Process(work, label, command, environment=environment)
        self.process.wait_until(lambda: "\n" in self.process.output(), "kbs-dev listens", 20)
        self.url = self.process.output().split()[0]

    @property
    def recipient(self) -> str:
        return f"kbs:///{NAME}={self.key}"

    def keys(self, **settings: Any) -> dict[str, Any]:
        """The `[keys]` section of a node that asks this broker."""
        return {"files": [], "kbs": {"url": self.url, "insecure_sample_attester": True} | settings}

    @property
    def secrets(self) -> list[str]:
        raw = self.key.read_bytes()
        return [raw.hex(), repr(raw)[2:-1]]
