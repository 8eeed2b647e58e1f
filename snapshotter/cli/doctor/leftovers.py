"""Stale state: what crashes, damage and lost data planes have left under root."""

import os
import re
from pathlib import Path
from typing import Any

from snapshotter.cli.doctor.check import Check, Checks, Node, Result, Skipped, fail, ok, warn
from snapshotter.control import ControlError

_SHOWN = 5


def _directories(node: Node) -> list[str]:
    try:
        return node.machine.names(f"{node.config.root}/snapshots")
    except FileNotFoundError:
        raise Skipped(f"root {node.config.root} has no snapshots yet") from None


def _listed(node: Node, op: str) -> list[dict[str, Any]]:
    """What snapshotd lists, without measuring."""
    try:
        return list(node.machine.stream(f"{node.config.root}/snapshotd.sock", {"op": op, "measured": False}))
    except (FileNotFoundError, ConnectionError, TimeoutError, EOFError, ControlError):
        raise Skipped("snapshotd does not answer") from None


def _images(node: Node) -> list[dict[str, Any]]:
    return [message["image"] for message in _listed(node, "images")]


def _mounted(node: Node) -> dict[int, str]:
    """EROFS mounts of images under root: attach id → mount point."""
    root = os.path.realpath(node.config.root)  # mountinfo knows no links
    pattern = re.compile(re.escape(f"{root}/snapshots/") + r"(\d{1,18})/mnt")
    found = ((pattern.fullmatch(mount.point), mount) for mount in node.machine.mounts() if mount.kind == "erofs")
    return {int(match[1]): mount.point for match, mount in found if match}


def _some(things: list[str]) -> str:
    return ", ".join(things[:_SHOWN]) + (f" and {len(things) - _SHOWN} more" if len(things) > _SHOWN else "")


def mounts(node: Node) -> Result:
    """Mounted images that no snapshot belongs to."""
    mounted = _mounted(node)
    stray = [mounted[number] for number in mounted.keys() - {image["id"] for image in _images(node)}]
    if stray:
        return warn(f"mounted, and no snapshot's: {_some(stray)}", "coco-snapshotter gc; what stays is in use")
    return ok(f"{len(mounted)} images mounted, each has its snapshot")


def dead_mounts(node: Node) -> Result:
    """Mounted images that no data plane serves: every read that is not in memory fails with EIO."""
    mounted = _mounted(node)
    if not mounted:
        return ok("nothing is mounted")
    answer = node.answers.get("blobd")
    if answer is None and "keeper" in node.answers:
        raise Skipped("blobd does not answer; the keeper starts it again")
    images = answer.get("images") if answer else []
    assert isinstance(images, list)
    dead = [mounted[number] for number in mounted.keys() - {image["id"] for image in images}]
    if dead:
        return fail(
            f"keeper and blobd were lost together; reads give EIO: {_some(dead)}",
            "start serve and restart the containers that used them",
        )
    return ok("every mounted image is served")


def directories(node: Node) -> Result:
    """Directories that belong to no snapshot."""
    names = _directories(node)
    known = {str(row["id"]) for message in _listed(node, "snapshots") for row in message["snapshots"]}
    stray = [name for name in names if name not in known and not name.startswith("lost-")]
    if stray:
        return warn(f"of no snapshot: {_some(stray)}", "coco-snapshotter gc; containerd's next collection does it, too")
    return ok(f"{len(names)} directories")


def lost(node: Node) -> Result:
    """What recovery has put aside."""
    root = node.config.root
    found = [f"{root}/snapshots/{name}" for name in _directories(node) if name.startswith("lost-")]
    found += [f"{root}/{name}" for name in node.machine.names(root) if name.startswith("metadata.db.damaged-")]
    if found:
        return warn(f"kept for people to look at: {_some(found)}", f"look, then rm -r {' '.join(found[:_SHOWN])}")
    return ok("nothing was put aside")


def bootstraps(node: Node) -> Result:
    """Cached metadata of the images: with it a node restarts without its registry."""
    directory = f"{node.config.cache_dir}/bootstraps"
    damaged, missing = [], []
    for image in _images(node):
        path = Path(f"{directory}/{image['bootstrap'].removeprefix('sha256:')}")
        try:
            good = node.machine.digest(path) == image["bootstrap"]
        except FileNotFoundError:
            missing.append(image["reference"])
        else:
            damaged += [] if good else [str(path)]
    if damaged:
        return warn(f"damaged: {_some(damaged)}", f"rm {' '.join(damaged[:_SHOWN])}; they are fetched again")
    if missing:
        return warn(
            f"not cached, so a restart needs the registry: {_some(missing)}",
            f"space and mode of {node.config.cache_dir}; the next start of a container fetches them",
        )
    return ok("the metadata of every image is cached and whole")


CHECKS: Checks = (
    Check("state-mounts", mounts),
    Check("state-dead-mounts", dead_mounts),
    Check("state-directories", directories),
    Check("state-lost", lost),
    Check("state-bootstraps", bootstraps),
)
