"""The configuration file: whatever is in it, it is read or refused by name."""

from pathlib import Path

import pytest

from snapshotter import config
from snapshotter.errors import ConfigError

WHOLE = b"""root = "/var/lib/coco"
mode = "confidential"
[keys]
files = ["/etc/coco/tenant.pem"]
[keys.kbs]
url = "https://kbs.example"
"""


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff",
        b"\0",
        b"root",
        b"root = 7",
        b"unknown = 1",
        b"keys = []",
        b"x = " + b"9" * 5000,
        b"x = " + b"[" * 50_000,
    ],
    ids=map(str, range(8)),
)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=f"config {path}"):
        config.load(path)


@pytest.mark.parametrize("name", ["absent", "\0", "\ud800", "."])
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="config "):
        config.load(tmp_path / name)


def test_a_configuration_cut_anywhere_is_read_up_to_there_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    read = 0
    for length in range(len(WHOLE) + 1):
        path.write_bytes(WHOLE[:length])
        try:
            config.load(path)
        except ConfigError:
            continue
        read += 1
    assert 0 < read <= WHOLE.count(b"\n") * 2 + 2, "at the ends of lines only"
