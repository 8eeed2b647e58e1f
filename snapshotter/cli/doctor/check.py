"""What a check is: a stable id and a function from a node to a result."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from snapshotter.cli.doctor.containerd_config import ContainerdConfig
from snapshotter.cli.doctor.machine import Machine
from snapshotter.config import Config

Status = Literal["ok", "warn", "fail", "skip"]


class Result(NamedTuple):
    """What was found, and for `warn` and `fail` what to change."""

    status: Status
    found: str
    advice: str = ""


class Skipped(Exception):
    """A check cannot be made here; the text says why."""


def ok(found: str) -> Result:
    return Result("ok", found)


def warn(found: str, advice: str) -> Result:
    return Result("warn", found, advice)


def fail(found: str, advice: str) -> Result:
    return Result("fail", found, advice)


@dataclass
class Node:
    """What is looked at: a machine, our configuration, and which containerd and image are meant."""

    machine: Machine
    config: Config
    config_path: Path | None = None  # None: all defaults
    config_error: str = ""
    containerd_path: Path = Path("/etc/containerd/config.toml")
    containerd_socket: Path = Path("/run/containerd/containerd.sock")
    image: str = ""

    @cached_property
    def containerd(self) -> ContainerdConfig:
        """Raises Skipped if there is none that can be read."""
        try:
            return ContainerdConfig.read(self.machine, self.containerd_path)
        except (OSError, ValueError) as error:
            raise Skipped(f"{self.containerd_path} cannot be read") from error

    @cached_property
    def answers(self) -> dict[str, dict[str, object]]:
        """What the living workers say to `status`, by name."""
        found: dict[str, dict[str, object]] = {}
        for name in ("keeper", "snapshotd", "blobd"):
            try:
                found[name] = self.machine.ask(f"{self.config.root}/{name}.sock", {"op": "status"})
            except PermissionError:
                raise Skipped("only root may talk to the workers") from None
            except (OSError, EOFError):
                continue
        return found


class Check(NamedTuple):
    """`id` is stable: scripts and docs/troubleshooting.md name it."""

    id: str
    run: Callable[[Node], Result | Awaitable[Result]]


Checks = Sequence[Check]
