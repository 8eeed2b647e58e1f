"""What happened to each image and when, for `explain`: bounded, in memory, lost with the process.

Of an image the first events are kept, which tell of its start, and the last ones, which tell of now. An event holds
what a registry could see anyway: blobs, offsets, lengths, times; never a name or a digest of content.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import msgspec

IMAGES = 256
FIRST_EVENTS, LAST_EVENTS = 256, 256  # of one image
ALL_EVENTS = 20_000  # of all images together; each is about 200 bytes
_NAMES = 8  # references of one image
_TEXT = 300  # characters of one field


class _Story:
    """The events of one image, encoded."""

    __slots__ = ("first", "last", "names", "noted")

    def __init__(self) -> None:
        self.first: list[bytes] = []
        self.last: deque[bytes] = deque(maxlen=LAST_EVENTS)
        self.names: deque[str] = deque(maxlen=_NAMES)
        self.noted = 0

    def __len__(self) -> int:
        return len(self.first) + len(self.last)


class Journal:
    """Stories by image, which is a manifest digest. The image that nothing was noted of for longest goes first."""

    def __init__(self) -> None:
        self._stories: OrderedDict[str, _Story] = OrderedDict()
        self._events = 0
        self._lock = threading.Lock()

    def note(self, image: str, event: str, **fields: str | float | None) -> None:
        """Record an event that ends now. From any thread."""
        bounded = {key: value[:_TEXT] if isinstance(value, str) else value for key, value in fields.items()}
        told = {"wall": round(time.time(), 4), "monotonic": round(time.monotonic(), 4), "event": event, **bounded}
        raw = msgspec.json.encode(told)
        with self._lock:
            story = self._story(image)
            before = len(story)
            (story.first if len(story.first) < FIRST_EVENTS else story.last).append(raw)
            story.noted += 1
            self._events += len(story) - before
            while self._events > ALL_EVENTS and len(self._stories) > 1:
                self._events -= len(self._stories.popitem(last=False)[1])

    def name(self, image: str, name: str) -> None:
        """Say what else an image is called."""
        with self._lock:
            names = self._story(image).names
            if name[:_TEXT] not in names:
                names.append(name[:_TEXT])

    def _story(self, image: str) -> _Story:
        story = self._stories.setdefault(image, _Story())
        self._stories.move_to_end(image)
        while len(self._stories) > IMAGES:
            self._events -= len(self._stories.popitem(last=False)[1])
        return story

    def images(self) -> Sequence[str]:
        """Those that something is known of, the one that was noted last at the end."""
        with self._lock:
            return list(self._stories)

    def names(self, image: str) -> list[str]:
        with self._lock:
            return list(self._stories[image].names) if image in self._stories else []

    def tell(self, image: str) -> dict[str, Any]:
        """`events` in order, and how many were `dropped` between the first and the last ones."""
        with self._lock:
            story = self._stories.get(image) or _Story()
            raw, noted = [*story.first, *story.last], story.noted
        return {"events": [msgspec.json.decode(event) for event in raw], "dropped": noted - len(raw)}


def now() -> dict[str, float]:
    """What to compare the times of events with."""
    return {"wall": round(time.time(), 4), "monotonic": round(time.monotonic(), 4)}
