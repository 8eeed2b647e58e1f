"""The way of a pull through snapshotd: how long each phase took, who released keys, what was refused.

A room that does a part of it says only `with trail.timed("fetch"): …`; for which image that is, its caller has said
with `trail.about`.
"""

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

from snapshotter.errors import SnapshotterError
from snapshotter.log import bound_request
from snapshotter.monitor.journal import Journal
from snapshotter.monitor.tally import Counts, Histograms

Fields = dict[str, str | float | None]


class _Subject(NamedTuple):
    image: str  # a manifest digest
    reference: str
    namespace: str


_NOTHING = _Subject("", "", "")
_about: ContextVar[_Subject] = ContextVar("image", default=_NOTHING)


class Trail:
    def __init__(self) -> None:
        self.journal = Journal()
        self.phases = Histograms()  # seconds by phase
        self.failures = Counts()  # by phase and reason
        self.pulls = Counts()  # images looked at, by kind
        self.keys = Counts()  # layer keys asked for, by who was asked and outcome

    @contextlib.contextmanager
    def about(self, image: str, reference: str, namespace: str = "") -> Iterator[None]:
        """What is noted inside, by this task and those it starts, is about this image (a manifest digest)."""
        self.journal.name(image, reference)
        token = _about.set(_Subject(image, reference, namespace))
        try:
            yield
        finally:
            _about.reset(token)

    def note(self, event: str, **fields: str | float | None) -> None:
        if image := _about.get().image:
            self.journal.note(image, event, **fields)

    def subject(self) -> dict[str, str]:
        """Which image this task is about, and for whom, in the words of the audit log."""
        image, reference, namespace = _about.get()
        request = bound_request() or ""
        return {"namespace": namespace, "request": request, "image": reference, "manifest": image}

    @contextlib.contextmanager
    def timed(self, phase: str, **fields: str | float | None) -> Iterator[Fields]:
        """Measure the block; an error passes through and its reason is the outcome. What is yielded may be added to."""
        begin = time.monotonic()
        outcome = "ok"
        try:
            yield fields
        except BaseException as error:
            outcome = outcome_of(error)
            self.failures.add(phase, outcome)
            raise
        finally:
            seconds = time.monotonic() - begin
            self.phases.observe(seconds, phase)
            self.note(phase, **(fields | {"seconds": round(seconds, 4), "outcome": outcome}))


def outcome_of(error: BaseException) -> str:
    """One word: a `reason`, `cancelled`, or `internal` for a bug."""
    if isinstance(error, SnapshotterError):
        return error.reason
    return "internal" if isinstance(error, Exception) else "cancelled"
