"""Prometheus' text format, version 0.0.4: families of samples to lines.

Written here because all numbers come from elsewhere, three processes and the kernel, at the moment they are asked for:
there is nothing that a library would count for us.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from snapshotter.monitor.tally import SECONDS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[Mapping[str, str], float]
Kind = Literal["counter", "gauge", "histogram"]


class Family(NamedTuple):
    """One metric. `lines` are its samples, ready but for the name: ("_bucket", {"le": "1"}, 5)."""

    name: str
    kind: Kind
    help: str
    lines: Sequence[tuple[str, Mapping[str, str], float]]


def counter(name: str, help_text: str, samples: Iterable[Sample]) -> Family:
    return Family(name, "counter", help_text, [("", labels, value) for labels, value in samples])


def gauge(name: str, help_text: str, samples: Iterable[Sample]) -> Family:
    return Family(name, "gauge", help_text, [("", labels, value) for labels, value in samples])


def histogram(
    name: str,
    help_text: str,
    labels: Sequence[str],
    found: Iterable[tuple[Sequence[str], Sequence[int], float]],
    bounds: Sequence[float] = SECONDS,
) -> Family:
    """`found` as `Histograms.snapshot` gives it, also after a journey as JSON; `labels` are the names of its labels."""
    lines: list[tuple[str, Mapping[str, str], float]] = []
    for values, buckets, total in found:
        own = dict(zip(labels, values, strict=True))
        count = 0
        for bound, observed in zip((*bounds, float("inf")), buckets, strict=True):
            count += observed
            lines.append(("_bucket", own | {"le": number(bound)}, count))
        lines += [("_sum", own, total), ("_count", own, count)]
    return Family(name, "histogram", help_text, lines)


def by(labels: Sequence[str], found: Iterable[tuple[Sequence[str], float]]) -> list[Sample]:
    """Samples from `Counts.snapshot`, also after a journey as JSON."""
    return [(dict(zip(labels, values, strict=True)), value) for values, value in found]


def render(families: Iterable[Family]) -> str:
    out = []
    for family in families:
        out.append(f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.kind}\n")
        for suffix, labels, value in family.lines:
            inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            out.append(f"{family.name}{suffix}{f'{{{inside}}}' if inside else ''} {number(value)}\n")
    return "".join(out)


def number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
