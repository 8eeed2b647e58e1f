"""Named places in the code where a test may stop, kill or fail the process. Off unless `COCO_FAILPOINT` is set.

COCO_FAILPOINT=name:action[:argument][,…]
hold:FILE   while FILE exists: write our pid into FILE.held and wait
kill        SIGKILL to this process
fail        raise OSError(EIO)
on          `enabled(name)` is true; nothing else happens
"""

import errno
import os
import signal
import time

_POLL_SECONDS = 0.01


def _parse(text: str) -> dict[str, tuple[str, str]]:
    points = {}
    for part in filter(None, text.split(",")):
        name, _, rest = part.partition(":")
        action, _, argument = rest.partition(":")
        if action not in ("hold", "kill", "fail", "on"):
            raise ValueError(f"COCO_FAILPOINT: unknown action {action!r}")
        points[name] = (action, argument)
    return points


_points = _parse(os.environ.get("COCO_FAILPOINT", ""))


def hit(name: str) -> None:
    """Do what was asked for at this place; nothing in production."""
    if _points and name in _points:
        _act(*_points[name])


def enabled(name: str) -> bool:
    return _points.get(name, ("", ""))[0] == "on"


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
