"""The harness itself: a check that cannot fail proves nothing."""

import subprocess
import sys
import urllib.request

import pytest

from tests.harness import tiny
from tests.harness.link import ShapedLink
from tests.harness.machine import LeftBehindError, Work, alive, until
from tests.harness.process import Process
from tests.harness.registry import Registry
from tests.harness.serve import toml


def test_a_process_left_behind_is_named_and_killed() -> None:
    run = Work("left")
    child = subprocess.Popen(["setsid", "sleep", "1000"], env=run.environment)
    with pytest.raises(LeftBehindError, match="sleep 1000"), run:
        until(lambda: child.pid in run.processes(), "the child runs")
    child.wait()
    assert not alive(child.pid)
    assert not run.path.exists()


@pytest.mark.root
def test_a_mount_left_behind_is_named_and_unmounted() -> None:
    run = Work("left")
    target = run.directory("target")
    with pytest.raises(LeftBehindError, match=f"mount {target}"), run:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(target)], check=True)
    assert not run.path.exists()


def test_a_process_that_ends_early_is_reported_with_its_last_words(work: Work) -> None:
    process = Process(work, "quitter", [sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.raises(RuntimeError, match="no such thing"):
        process.wait_until(lambda: False, "it is ready")


@pytest.mark.real
def test_the_link_delays_and_records_and_the_log_names_clients(work: Work) -> None:
    registry = Registry(work)
    content = tiny.data(size=100_000)
    digest = registry.put_blob("t/blob", content)
    link = ShapedLink(work, registry.address, round_trip_ms=100, megabits=1000)
    mark = registry.mark()
    request = urllib.request.Request(f"http://{link.address}/v2/t/blob/blobs/{digest}", headers={"User-Agent": "me/1"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.read() == content
    [seen] = registry.since(mark).by("me")
    assert (seen.method, seen.digest, seen.size) == ("GET", digest, len(content))
    assert any(content in stream for name, stream in link.streams() if name.endswith("down"))


@pytest.mark.real
def test_a_flipped_byte_is_served_and_comes_back(work: Work) -> None:
    registry = Registry(work)
    digest = registry.put_blob("t/blob", b"0123456789")
    registry.flip(digest, 3)
    assert registry.get_blob("t/blob", digest) == b"012\xcc456789"
    registry.flip(digest, 3)
    assert registry.get_blob("t/blob", digest) == b"0123456789"


def test_toml_of_nested_tables() -> None:
    assert toml({"a": 1, "b": {"c": ["x"], "d": {"e": True}}}) == 'a = 1\n\n[b]\nc = ["x"]\n\n[b.d]\ne = true\n'
