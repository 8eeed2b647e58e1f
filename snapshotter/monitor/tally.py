"""Numbers of what happens: counts and histograms by labels, cheap to add to from any thread, plain data to pass on."""

import threading
from bisect import bisect_left
from collections.abc import Sequence
from typing import TypeAlias

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MOST_LABELS = 256  # combinations; what comes later is counted under "other"

Labels: TypeAlias = tuple[str, ...]
Count: TypeAlias = tuple[Labels, float]
Distribution: TypeAlias = tuple[Labels, list[int], float]  # observations per bucket and above the last, their sum


class Counts:
    """How often something happened, by labels."""

    def __init__(self) -> None:
        self._counts: dict[Labels, float] = {}
        self._lock = threading.Lock()

    def add(self, *labels: str, count: float = 1) -> None:
        with self._lock:
            key = _bounded(self._counts, labels)
            self._counts[key] = self._counts.get(key, 0) + count

    def snapshot(self) -> list[Count]:
        with self._lock:
            return list(self._counts.items())


class Histograms:
    """How long something took, by labels. `bounds` are the upper ends of the buckets, in seconds."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self._found: dict[Labels, tuple[list[int], list[float]]] = {}
        self._lock = threading.Lock()

    def observe(self, seconds: float, *labels: str) -> None:
        with self._lock:
            key = _bounded(self._found, labels)
            if key not in self._found:
                self._found[key] = ([0] * (len(self.bounds) + 1), [0.0])
            buckets, total = self._found[key]
            buckets[bisect_left(self.bounds, seconds)] += 1
            total[0] += seconds

    def snapshot(self) -> list[Distribution]:
        with self._lock:
            return [(labels, list(buckets), total[0]) for labels, (buckets, total) in self._found.items()]


def _bounded(known: "dict[Labels, float] | dict[Labels, tuple[list[int], list[float]]]", labels: Labels) -> Labels:
    return labels if labels in known or len(known) < MOST_LABELS else ("other",) * len(labels)
