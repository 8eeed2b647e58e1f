"""`coco-snapshotter`: parse the command line, run one command, turn errors into exit codes.

Each command module has `register(commands)`, which adds its parsers with a `run(arguments) -> int` default. They import
what they need inside `run`, so that `version` and `--help` answer at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from snapshotter import __version__, memory
from snapshotter.cli import (
    audit,
    completion,
    explain,
    housekeeping,
    image,
    kbs,
    keyprovider,
    materialize,
    node,
    recipients,
    unseal,
)
from snapshotter.cli.doctor import command as doctor
from snapshotter.cli.table import plain
from snapshotter.errors import SnapshotterError

DESCRIPTION = """\
Runs container images without downloading them first: containerd asks for snapshots, files are fetched when they are
read, and sealed images are authenticated and decrypted in this machine's memory only."""

EPILOG = """\
exit codes: 0 done; 1 failed; 2 wrong arguments or configuration; 3 not found; 4 exists already; 5 wrong state (serve
runs already); 10 something does not answer; 11 refused (registry, policy or key); 12 a limit or quota is exceeded;
20 content is not what it was promised to be; 130 interrupted"""


class _Parser(argparse.ArgumentParser):
    """Options are written out: an abbreviation that works today would become another option's tomorrow."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)


def parser() -> argparse.ArgumentParser:
    top: argparse.ArgumentParser = _Parser(
        prog="coco-snapshotter",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"coco-snapshotter {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    node.register(commands)
    housekeeping.register(commands)
    doctor.register(commands)
    explain.register(commands)
    materialize.register(commands)
    image.register(commands)
    recipients.register(commands)
    keyprovider.register(commands)
    kbs.register(commands)
    audit.register(commands)
    unseal.register(commands)
    completion.register(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Without `arguments` the process is ours, and keys stay in its memory."""
    parsed = parser().parse_args(arguments)
    if arguments is None:
        memory.set_undumpable()
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except SnapshotterError as error:
        print(f"coco-snapshotter: error: {plain(str(error))} [reason={error.reason}]", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `… | head`: nobody reads on, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a file that may not be read, a full disk
        print(f"coco-snapshotter: error: {plain(str(error))} [reason=os]", file=sys.stderr)
        return 1
    return code
