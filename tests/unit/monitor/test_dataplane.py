"""What blobd tells about the reads that it serves, on a real kernel."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.dataplane import CHUNK, Plane, build, content, forget_pages, read_at, wait_until

pytestmark = pytest.mark.root

BIG = content(1, 40 * CHUNK)
IMAGE = build({"big": BIG})


def story(plane: Plane, image: str = "1") -> dict[str, Any]:
    (found,) = plane.machine.request({"op": "explain", "image": image})["images"]
    return dict(found)


def events(plane: Plane, kind: str) -> list[dict[str, Any]]:
    return [event for event in story(plane)["events"] if event["event"] == kind]


def test_the_story_of_an_image_holds_its_ranges_and_no_name(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        target = plane.serve(1, IMAGE)
        assert (target / "big").read_bytes() == BIG
        told = story(plane)
        assert story(plane, told["manifest"])["events"] == told["events"]
        assert told["events"][0]["event"] == "attached"
        assert len(events(plane, "first-read")) == 1
        ranges = events(plane, "range")
        assert sum(event["length"] for event in ranges) == told["counters"]["1"]["fetched_bytes"]
        assert {event["outcome"] for event in ranges} == {"ok"}
        assert any(event["reads"] for event in ranges)
        assert all(event["blob"] == IMAGE.devices[0].digest.removeprefix("sha256:")[:12] for event in ranges)
        assert told["longest_waits"][0]["length"] > 0
        counters = told["counters"]["1"]
        assert counters["hits"] + counters["misses"] == counters["reads"] == plane.machine.counters()["reads"]
        overview = plane.machine.request({"op": "explain"})["images"]
        assert overview == [{"manifest": told["manifest"], "ids": [1]}]
        assert plane.machine.request({"op": "explain", "image": "no such"})["images"] == []


def test_a_read_that_is_stuck_is_seen_while_it_is(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        target = plane.serve(1, IMAGE)
        wait_until(lambda: events(plane, "range"), "contact with the registry was made")
        plane.server.frozen.add("app")
        reader = threading.Thread(target=read_at, args=(target / "big", 20 * CHUNK, 10))
        reader.start()
        wait_until(lambda: plane.machine.request({"op": "metrics"})["oldest_seconds"] > 0.3, "an old read")
        found = plane.machine.request({"op": "metrics"})
        assert found["parked"] >= 1
        assert found["in_flight"] >= 1
        plane.server.frozen.clear()
        reader.join(30)
        wait_until(lambda: plane.machine.request({"op": "metrics"})["in_flight"] == 0, "nothing is in flight")
        found = plane.machine.request({"op": "metrics"})
        assert (found["parked"], found["oldest_seconds"]) == (0, 0)
        assert max(wait["seconds"] for wait in story(plane)["longest_waits"]) > 0.3


def test_failures_are_told_by_cause_and_operation(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        target = plane.serve(1, IMAGE)
        plane.server.flip = lambda _repository, _digest, _offset, data: bytes(len(data))
        with pytest.raises(OSError, match="Input/output"):
            read_at(target / "big", 20 * CHUNK, 10)
        found = plane.machine.request({"op": "metrics"})
        assert sum(count for _, count in found["causes"]) == found["counters"]["eio"] > 0
        assert [["read", "EIO"], found["counters"]["eio"]] in found["failures"]
        assert events(plane, "verify-failed")
        assert {event["reason"] for event in events(plane, "read-failed")} == {
            labels[0] for labels, _ in found["causes"]
        }
        plane.server.flip = None
        forget_pages(target / "big")
        assert read_at(target / "big", 20 * CHUNK, 10) == BIG[20 * CHUNK :][:10]


def test_counts_of_a_detached_image_stay_in_the_sum(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        target = plane.serve(1, IMAGE)
        assert os.stat(target / "big").st_size == len(BIG)
        assert (target / "big").read_bytes() == BIG
        before = plane.machine.counters()
        plane.machine.unmount(target)
        plane.machine.request({"op": "detach", "id": 1})
        after = plane.machine.counters()
        assert after["fetched_bytes"] == before["fetched_bytes"] > 0
        assert plane.machine.request({"op": "metrics"})["images"] == []
        (kept,) = plane.machine.request({"op": "explain", "image": ""})["images"]
        assert kept["ids"] == []
        (told,) = plane.machine.request({"op": "explain", "image": kept["manifest"]})["images"]
        assert told["events"][-1]["event"] == "detached"
