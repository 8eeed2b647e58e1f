"""`audit`: who got which layer key when, and whether the record of it is whole."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshotter.cli import node
from snapshotter.cli.table import plain

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_COLUMNS = ("time", "outcome", "by", "kek", "namespace", "image")


def register(commands: "Commands") -> None:
    audit = commands.add_parser(
        "audit",
        help="show who got which layer key",
        description="Print the key-access audit log, the oldest entry first, and verify its chain: exits with 20 at "
        "the first entry that was changed, or whose predecessor is missing. Entries cut off at the end show only "
        "against a hash that was kept elsewhere (--head), such as the last one in the log of the service.",
    )
    node.add_flags(audit)
    audit.add_argument("--json", action="store_true", help="print the entries as they are, one JSON object a line")
    audit.add_argument("--head", metavar="HASH", help="exit with 20 unless there is an entry with this hash")
    audit.set_defaults(run=run_audit)


def run_audit(arguments: argparse.Namespace) -> int:
    from snapshotter.keys import audit

    _, config = node.load_config(arguments)
    count, seen = 0, arguments.head is None
    for entry in audit.read(Path(config.root)):
        count += 1
        seen = seen or entry["hash"] == arguments.head
        print(json.dumps(entry) if arguments.json else _line(entry))
    if not seen:
        raise audit.broken(f"no entry has the hash {arguments.head[:64]}")
    print(f"{count} entries, chain whole", file=sys.stderr)
    return 0


def _line(entry: dict[str, Any]) -> str:
    return "  ".join(plain(str(entry.get(name) or "-")) for name in _COLUMNS)
