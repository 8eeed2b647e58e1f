"""What is on the node, for its monitor: cheap to ask, however many snapshots there are."""

from collections.abc import Callable, Collection

from snapshotter.monitor.node import State
from snapshotter.snapshots.store import Store


class Overview:
    """A `monitor.server.Node`. `mounted` says which images are mounted, by attach id."""

    def __init__(self, store: Store, mounted: Callable[[], Collection[int]]) -> None:
        self._store = store
        self._mounted = mounted

    def state(self) -> State:
        kinds = {kind.name.lower(): count for kind, count in self._store.count().items()}
        images = {number: record.reference for number, record in self._store.images().items()}
        return State(kinds, images, len(self._mounted()))

    def require_readable(self) -> None:
        self._store.require_readable()

    def require_writable(self) -> None:
        self._store.require_writable()
