"""Named places in the code where a test may stop, kill or fail the process. Off unless `COCO_FAILPOINT` is set.

COCO_FAILPOINT=name:action[:argument][,…][,@DIRECTORY]
hold:FILE   while FILE exists: write our pid into FILE.held and wait
kill        SIGKILL to this process
fail        raise OSError(EIO)
on          `enabled(name)` is true; nothing else happens
@DIRECTORY  for a system that runs: a file of a point's name there kills whoever comes to that point next, once. It is
            renamed to NAME.hit before; each byte that it holds lets one hit pass first

All processes of a node inherit the variable. Standard library only: keeper and one-shots have points, too.
"""

import errno
import os
import signal
import time
from contextlib import suppress

VARIABLE = "COCO_FAILPOINT"
POINTS = {
    "snapshotd": (
        # start
        "snapshotd.started", "recover.aside", "recover.inserted", "snapshotd.opened", "reconcile.made",
        "snapshotd.listens", "snapshotd.discards", "snapshotd.ready", "snapshotd.drains",
        # changes of snapshots
        "prepare.resolved", "create.made", "create.inserted", "create.placed", "create.done",
        "commit.measured", "commit.written", "commit.done", "update.written", "update.done",
        "remove.deleted", "remove.done", "cleanup.unmounted", "cleanup.retired", "cleanup.destroyed",
        # images
        "attach.packed", "attach.kept", "attach.served", "mount.attached", "mount.done",
        "unmount.done", "detach.served", "detach.done", "file.written", "file.renamed",
        "audit.written", "unpack.fetched", "unpack.filled",
    ),
    "keeper": (
        "keeper.locked", "keeper.blobd-adopted", "keeper.recovered", "keeper.listens", "keeper.started-worker",
        "keeper.lists", "keeper.puts", "keeper.put", "keeper.drops", "keeper.dropped", "keeper.ready",
        "keeper.reloads", "keeper.hands-over", "keeper.took-over", "keeper.replaced", "keeper.stops", "keeper.stopped",
    ),
    "blobd": (
        "blobd.holds", "blobd.started", "blobd.fetched", "blobd.attached-all", "blobd.took-over", "blobd.ready",
        "blobd.attaches", "blobd.attached", "blobd.detaches", "blobd.detached", "blobd.dumps",
        "blobd.read.taken", "blobd.read.parked", "blobd.reply", "blobd.replied",
        "cache.written", "cache.renamed", "cache.evicts",
    ),
    "oneshot": ("oneshot.started", "oneshot.loop", "oneshot.created", "oneshot.mounted", "oneshot.unmounted"),
}  # fmt: skip
SWITCHES = ("blobd.no-resend", "keeper.no-delay")

_ACTIONS = ("hold", "kill", "fail", "on")
_POLL_SECONDS = 0.01
_NAMES = {*SWITCHES, *(name for names in POINTS.values() for name in names)}


def _parse(text: str) -> tuple[dict[str, tuple[str, str]], str]:
    points, directory = {}, ""
    for part in filter(None, text.split(",")):
        if part.startswith("@"):
            directory = part[1:]
            continue
        name, _, rest = part.partition(":")
        action, _, argument = rest.partition(":")
        if name not in _NAMES or action not in _ACTIONS:
            raise ValueError(f"{VARIABLE}: unknown point or action in {part!r}")
        points[name] = (action, argument)
    return points, directory


_points, _directory = _parse(os.environ.get(VARIABLE, ""))


def hit(name: str) -> None:
    """Do what was asked for at this place; nothing in production."""
    if _points and name in _points:
        _act(*_points[name])
    if _directory:
        _act_if_armed(f"{_directory}/{name}")


def enabled(name: str) -> bool:
    return _points.get(name, ("", ""))[0] == "on"


def environment() -> dict[str, str]:
    """What a child that gets no environment needs to have failpoints."""
    return {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}


def _act(action: str, argument: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "fail":
        raise OSError(errno.EIO, "failpoint")
    elif action == "hold" and os.path.exists(argument):
        with open(argument + ".held", "w") as file:
            file.write(str(os.getpid()))
        while os.path.exists(argument):
            time.sleep(_POLL_SECONDS)


def _act_if_armed(path: str) -> None:
    with suppress(FileNotFoundError):
        if left := os.stat(path).st_size:
            os.truncate(path, left - 1)
            return
        os.rename(path, f"{path}.hit")
        os.kill(os.getpid(), signal.SIGKILL)
