"""Named points: the list is the source's, a typing error is refused, and a point can be armed in a running process."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotter import failpoints

ROOT = Path(__file__).parents[3]
_USE = re.compile(r'failpoints\.(hit|enabled)\(\s*((?:"[^"]+"|[^()])+)\)')


def used(function: str) -> list[str]:
    found = []
    for path in (ROOT / "snapshotter").rglob("*.py"):
        uses = [match[2] for match in _USE.finditer(path.read_text()) if match[1] == function]
        found += [name for use in uses for name in re.findall(r'"([a-z-]+\.[a-z.-]+)"', use)]
    return found


def test_every_point_of_the_source_is_listed_and_every_listed_one_is_in_the_source_once() -> None:
    assert sorted(used("hit")) == sorted(name for names in failpoints.POINTS.values() for name in names)
    assert sorted(used("enabled")) == sorted(failpoints.SWITCHES)


def python(code: str, points: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", f"from snapshotter import failpoints\n{code}"], capture_output=True, text=True,
        cwd=ROOT, env={"COCO_FAILPOINT": points}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("text", ["create.maid:kill", "create.made:explode", "create.made"])
def test_what_is_not_known_is_refused(text: str) -> None:
    assert "COCO_FAILPOINT" in python("", text).stderr


def test_an_armed_point_kills_once_after_letting_some_pass(tmp_path: Path) -> None:
    (tmp_path / "create.made").write_bytes(b"..")
    code = "for number in range(4): print(number, flush=True); failpoints.hit('create.made')"
    first = python(code, f"keeper.no-delay:on,@{tmp_path}")
    assert first.returncode == -signal.SIGKILL
    assert first.stdout.split() == ["0", "1", "2"]
    assert [path.name for path in tmp_path.iterdir()] == ["create.made.hit"]
    assert python(code, f"@{tmp_path}").returncode == 0
