"""A clock that is set back and forth under a running service: times never contradict each other, and nothing waits."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.daemon import Daemon
from tests.harness.machine import Work

pytestmark = pytest.mark.root

DAY = 86_400
_PATCH = """
import os, time
real, file = time.time_ns, os.environ["CLOCK_OFFSET"]
time.time_ns = lambda: real() + int(open(file).read()) * 10**9
time.time = lambda: time.time_ns() / 10**9
"""


def test_times_never_run_backwards(work: Work, daemon: Callable[..., Daemon]) -> None:
    patch = work.directory("patch")  # found by the interpreter at its start
    (patch / "sitecustomize.py").write_text(_PATCH)
    offset = work.path / "offset"
    offset.write_text("0")
    repository = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{patch}:{repository}", "CLOCK_OFFSET": str(offset)}
    served = daemon(environment=environment)
    sn = served.client()
    sn.prepare("key")
    made = sn.stat("key")
    offset.write_text(str(-DAY))  # between Prepare and Commit
    sn.commit("bottom", "key")
    bottom = sn.stat("bottom")
    assert made.created_ns <= bottom.created_ns == bottom.updated_ns
    for key in ("child", "look"):
        (sn.prepare if key == "child" else sn.view)(key, "bottom")
        assert sn.stat(key).created_ns >= bottom.created_ns, "a child is not older than its parent"
    offset.write_text(str(3650 * DAY))
    later = sn.update("bottom", {"a": "1"})
    assert later.created_ns == bottom.created_ns
    assert later.updated_ns > bottom.updated_ns + 3000 * DAY * 10**9
    offset.write_text(str(-20_000 * DAY))  # the year 1971
    last = sn.update("bottom", {"a": "2"})
    assert (last.created_ns, last.updated_ns, last.labels) == (later.created_ns, later.updated_ns, {"a": "2"})
    served.restart(environment)
    before = {info.name: info for info in sn.walk()}
    assert all(info.created_ns <= info.updated_ns for info in before.values())
    served.process.stop()
    (served.root / "metadata.db").unlink()
    served.start(environment)
    assert {info.name: info for info in sn.walk()} == before, "made again from what the directories know"
    sn.prepare("new", "bottom")
    assert sn.stat("new").created_ns >= before["bottom"].created_ns
    for name in ("new", "child", "look", "bottom"):
        sn.remove(name)
    sn.cleanup()
    assert served.names() == set()
