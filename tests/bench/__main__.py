"""All benchmarks in one run and one table: `python -m tests.bench [--repeats N] [GROUP…]`. Needs root, ten minutes.

Groups: start, reads, rpc, convert, memory. The last line is the table as JSON.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable

import structlog

from tests.bench import bench_rpc, convert, memory, reads, start
from tests.bench.table import Row, show


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="samples of each cold start (default 3)")
    parser.add_argument("groups", nargs="*", help="only these")
    arguments = parser.parse_args()
    begun = time.monotonic()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} s] {text}", file=sys.stderr, flush=True)

    groups: dict[str, Callable[[], list[Row]]] = {
        "memory": memory.rows,
        "rpc": bench_rpc.rows,
        "reads": reads.rows,
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
