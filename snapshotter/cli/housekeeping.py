"""What is on this node, and getting rid of it: `ls`, `gc`, `prune`. The running daemons do the work."""

import argparse
import contextlib
import json
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from snapshotter import control
from snapshotter.cli.node import add_flags, load_config
from snapshotter.errors import InvalidArgument, Unavailable

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_SECONDS, _WORK_SECONDS = 10.0, 600.0  # for an answer, and for one behind which millions of files may be touched
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d{1,9})([smhd])")


def register(commands: "Commands") -> None:
    listing = commands.add_parser(
        "ls",
        help="list the lazy images of this node, or its snapshots",
        description="List the lazy images of this node: what is mounted, how many snapshots show it, and how much of "
        "it is in the cache (unknown while it is not attached). Other images are containerd's: see ctr images ls.",
    )
    add_flags(listing)
    listing.add_argument("--snapshots", action="store_true", help="list the snapshots of all images instead")
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    listing.set_defaults(run=run_ls)
    collect = commands.add_parser(
        "gc",
        help="clean up now",
        description="Remove the directories that belong to no snapshot and unmount the images that no container uses. "
        "containerd asks for this after its own garbage collection; images are not removed: see ctr images rm.",
    )
    add_flags(collect)
    collect.add_argument("--json", action="store_true", help="print one JSON object")
    collect.set_defaults(run=run_gc)
    prune = commands.add_parser(
        "prune",
        help="shrink the cache",
        description="Drop the cached metadata (bootstrap layers, manifests, configs) of images that are not on this "
        "node and, if an option says so, cached chunks. Whatever is dropped is fetched again when it is needed, so "
        "containers go on as long as the registry answers.",
    )
    add_flags(prune)
    what = prune.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="drop all chunks")
    what.add_argument("--target", metavar="SIZE", help="drop the chunks longest unused until SIZE is left: 2GiB")
    prune.add_argument("--older", metavar="DUR", help="drop chunks that nobody has read for so long: 90s, 30m, 12h, 7d")
    prune.add_argument("--json", action="store_true", help="print one JSON object")
    prune.set_defaults(run=run_prune)


@contextlib.contextmanager
def _asking(root: str, name: str) -> Iterator[str]:
    """The socket of a worker; its silence becomes an error for people."""
    try:
        yield f"{root}/{name}.sock"
    except control.ControlError as error:
        raise Unavailable(f"{name}: {error}", reason=error.reason) from error
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or "closed the connection"
        raise Unavailable(f"root {root}: no answer from {name} ({why})", hint="is `serve` running?") from error


def ask(root: str, name: str, message: control.Message, seconds: float = _SECONDS) -> control.Message:
    """One answer of snapshotd or blobd. Raises Unavailable."""
    with _asking(root, name) as path:
        answer, received = control.request(path, message, timeout=seconds)
        control.close_all(received)
    return answer


def ask_all(root: str, name: str, op: str, seconds: float = _SECONDS) -> Iterator[control.Message]:
    """The messages of an answer that comes in several. Raises Unavailable."""
    with _asking(root, name) as path:
        for answer in control.stream(path, {"op": op}, timeout=seconds):
            if not answer.get("end"):
                yield answer


def run_ls(arguments: argparse.Namespace) -> int:
    from snapshotter.cli import table
    from snapshotter.cli.progress import size

    _, config = load_config(arguments)
    now = time.time()
    if arguments.snapshots:
        messages = ask_all(config.root, "snapshotd", "snapshots", _WORK_SECONDS)
        rows = [row for message in messages for row in message["snapshots"]]
        if arguments.json:
            print(json.dumps({"snapshots": rows}))
            return 0
        table.show(
            ("PLUGIN", "NAME", "KIND", "PARENT", "AGE", "SIZE", "INODES"),
            [
                (
                    row["plugin"], row["name"], row["kind"], row["parent"] or "-", table.age(now - row["created"]),
                    "?" if row["size"] is None else size(row["size"]), "?" if row["inodes"] is None else row["inodes"],
                )
                for row in rows
            ],
        )  # fmt: skip
        return 0
    images = list(_images(config.root))
    if arguments.json:
        print(json.dumps({"images": images}))
        return 0
    table.show(
        ("IMAGE", "MANIFEST", "KIND", "MOUNTED", "USERS", "CACHED", "AGE"),
        [
            (
                image["reference"], image["manifest"].removeprefix("sha256:")[:12],
                "sealed" if image["sealed"] else "plain", "yes" if image["mounted"] else "no", image["users"],
                f"{size(image['cached']['bytes'])} of {size(image['cached']['of'])}" if image["cached"] else "?",
                table.age(now - image["created"]),
            )
            for image in images
        ],
    )  # fmt: skip
    return 0


def _images(root: str) -> Iterator[dict[str, Any]]:
    """What snapshotd knows of each image, and what blobd knows of its data: without blobd that is unknown."""
    cached: dict[int, Any] = {}
    with contextlib.suppress(Unavailable):
        cached = {message["id"]: message["cached"] for message in ask_all(root, "blobd", "cached")}
    for message in ask_all(root, "snapshotd", "images"):
        yield {**message["image"], "cached": cached.get(message["image"]["id"])}


def run_gc(arguments: argparse.Namespace) -> int:
    from snapshotter.cli import table

    _, config = load_config(arguments)
    done = ask(config.root, "snapshotd", {"op": "gc"}, _WORK_SECONDS)
    if arguments.json:
        print(json.dumps(done))
        return 0
    print(f"removed {done['removed']} directories, unmounted {len(done['unmounted'])} images")
    for reference in done["unmounted"]:
        print(f"unmounted {table.plain(reference)}")
    for kept in done["kept"]:
        print(f"kept {table.plain(kept['what'])}: {table.plain(kept['why'])}")
    return 0


def run_prune(arguments: argparse.Namespace) -> int:
    from snapshotter.cli.progress import size

    _, config = load_config(arguments)
    target, older = _target(arguments), _older(arguments.older)
    metadata = ask(config.root, "snapshotd", {"op": "prune"}, _WORK_SECONDS)
    chunks: dict[str, Any] = {"bytes": 0, "entries": 0}
    if target is not None or older is not None:
        chunks = ask(config.root, "blobd", {"op": "prune", "target": target, "older": older}, _WORK_SECONDS)
    if arguments.json:
        print(json.dumps({"metadata": metadata, "chunks": chunks}))
        return 0
    print(f"metadata: {metadata['entries']} files, {size(metadata['bytes'])} dropped")
    print(f"chunks: {chunks['entries']} files, {size(chunks['bytes'])} dropped")
    return 0


def _target(arguments: argparse.Namespace) -> int | None:
    from snapshotter.config import Size

    if arguments.all:
        return 0
    if arguments.target is None:
        return None
    try:
        return int(Size.parse(arguments.target))
    except ValueError as error:
        raise InvalidArgument(f"--target: {error}") from error


def _older(text: str | None) -> int | None:
    if text is None:
        return None
    match = _DURATION.fullmatch(text)
    if not match:
        raise InvalidArgument(f"--older: not a time: {text[:40]!r}; write 90s, 30m, 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]
