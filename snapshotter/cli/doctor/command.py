"""`doctor`: runs every check, prints what was found and what to change; exits with 0 if nothing fails, 1 otherwise."""

import argparse
import asyncio
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.cli.node import add_flags, load_config

if TYPE_CHECKING:
    from snapshotter.cli.doctor.check import Check, Node, Result

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_CONTAINERD_CONFIG = "/etc/containerd/config.toml"
_CONTAINERD = "/run/containerd/containerd.sock"


def register(commands: "Commands") -> None:
    command = commands.add_parser(
        "doctor",
        help="look for what is wrong on this node",
        description="Check kernel, mount namespace, directories, containerd's configuration, sockets, keys and stale "
        "state, and with --image also registry, policy and key of one image. Says what to change; changes nothing. "
        "Each check has an id that docs/troubleshooting.md explains. Exits with 0 if no check fails, with 1 otherwise.",
    )
    add_flags(command)
    command.add_argument(
        "--containerd-config", metavar="FILE", type=Path, default=Path(_CONTAINERD_CONFIG),
        help="containerd's configuration (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--containerd", metavar="SOCK", type=Path, default=Path(_CONTAINERD), help="its socket (default: %(default)s)"
    )
    command.add_argument("--image", metavar="REF", default="", help="also look at this image in its registry")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from snapshotter import log
    from snapshotter.cli import table

    log.configure("error", "console")
    node = _node(arguments)
    rows = []
    for check, result in examine(node):
        rows.append((check, result))
        if not arguments.json:
            mark = result.status.upper() if result.status == "fail" else result.status
            print(f"{mark:5} {check.id:24} {table.plain(result.found)}")
            if result.advice:
                print(f"{'':5} {'':24} → {table.plain(result.advice)}")
    failed = [check.id for check, result in rows if result.status == "fail"]
    if arguments.json:
        checks = [{"id": check.id, **result._asdict()} for check, result in rows]
        print(json.dumps({"ok": not failed, "checks": checks}))
    elif failed:
        print(f"\n{len(failed)} of {len(rows)} checks fail:", *(f"docs/troubleshooting.md#{name}" for name in failed))
    return 1 if failed else 0


def _node(arguments: argparse.Namespace) -> "Node":
    from snapshotter.cli.doctor.check import Node
    from snapshotter.cli.doctor.machine import ThisMachine
    from snapshotter.config import Config
    from snapshotter.errors import ConfigError
    from snapshotter.image.initdata import with_initdata

    path, config, error = arguments.config, Config(), ""
    try:
        path, config = load_config(arguments)
        config = with_initdata(config)
    except ConfigError as wrong:
        error = str(wrong)
    return Node(
        ThisMachine(), config, path, error, arguments.containerd_config.absolute(), arguments.containerd.absolute(),
        arguments.image,
    )  # fmt: skip


def checks() -> "list[Check]":
    """All of them, in the order in which one would look."""
    from snapshotter.cli.doctor import client, host, image, kernel, keys, leftovers, running

    return [check for room in (host, kernel, running, client, keys, image, leftovers) for check in room.CHECKS]


def examine(node: "Node") -> "Iterator[tuple[Check, Result]]":
    for check in checks():
        yield check, result(node, check)


def result(node: "Node", check: "Check") -> "Result":
    """What a check finds. Where the system refuses to show something, root would see more."""
    from snapshotter.cli.doctor.check import Result, Skipped

    async def awaited() -> "Result":
        answer = check.run(node)
        return await answer if inspect.isawaitable(answer) else answer

    try:
        return asyncio.run(awaited())
    except Skipped as reason:
        return Result("skip", str(reason))
    except PermissionError as error:
        return Result("skip", f"only root may look at {error.filename or 'that'}")
    except OSError as error:
        return Result("fail", f"cannot be checked: {error}", "what this machine's log says about it")
