"""An account of a start from events: the right phase is blamed, and nothing odd in the events breaks it."""

import json
from typing import Any

import pytest

from snapshotter.cli import explain, story
from snapshotter.cli.main import main

Event = dict[str, Any]


def event(name: str, end: float, seconds: float = 0, **fields: Any) -> Event:
    return {"event": name, "monotonic": end, "wall": 1e9 + end, "seconds": seconds, "outcome": "ok", **fields}


def a_start(**slow: float) -> list[Event]:
    """A pull and a start in which each step takes 0.1 s, or as long as `slow` says."""
    took = {name: slow.get(name, 0.1) for name in ("resolve", "fetch", "key", "verify", "attach", "mount", "range")}
    at, found = 100.0, []
    at += took["resolve"]
    found.append(event("fetch", at - 0.01, took["resolve"] - 0.02, what="manifest", bytes=1000))
    found.append(event("resolve", at, took["resolve"]))
    begin = at
    at += took["fetch"]
    found.append(event("fetch", at, took["fetch"], what="blob", bytes=500_000))
    at += took["key"]
    found.append(event("key", at, took["key"], by="kbs", outcome="released"))
    at += took["verify"]
    found.append(event("load", at, at - begin, kind="sealed"))
    at += took["attach"]
    found += [event("attached", at - 0.001, id=3), event("attach", at, took["attach"], id=3)]
    at += took["mount"]
    found += [event("mount", at, took["mount"], id=3), event("first-read", at + 0.2, found="missing")]
    for number in range(4):
        at += took["range"]
        found.append(event("range", at, took["range"], length=1 << 20, reads=2, purpose="read", offset=number << 20))
    found.append(event("range", at + 100, 0.1, length=5 << 20, reads=1, purpose="read"))
    return found


@pytest.mark.parametrize(
    ("step", "blamed"),
    [
        ("fetch", "registry, for metadata"), ("key", "key release"), ("verify", "verification"), ("attach", "attach"),
        ("mount", "mount"), ("range", "registry, for data"),
    ],
)  # fmt: skip
def test_the_slow_step_is_blamed(step: str, blamed: str) -> None:
    found = story.account(a_start(**{step: 7.0}), {}, [])
    assert max(found.phases, key=lambda name: found.phases[name]) == blamed
    assert blamed in found.summary[0]
    assert found.phases[blamed] == pytest.approx(28 if step == "range" else 7, abs=0.3)


def test_a_start_in_sentences() -> None:
    counters = {"hits": 30, "misses": 10, "retries": 2, "verify_failures": 1, "eio": 1}
    text = " ".join(story.account(a_start(), counters, [{"seconds": 1.5}, {"seconds": 0.1}]).summary)
    for said in (
        "Pulled in 400 ms", "489.3 KiB of metadata in 2 requests", "for its key (kbs)",
        "The first data was read 200 ms",
        "had to be fetched", "4.0 MiB from the registry in 4 ranges", "8 reads waited", "75 % of 40 chunks",
        "longest read waited 1.5 s", "2 requests had to be repeated", "not what was sealed", "1 reads failed with EIO",
    ):  # fmt: skip
        assert said in text, (said, text)
    assert "4.0 MiB" in text, "what came after a silence does not belong to the start"


def test_ranges_that_overlap_are_not_counted_twice() -> None:
    events = [event("range", 10 + n / 100, 2, length=1, reads=1, purpose="read") for n in range(8)]
    assert story.account(events, {}, []).data["seconds"] == pytest.approx(2.07, abs=0.001)


def test_a_refusal_says_why() -> None:
    events = [event("key", 1.0, 0.5, by="kbs", outcome="no-key"), event("load", 1.0, 0.8, outcome="no-key")]
    found = story.account(events, {}, [])
    assert any(sentence.startswith("Refused (no-key) in 800 ms") for sentence in found.summary)


def test_without_memory_of_it() -> None:
    assert "Nothing is remembered" in story.account([], {}, []).summary[0]


def test_the_timeline_joins_ranges_and_keeps_everything_else() -> None:
    moments = story.account(a_start(), {}, []).timeline
    assert [moment.text.split()[0] for moment in moments].count("mount") == 1
    assert [moment.text for moment in moments if "ranges" in moment.text] == [
        "3 ranges, 3.0 MiB, 6 reads waited",
        "2 ranges, 6.0 MiB, 3 reads waited",
    ], "the first read came between them"
    assert moments[0].at == 0
    assert "seconds=" not in " ".join(moment.text for moment in moments)


IMAGES = [
    {"manifest": "sha256:aa11", "references": ["registry/app:1"], "ids": [1]},
    {"manifest": "sha256:ab22", "references": ["registry/base:1"], "ids": [2]},
]


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("app", 0, "registry/app:1"),
        ("sha256:ab", 0, "registry/base:1"),
        ("a", 2, "could be any"),
        ("zz", 3, "no image"),
    ],
)
def test_an_image_may_be_named_in_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str, code: int, said: str
) -> None:
    def ask(_: str, worker: str, message: Event) -> Event:
        known = [image for image in IMAGES if message.get("image", image["manifest"]) == image["manifest"]]
        return {"images": [image | {"events": a_start()} for image in known if "container" not in message]}

    monkeypatch.setattr(explain, "ask", ask)
    assert main(["explain", what]) == code
    told = capsys.readouterr()
    assert said in told.out + told.err
    if code == 0:
        assert main(["explain", what, "--json"]) == 0
        [document] = json.loads(capsys.readouterr().out)["images"]
        assert {"manifest", "references", "ids", "phases", "data", "counters", "timeline", "summary"} <= document.keys()
