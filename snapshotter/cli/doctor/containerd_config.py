"""containerd's configuration as containerd takes it: file, imports, defaults, and what 2.x makes of old files."""

import fnmatch
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshotter.cli.doctor.machine import Machine

Table = Mapping[str, Any]

CRI_V1 = "io.containerd.grpc.v1.cri"  # 1.x
CRI_IMAGES = "io.containerd.cri.v1.images"  # 2.x
TRANSFER = "io.containerd.transfer.v1.local"
DROP_INS = Path("/etc/containerd/conf.d")  # which 2.3 and later import in any case
_VERSION = re.compile(r"containerd \S+ (?:v)?(\d+)\.(\d+)")
_IMPORTS = 64


@dataclass(frozen=True)
class ContainerdConfig:
    """`release` is the program's version, (0, 0) if it is not installed here. `dumped`: containerd itself was asked."""

    path: Path
    files: tuple[Path, ...]
    stated: Table  # the files merged, as they are written
    effective: Table  # with what containerd adds and drops
    dumped: bool
    release: tuple[int, int]

    @classmethod
    def read(cls, machine: Machine, path: Path) -> "ContainerdConfig":
        """Raises OSError for files that cannot be read, ValueError for what is no TOML."""
        match = _VERSION.match(machine.output("containerd", "--version") or "")
        release = (int(match[1]), int(match[2])) if match else (0, 0)
        stated: dict[str, Any] = {}
        files: list[Path] = []
        _merge_file(machine, path, stated, files)
        if release >= (2, 3):
            for name in _matching(machine, DROP_INS / "*.toml"):
                _merge_file(machine, name, stated, files)
        dump = machine.output("containerd", "--config", str(path), "config", "dump")
        return cls(path, tuple(files), stated, tomllib.loads(dump) if dump else stated, bool(dump), release)

    @property
    def is_2x(self) -> bool:
        """By the program; without one, by what the file is written for."""
        return self.release[0] >= 2 or (self.release == (0, 0) and self.version >= 3)

    @property
    def version(self) -> int:
        """Of the file's format, as it is written."""
        version = self.stated.get("version", 1)
        return version if isinstance(version, int) else 1

    def plugin(self, name: str) -> Table:
        """A plugin's table; {} if there is none."""
        return table(table(self.effective, "plugins"), name)

    @property
    def cri(self) -> tuple[str, Table]:
        """Where CRI's keys about snapshotters are: the table's name as it is to be written, and what is in there."""
        if self.is_2x and (self.dumped or self.version >= 3):
            return f"plugins.'{CRI_IMAGES}'", self.plugin(CRI_IMAGES)
        return f'plugins."{CRI_V1}".containerd', table(self.plugin(CRI_V1), "containerd")

    @property
    def has_cri(self) -> bool:
        disabled = self.stated.get("disabled_plugins", [])
        names = {CRI_V1, CRI_IMAGES, "cri"} if isinstance(disabled, list) else set()
        return not names & set(map(str, disabled))

    def proxies(self, address: str) -> dict[str, Table]:
        """The proxy plugins on this socket, by name, as they are written: the dump of 1.6 leaves `exports` out."""
        plugins = table(self.stated, "proxy_plugins")
        return {name: table(plugins, name) for name in plugins if table(plugins, name).get("address") == address}

    @property
    def unpackers(self) -> list[Table]:
        """Entries of the transfer service's unpack_config."""
        found = self.plugin(TRANSFER).get("unpack_config")
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def table(parent: Table, name: str) -> Table:
    """A table inside of a table; {} if it is missing or something else."""
    found = parent.get(name)
    return found if isinstance(found, dict) else {}


def _merge_file(machine: Machine, path: Path, into: dict[str, Any], files: list[Path]) -> None:
    if path in files or len(files) >= _IMPORTS:
        return
    files.append(path)
    content = tomllib.loads(machine.read(path))
    _merge(into, content)
    imports = content.get("imports", [])
    for pattern in imports if isinstance(imports, list) else []:
        place = path.parent / str(pattern)
        for name in _matching(machine, place) if "*" in place.name else [place]:
            _merge_file(machine, name, into, files)


def _matching(machine: Machine, pattern: Path) -> list[Path]:
    try:
        names = machine.names(pattern.parent)
    except OSError:
        return []
    return [pattern.parent / name for name in sorted(fnmatch.filter(names, pattern.name))]


def _merge(into: dict[str, Any], more: Table) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
