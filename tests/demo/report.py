"""What the demo says: progress, proof lines, the table, and the last line as JSON."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Figures:
    """One way to start the image."""

    pull_seconds: float
    first_output_seconds: float  # from the start of the pull
    registry_bytes: int
    registry_requests: int
    layer_bytes_by_containerd: int
    disk_bytes: int
    memory_bytes: int = 0  # on the tmpfs that holds the trusted state

    def table_row(self) -> list[str]:
        return [
            f"{self.registry_bytes / 1e6:.1f} MB",
            str(self.registry_requests),
            f"{self.pull_seconds:.2f} s",
            f"{self.first_output_seconds:.2f} s",
            f"{self.disk_bytes / 1e6:.1f} MB",
        ]


@dataclass
class Report:
    """Collects figures and proofs and prints them as they come."""

    figures: dict[str, Any] = field(default_factory=dict)
    proofs: dict[str, bool] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def step(self, text: str) -> None:
        seconds = time.monotonic() - self.started
        bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
        print(f"{bold}[{seconds:6.1f} s] {text}{plain}", flush=True)

    def note(self, text: str) -> None:
        print(f"             {text}", flush=True)

    def proof(self, name: str, holds: bool, text: str) -> None:
        """One line of evidence. `name` is the key in the JSON line."""
        self.proofs[name] = bool(holds) and self.proofs.get(name, True)
        print(f"   {'PROVED' if holds else 'FAILED'}  {name}: {text}", flush=True)

    def table(self, rows: Mapping[str, Figures]) -> None:
        heads = ["", "from registry", "requests", "pull", "to first output", "on disk"]
        lines = [heads, *([name, *row.table_row()] for name, row in rows.items())]
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        print()
        for line in lines:
            cells = [
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            print("   " + "   ".join(cells))
        print(flush=True)

    @property
    def ok(self) -> bool:
        return bool(self.proofs) and all(self.proofs.values())

    def json(self) -> str:
        seconds = round(time.monotonic() - self.started, 1)
        return json.dumps({"ok": self.ok, "seconds": seconds, "figures": self.figures, "proofs": self.proofs})
