"""The journal stays small whatever happens, and keeps what explains a start."""

import asyncio
import time

import pytest

from snapshotter.errors import KeyDenied
from snapshotter.monitor import journal
from snapshotter.monitor.journal import Journal
from snapshotter.monitor.tally import Counts, Histograms
from snapshotter.monitor.trail import Trail


def test_first_and_last_events_of_an_image_are_kept() -> None:
    story = Journal()
    for number in range(1000):
        story.note("a", "range", offset=number)
    told = story.tell("a")
    most = journal.FIRST_EVENTS + journal.LAST_EVENTS
    kept = [event["offset"] for event in told["events"]]
    assert kept == [*range(journal.FIRST_EVENTS), *range(1000 - journal.LAST_EVENTS, 1000)]
    assert told["dropped"] == 1000 - most


def test_an_event_tells_both_clocks_and_bounded_fields() -> None:
    story = Journal()
    story.note("a", "resolve", reference="x" * 10_000, seconds=0.5)
    (event,) = story.tell("a")["events"]
    assert abs(event["wall"] - time.time()) < 10
    assert abs(event["monotonic"] - time.monotonic()) < 10
    assert (event["event"], event["seconds"], len(event["reference"])) == ("resolve", 0.5, 300)


def test_the_image_noted_longest_ago_goes_first() -> None:
    story = Journal()
    for number in range(journal.IMAGES + 10):
        story.name(f"image-{number}", "tag")
        story.note("image-0", "again")
    assert len(story.images()) == journal.IMAGES
    assert "image-0" in story.images()
    assert "image-1" not in story.images()
    assert story.names(f"image-{journal.IMAGES}") == ["tag"]


def test_all_images_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "ALL_EVENTS", 50)
    story = Journal()
    for number in range(10):
        for _ in range(20):
            story.note(f"image-{number}", "x")
    assert list(story.images()) == ["image-8", "image-9"]
    assert [len(story.tell(image)["events"]) for image in story.images()] == [20, 20]


async def test_phases_are_about_the_image_of_their_task() -> None:
    trail = Trail()

    async def pull(image: str) -> None:
        with trail.about(image, f"{image}:tag"), trail.timed("load", blobs=2) as told:
            await asyncio.sleep(0)
            await asyncio.to_thread(trail.note, "deep")
            told["kind"] = image

    await asyncio.gather(pull("a"), pull("b"))
    for image in ("a", "b"):
        deep, load = trail.journal.tell(image)["events"]
        assert deep["event"] == "deep"
        assert (load["event"], load["blobs"], load["kind"], load["outcome"]) == ("load", 2, image, "ok")
        assert trail.journal.names(image) == [f"{image}:tag"]
    trail.note("about nothing")
    assert len(trail.journal.images()) == 2


def test_a_refused_phase_tells_why() -> None:
    trail = Trail()
    with pytest.raises(KeyDenied), trail.about("a", "a"), trail.timed("load"):
        raise KeyDenied("no")
    assert trail.journal.tell("a")["events"][0]["outcome"] == "no-key"
    assert trail.failures.snapshot() == [(("load", "no-key"), 1)]
    assert [labels for labels, _, _ in trail.phases.snapshot()] == [("load",)]


def test_histograms_put_a_bound_into_its_own_bucket() -> None:
    found = Histograms((1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 9.0):
        found.observe(seconds, "a")
    assert found.snapshot() == [(("a",), [2, 1, 1], 12.0)]


def test_labels_from_outside_cannot_grow_without_bound() -> None:
    counts = Counts()
    for number in range(1000):
        counts.add("op", str(number))
    found = dict(counts.snapshot())
    assert len(found) == 257
    assert found["other", "other"] == 1000 - 256
