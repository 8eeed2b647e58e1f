"""The kill matrix: every named point, under every operation that comes there, in every process.

What an operation comes to is measured, not listed. While it is done, a process is killed at one of these points, at a
random one of the times it comes there; then its successor, while it starts; and often blobd, too, which a container
keeps busy all the time.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator

from snapshotter.failpoints import POINTS
from tests.harness.kills import OPERATIONS, Stage
from tests.harness.machine import Work

KILLS = 1000
LOOP_SHARE = 10  # one of so many with the loop driver
_PROCESS = {name: process for process, names in POINTS.items() for name in names}
# The one loss is keeper and blobd at once. So the one is not killed where the other is dead.
_SPARED = {"restart_keeper": "blobd", "stop": "blobd", "restart_blobd": "keeper"}
_STARTS = {  # points that whoever starts again comes to
    "snapshotd": ("snapshotd.started", "snapshotd.opened", "snapshotd.listens", "snapshotd.ready"),
    "blobd": ("blobd.started", "blobd.fetched", "blobd.attached-all", "blobd.took-over", "blobd.ready"),
    "keeper": ("keeper.locked", "keeper.recovered", "keeper.listens"),
}
_APART = {"blobd.dumps", "snapshotd.discards"}  # only on the way of that loss: tests/kill/test_matrix.py


def run(scale: int, say: Callable[[str], None]) -> str:
    count = KILLS * scale
    parts = [
        _part(count - count // LOOP_SHARE, OPERATIONS, "file", say),
        _part(count // LOOP_SHARE, ("pull", "start", "remove"), "loop", say),
    ]
    kills = sum((kills for kills, _ in parts), Counter[tuple[str, str]]())
    points = {point for _, point in kills}
    if missed := _PROCESS.keys() - points - _APART:
        raise AssertionError(f"nobody was killed at {', '.join(sorted(missed))}")
    by_process = Counter[str]()
    for (_, point), number in kills.items():
        by_process[_PROCESS[point]] += number
    shares = ", ".join(f"{process} {number}" for process, number in by_process.most_common())
    return (
        f"{kills.total()} kills ({shares}) at {len(points)} points under {len({name for name, _ in kills})} operations "
        f"({len(kills)} pairs), {sum(rounds for _, rounds in parts)} rounds of fio, 0 failed or wrong reads or writes, "
        f"0 violations"
    )


def _part(
    count: int, operations: tuple[str, ...], driver: str, say: Callable[[str], None]
) -> tuple[Counter[tuple[str, str]], int]:
    done: Counter[tuple[str, str]] = Counter()
    with Work("soak-kills") as work:
        stage = Stage(work, settings={"erofs": {"driver": driver}})
        reached = {operation: stage.hits(operation) for operation in operations}
        say(f"driver {driver}: {sum(map(len, reached.values()))} pairs of an operation and a point on its way")
        for number, (operation, point) in enumerate(_pairs(reached)):
            if done.total() >= count:
                break
            points = _victims(operation, point, reached[operation][point])
            try:
                stage.kill(operation, points, thorough=number % 4 == 0)
            except Exception as error:
                raise AssertionError(f"kill {done.total() + 1}, {operation} with {points}: {error!r}") from error
            done.update((operation, name) for name in points)
            if number % 25 == 0:
                say(f"{done.total()} of {count} kills, {stage.worker.rounds} rounds of fio")
        return done, stage.worker.rounds


def _victims(operation: str, point: str, hits: int) -> dict[str, int]:
    """Point → hits that pass before: `point`, and what may die besides without the loss."""
    points = {point: random.randrange(min(hits, 50))}
    if _PROCESS[point] in ("snapshotd", "oneshot") and _SPARED.get(operation) != "blobd":
        points["blobd.reply"] = random.randrange(20)
    for process in {_PROCESS[name] for name in points} & _STARTS.keys():
        points.setdefault(random.choice(_STARTS[process]), 0)
    return points


def _pairs(reached: dict[str, dict[str, int]]) -> Iterator[tuple[str, str]]:
    """Every pair again and again; operations take turns, so that most find the state that they begin in."""
    while True:
        columns = []
        for operation, hits in reached.items():
            points = [name for name in hits if _PROCESS[name] != _SPARED.get(operation)]
            random.shuffle(points)
            columns.append([(operation, point) for point in points])
        for row in range(max(map(len, columns))):
            yield from (column[row] for column in columns if row < len(column))
