"""Who is killed when memory is short: containers first, then programs that we run for somebody else, we last.

A container that loses its data plane cannot read its files, so killing us frees less than it breaks.
"""

from contextlib import suppress
from pathlib import Path

SCORE = -900  # -1000 would be never, which nobody should be


def protect() -> None:
    """This process and its children to come; one that is better protected already stays so."""
    path = Path("/proc/self/oom_score_adj")
    with suppress(OSError):  # not allowed to
        if int(path.read_text()) > SCORE:
            path.write_text(str(SCORE))


def expose(pid: int) -> None:
    """A child that is not part of us: as any other program."""
    with suppress(OSError):  # it has ended
        Path(f"/proc/{pid}/oom_score_adj").write_text("0")
