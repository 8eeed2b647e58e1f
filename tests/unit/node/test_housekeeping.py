"""`ls`, `gc` and `prune` as a person meets them when something is wrong, and how lists are printed."""

from pathlib import Path

import pytest

from snapshotter.cli import table
from snapshotter.cli.main import main


@pytest.mark.parametrize("command", ["ls", "gc", "prune"])
def test_without_a_running_daemon(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--root", str(tmp_path)]) == 10
    assert "no answer from snapshotd (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--target", "many"], "--target: not a size"), (["--older", "7 weeks"], "--older: not a time")],
)
def test_prune_with_wrong_values(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "--root", str(tmp_path), *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_table_keeps_names_from_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table.show(("NAME", "N"), [("a\x1b[2J\n", 1), ("böser name", 22)])
    assert capsys.readouterr().out == "NAME        N\na\\x1b[2J\\n  1\nböser name  22\n"


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (180_000, "2d")])
def test_ages(seconds: float, text: str) -> None:
    assert table.age(seconds) == text
