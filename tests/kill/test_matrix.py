"""kill -9 at named points of all processes on a real node, while a container reads and writes: nothing fails, nothing
is left, everything can be done again."""

import itertools
from collections.abc import Iterator

import pytest

from tests.harness.kills import Stage
from tests.harness.machine import Work

pytestmark = [pytest.mark.root, pytest.mark.real]

# operation: the state it begins in, and the points on its way
OPERATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pull": (
        "absent",
        (
            "prepare.resolved", "file.written", "file.renamed", "create.made", "create.inserted", "create.placed",
            "create.done",
        ),
    ),
    "start": (
        "pulled",
        (
            "attach.packed", "attach.kept", "attach.served", "mount.attached", "mount.done",
            "keeper.puts", "keeper.put", "blobd.attaches", "blobd.attached",
            "oneshot.started", "oneshot.created", "oneshot.mounted",
        ),
    ),
    "remove": (
        "mounted",
        (
            "remove.deleted", "remove.done", "unmount.done", "detach.served", "detach.done", "cleanup.unmounted",
            "cleanup.retired", "cleanup.destroyed", "keeper.drops", "keeper.dropped", "blobd.detaches",
            "blobd.detached", "oneshot.unmounted",
        ),
    ),
    "unpack": ("absent", ("commit.measured", "commit.written", "commit.done")),
    "label": ("", ("update.written", "update.done")),
    "read": (
        "",
        (
            "blobd.read.taken", "blobd.read.parked", "blobd.reply", "blobd.replied", "cache.written", "cache.renamed",
            "cache.evicts",
        ),
    ),
    "restart_snapshotd": (
        "", ("snapshotd.started", "snapshotd.opened", "snapshotd.listens", "snapshotd.ready", "keeper.lists",
             "keeper.ready", "keeper.started-worker"),
    ),
    "restart_blobd": (
        "", ("blobd.started", "blobd.fetched", "blobd.attached-all", "blobd.took-over", "blobd.ready"),
    ),
    "restart_keeper": (
        "", ("keeper.locked", "keeper.blobd-adopted", "keeper.recovered", "keeper.listens"),
    ),
    "reload": ("", ("keeper.reloads", "keeper.hands-over", "keeper.took-over", "keeper.replaced", "blobd.holds")),
    "stop": ("", ("snapshotd.drains", "keeper.stops", "keeper.stopped")),
    "lose_database": ("", ("recover.aside", "recover.inserted")),
    "lose_directory": ("", ("reconcile.made",)),
}  # fmt: skip
_CYCLE = ("pull", "start", "remove")  # one after the other leaves each its state


def cases() -> list[tuple[str, str]]:
    columns = [[(operation, point) for point in OPERATIONS[operation][1]] for operation in _CYCLE]
    cycle = [case for row in itertools.zip_longest(*columns) for case in row if case]
    rest = [
        (operation, point)
        for operation, (_, points) in OPERATIONS.items()
        if operation not in _CYCLE
        for point in points
    ]
    return cycle + rest


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Work("kills") as work:
        yield Stage(work)


@pytest.mark.parametrize(("operation", "point"), cases())
def test_killed(stage: Stage, operation: str, point: str) -> None:
    state, _ = OPERATIONS[operation]
    if state:
        getattr(stage, state)()
    name, _, worker = operation.partition("_")
    stage.kill(point, (lambda: stage.restart(worker)) if name == "restart" else getattr(stage, operation))
