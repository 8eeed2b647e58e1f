"""The kill matrix: every named point, under every operation that comes there, in every process.

What an operation comes to is measured, not listed. While it is done, a process is killed at one of these points, at a
random one of the times it comes there; then its successor, while it starts; and often blobd, too, which a container
keeps busy all the time.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from snapshotter.failpoints import POINTS
from tests.harness.kills import OPERATIONS, Stage
from tests.harness.machine import Work

KILLS = 1000
NODES = 3  # at a time; the last uses loop devices, and is about what needs them
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
    with ThreadPoolExecutor(NODES) as pool:
        parts = [pool.submit(_part, share, number, say).result for number, share in enumerate(_shares(count))]
        results = [part() for part in parts]
    kills = sum((kills for kills, _ in results), Counter[tuple[str, str]]())
    points = {point for _, point in kills}
    if missed := _PROCESS.keys() - points - _APART:
        raise AssertionError(f"nobody was killed at {', '.join(sorted(missed))}")
    by_process = Counter[str]()
    for (_, point), number in kills.items():
        by_process[_PROCESS[point]] += number
    shares = ", ".join(f"{process} {number}" for process, number in by_process.most_common())
    operations, rounds = {name for name, _ in kills}, sum(rounds for _, rounds in results)
    return (
        f"{kills.total()} kills ({shares}) at {len(points)} points under {len(operations)} operations, "
        f"{len(kills)} pairs of both; {rounds} rounds of fio, 0 failed or wrong reads or writes; 0 violations"
    )


def _shares(count: int) -> list[int]:
    loop = count // 10
    return [(count - loop) // 2, count - loop - (count - loop) // 2, loop]


def _part(count: int, number: int, say: Callable[[str], None]) -> tuple[Counter[tuple[str, str]], int]:
    done: Counter[tuple[str, str]] = Counter()
    driver = "loop" if number == NODES - 1 else "file"
    operations = ("pull", "start", "remove") if driver == "loop" else OPERATIONS
    with Work("soak-kills") as work:
        stage = Stage(work, settings={"erofs": {"driver": driver}})
        reached = {operation: stage.hits(operation) for operation in operations}
        pairs = sum(map(len, reached.values()))
        say(f"node {number}, driver {driver}: {pairs} pairs of an operation and a point")
        for turn, (operation, point) in enumerate(_pairs(reached)):
            if done.total() >= count and turn >= pairs:  # each pair at least once
                break
            points = _victims(operation, point, reached[operation][point])
            try:
                found = stage.kill(operation, points, thorough=turn % 4 == 0, patience=5)
            except Exception as error:
                text = f"node {number}, after {done.total()} kills, {operation} with {points}: {error!r}"
                say(text)  # the other nodes go on
                raise AssertionError(text) from error
            done.update((operation, name) for name in found)
            if turn % 10 == 0:
                say(f"node {number}: {done.total()} of {count} kills, {stage.worker.rounds} rounds of fio")
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
