"""What is installed on a node says what the program does."""

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from snapshotter import config

DEPLOY = Path(__file__).parents[3] / "deploy"


def paths(table: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of all keys that are not tables."""
    found: set[str] = set()
    for key, value in table.items():
        found |= paths(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


def fields(kind: type[msgspec.Struct], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for field in msgspec.structs.fields(kind):
        section = isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
        found |= fields(field.type, f"{prefix}{field.name}.") if section else {prefix + field.name}
    return found


def test_config_file_states_every_key_with_its_default() -> None:
    assert config.load(DEPLOY / "config.toml") == config.Config()
    assert paths(tomllib.loads((DEPLOY / "config.toml").read_text())) == fields(config.Config)


def test_config_file_explains_every_key() -> None:
    before = ""
    for line in (DEPLOY / "config.toml").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            assert before.startswith("#"), f"no comment above {line!r}"
        before = line


@pytest.mark.parametrize("name", ["containerd-1.toml", "containerd-2.toml"])
def test_containerd_is_pointed_at_the_default_address_and_root(name: str) -> None:
    plugin = tomllib.loads((DEPLOY / "containerd" / name).read_text())["proxy_plugins"]["coco"]
    assert plugin["type"] == "snapshot"
    assert plugin["address"] == config.Config().address
    assert plugin["exports"]["root"] == config.Config().root


def test_only_a_containerd_that_maps_ids_is_told_to() -> None:
    for name, capabilities in (("containerd-1.toml", None), ("containerd-2.toml", ["remap-ids"])):
        plugin = tomllib.loads((DEPLOY / "containerd" / name).read_text())["proxy_plugins"]["coco"]
        assert plugin.get("capabilities") == capabilities


def test_unit_leaves_workers_and_mounts_alone() -> None:
    unit = (DEPLOY / "coco-snapshotter.service").read_text()
    lines = {line for line in unit.splitlines() if not line.startswith("#")}
    assert {"KillMode=process", "Restart=always", "OOMPolicy=continue", "ExecReload=/bin/kill -HUP $MAINPID"} <= lines
    assert {"Type=notify", "WatchdogSec=90"} <= lines
    own_namespace = ("Private", "Protect", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Temporary", "Mount")
    assert not [line for line in lines if line.startswith(own_namespace)]
