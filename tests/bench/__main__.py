"""All benchmarks in one run and one table: `python -m tests.bench [--repeats N] [GROUP…]`. Needs root, ten minutes.

Groups: start, reads, rpc, convert, memory. The last line is the table as JSON.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable

from tests.bench import convert, memory, start
from tests.bench.table import Row, show


def other(module: str) -> Callable[[], list[Row]]:
    """`rows()` of a benchmark module."""
    return lambda: list(importlib.import_module(f"tests.bench.{module}").rows())


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="samples of each cold start (default 3)")
    parser.add_argument("groups", nargs="*", help="only these")
    arguments = parser.parse_args()
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} s] {text}", file=sys.stderr, flush=True)

    groups: dict[str, Callable[[], list[Row]]] = {
        "memory": memory.rows,
        "rpc": other("bench_rpc"),
        "reads": other("bench_reads"),
        "convert": lambda: convert.rows(say),
        "start": lambda: start.rows(arguments.repeats, say),
    }
    rows: list[Row] = []
    for name in arguments.groups or groups:
        say(f"benchmark {name}")
        rows += groups[name]()
    print(show(rows))
    print(json.dumps([row.document() for row in rows]))
    return 0 if all(row.met is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
