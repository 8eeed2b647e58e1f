"""What we write is Prometheus' text format."""

import json

import pytest

from snapshotter.monitor import dataplane
from snapshotter.monitor.exposition import by, counter, gauge, histogram, number, render
from snapshotter.monitor.tally import Counts, Histograms
from tests.harness.metrics import parse


def test_every_kind_reads_back() -> None:
    seconds, counts = Histograms((0.5, 1.0)), Counts()
    for value in (0.1, 0.7, 3.25):
        seconds.observe(value, "Stat", "OK")
    counts.add("a", count=3)
    text = render(
        [
            histogram("s_seconds", "Seconds.", ["method", "code"], seconds.snapshot(), (0.5, 1.0)),
            counter("c_total", "Counts.", by(["reason"], json.loads(json.dumps(counts.snapshot())))),
            gauge("g", "Gauge.", [({}, 1.5)]),
            gauge("none", "Nothing yet.", []),
        ]
    )
    found = parse(text)
    assert {name: metric.kind for name, metric in found.items()} == {
        "s_seconds": "histogram", "c_total": "counter", "g": "gauge", "none": "gauge",
    }  # fmt: skip
    labels = {("method", "Stat"), ("code", "OK")}
    buckets = {bound: found["s_seconds"].samples["_bucket", frozenset({*labels, ("le", bound)})] for bound in
               ("0.5", "1", "+Inf")}  # fmt: skip
    assert buckets == {"0.5": 1, "1": 2, "+Inf": 3}
    assert found["s_seconds"].samples["_sum", frozenset(labels)] == pytest.approx(4.05)
    assert found["c_total"].value(reason="a") == 3
    assert found["g"].value() == 1.5


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", 'a="b",c="d"} 5', "ä"])
def test_label_values_may_be_anything(text: str) -> None:
    rendered = render([gauge("g", "Gauge.", [({"x": text}, 1)])])
    assert len(parse(rendered)["g"].samples) == 1
    assert len(rendered.splitlines()) == 3


@pytest.mark.parametrize(("value", "text"), [(1, "1"), (1.0, "1"), (0.25, "0.25"), (float("inf"), "+Inf"), (True, "1")])
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_images_shown_one_by_one_are_bounded() -> None:
    images = [{"id": number, "manifest": "m", "counters": {"reads": number}} for number in range(1000)]
    text = render(dataplane.families({"images": images}, {number: f"image {number}" for number in range(1000)}))
    found = parse(text)
    assert len(found["coco_image_reads_total"].samples) == dataplane.MOST_IMAGES
    assert found["coco_image_reads_total"].value(image="image 999") == 999
    assert found["coco_images_attached"].value() == 1000
