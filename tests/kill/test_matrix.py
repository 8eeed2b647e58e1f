"""kill -9 at named points of all processes on a real node, while a container reads and writes: nothing fails, nothing
is left, everything can be done again."""

import itertools
from collections.abc import Iterator

import pytest

from snapshotter.failpoints import POINTS
from tests.harness.kills import Stage
from tests.harness.machine import Work

pytestmark = [pytest.mark.root, pytest.mark.real]

# operation: points on its way; those joined by + kill one process after the other that starts in place of the first
KILLED: dict[str, tuple[str, ...]] = {
    "pull": (
        "prepare.resolved", "file.written", "file.renamed", "create.made", "create.inserted", "create.placed",
        "create.done",
    ),
    "start": (
        "attach.packed", "attach.kept", "attach.served", "mount.attached", "mount.done", "keeper.puts", "keeper.put",
        "blobd.attaches", "blobd.attached", "oneshot.started", "oneshot.created", "oneshot.mounted",
    ),
    "remove": (
        "remove.deleted", "remove.done", "unmount.done", "detach.served", "detach.done", "cleanup.unmounted",
        "cleanup.retired", "cleanup.destroyed", "keeper.drops", "keeper.dropped", "blobd.detaches", "blobd.detached",
        "oneshot.unmounted",
    ),
    "unpack": ("commit.measured", "commit.written", "commit.done"),
    "decrypt": ("audit.written", "unpack.fetched", "unpack.filled"),
    "label": ("update.written", "update.done"),
    "read": (
        "blobd.read.taken", "blobd.read.parked", "blobd.reply", "blobd.replied", "cache.written", "cache.renamed",
        "cache.evicts",
    ),
    "restart_snapshotd": (
        "snapshotd.started+snapshotd.opened", "snapshotd.listens+snapshotd.ready", "keeper.lists", "keeper.ready",
        "keeper.started-worker",
    ),
    "restart_blobd": ("blobd.started+blobd.fetched", "blobd.attached-all+blobd.took-over+blobd.ready"),
    "restart_keeper": ("keeper.locked+keeper.blobd-adopted", "keeper.recovered+keeper.listens"),
    "reload": ("keeper.reloads", "keeper.hands-over", "keeper.took-over", "keeper.replaced", "blobd.holds"),
    "stop": ("snapshotd.drains", "keeper.stops", "keeper.stopped"),
    "lose_database": ("recover.aside+recover.inserted",),
    "lose_log": ("recover.aside",),
    "lose_directory": ("reconcile.made",),
}  # fmt: skip
LOST = {"restart_keeper": "blobd.dumps", "lose_session": "snapshotd.discards"}  # with the session
_CYCLE = ("pull", "start", "remove")  # one after the other leaves each its state


def cases() -> list[tuple[str, str]]:
    every = {operation: [(operation, point) for point in points] for operation, points in KILLED.items()}
    rows = itertools.zip_longest(*(every[operation] for operation in _CYCLE))
    cycle = [case for row in rows for case in row if case]
    return cycle + [case for operation, found in every.items() if operation not in _CYCLE for case in found]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Work("kills") as work:
        yield Stage(work, round_seconds=0.1)


@pytest.mark.parametrize(("operation", "point"), cases())
def test_killed(stage: Stage, operation: str, point: str) -> None:
    starts_containers_itself = operation in _CYCLE
    points = dict.fromkeys(point.split("+"), 0)
    assert stage.kill(operation, points, thorough=not starts_containers_itself) == list(points)


@pytest.mark.parametrize(("operation", "point"), LOST.items())
def test_killed_with_the_session(stage: Stage, operation: str, point: str) -> None:
    """Keeper and blobd at once: what ran fails, what comes works."""
    with pytest.raises(AssertionError, match="Input/output error"):
        stage.kill(operation, {point: 0})
    stage.renew_worker()
    stage.check()


def test_no_point_is_left_out() -> None:
    named = {*(point for _, joined in cases() for point in joined.split("+")), *LOST.values()}
    assert {name for names in POINTS.values() for name in names} - named == {"oneshot.loop"}
