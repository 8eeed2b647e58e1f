"""`ErofsMounter`: mounts and unmounts images in one-shot children and reads mountinfo; it never touches a mount."""

import asyncio
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import structlog

from snapshotter import failpoints
from snapshotter.config import Erofs
from snapshotter.errors import FailedPrecondition, SnapshotterError, Unavailable
from snapshotter.mounts.capabilities import attempts, kernel_version
from snapshotter.mounts.mountinfo import Mount, is_mounted, read_mounts

log = structlog.get_logger(__name__)

_SEPARATOR = re.compile("[=:,]")  # in the options of an overlay
_ONESHOT = Path(__file__).with_name("oneshot.py")

CHILD_SECONDS = 60.0  # far more than blobd needs to come back


class ErofsMounter:
    """`fuse_root`: descriptor of the directory that holds `<image>-<device>` files; stays the caller's."""

    def __init__(self, fuse_root: int, config: Erofs, *, child_seconds: float = CHILD_SECONDS) -> None:
        self._fuse_root = fuse_root
        self._read_ahead = int(config.read_ahead)
        self._attempts = attempts(config.driver, kernel_version())
        self._child_seconds = child_seconds

    async def mount(self, image_id: int, devices: int, target: Path) -> None:
        """Mount image `image_id`, `devices` files with the primary, on the directory `target`; mounted already is fine.

        Raises SnapshotterError if the kernel refuses, Unavailable if it does not answer in time.
        """
        if self.is_mounted(target):
            return
        answer = await self._child(
            {
                "op": "mount",
                "root": self._fuse_root,
                "image": image_id,
                "devices": devices,
                "target": str(target),
                "read_ahead": self._read_ahead,
                "attempts": [attempt._asdict() for attempt in self._attempts],
            },
            (self._fuse_root,),
        )
        if "error" in answer:
            raise SnapshotterError(f"mounting image {image_id} on {target}: {answer['error']}", reason="mount")
        log.info("image mounted", image=image_id, target=str(target), **answer)

    async def unmount(self, target: Path) -> None:
        """Unmount `target`; not mounted is fine. Raises FailedPrecondition(reason busy) while somebody uses it."""
        point = _point(target)
        mounts = read_mounts()
        if all(mount.point != point for mount in mounts):
            return
        # The kernel does not count an overlay as a user of its lower mounts, nor a bind mount of its origin.
        if user := used_by(point, mounts):
            raise FailedPrecondition(f"unmounting {target}: {user} uses it", reason="busy")
        await self._unmount(target, detach=False)
        log.info("image unmounted", target=str(target))

    async def discard(self, target: Path) -> None:
        """Take a mount that is beyond help off its path, whoever uses it, so that another can take its place."""
        await self._unmount(target, detach=True)

    async def _unmount(self, target: Path, *, detach: bool) -> None:
        answer = await self._child({"op": "unmount", "target": str(target), "detach": detach}, ())
        if answer.get("busy"):
            raise FailedPrecondition(f"unmounting {target}: in use", reason="busy")
        if "error" in answer:
            raise SnapshotterError(f"unmounting {target}: {answer['error']}", reason="mount")

    def is_mounted(self, target: Path) -> bool:
        """Whether something is mounted on `target`, by mountinfo; symlinks above `target` are followed."""
        return is_mounted(_point(target))

    async def _child(self, request: dict[str, Any], descriptors: tuple[int, ...]) -> dict[str, Any]:
        """Run one request. A child that does not end is told to, not waited for: its system call may be stuck."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(_ONESHOT), json.dumps(request)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=descriptors,
            start_new_session=True,
            cwd="/",
            env=failpoints.environment(),
        )
        try:
            async with asyncio.timeout(self._child_seconds):
                output, complaints = await process.communicate()
        except TimeoutError:
            process.kill()  # so that it does not go on to attach a mount that nobody expects any more
            log.error("mount child does not end", pid=process.pid, op=request["op"], target=request["target"])
            raise Unavailable(f"{request['op']} of {request['target']} does not end", reason="mount-stuck") from None
        if complaints:
            log.info("mount child says", op=request["op"], text=complaints.decode(errors="replace")[-2000:])
        if process.returncode != 0:
            raise SnapshotterError(f"{request['op']} child ended with status {process.returncode}", reason="mount")
        answer: dict[str, Any] = json.loads(output)
        return answer


def used_by(point: str, mounts: Sequence[Mount]) -> str:
    """Where a mount lies that shows the content of the one at `point`: an overlay above it, or a bind; "" if none."""
    devices = {mount.device for mount in mounts if mount.point == point}
    binds = (mount.point for mount in mounts if mount.device in devices and mount.point != point)
    return overlay_of([point], mounts) or next(binds, "")


def overlay_of(directories: Iterable[str], mounts: Sequence[Mount]) -> str:
    """Where an overlay lies that is made of one of `directories`; "" if none.

    It may name them relative to where its mounter stood; then the last two names decide: one overlay too many keeps a
    mount for a while, one too few takes an image from a container.
    """
    exact = set(directories)
    short = {"/".join(directory.split("/")[-2:]) for directory in exact}
    for mount in mounts:
        if mount.kind == "overlay":
            for part in _SEPARATOR.split(mount.options):
                if part in exact if part.startswith("/") else "/".join(part.split("/")[-2:]) in short:
                    return mount.point
    return ""


def _point(target: Path) -> str:
    """As mountinfo writes it. The target itself is not looked at: that would reach the mount."""
    return os.path.join(os.path.realpath(target.parent), target.name)
