"""`ErofsMounter`: mounts and unmounts images in one-shot children and reads mountinfo; it never touches a mount."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import structlog

from snapshotter.config import Erofs
from snapshotter.errors import FailedPrecondition, SnapshotterError, Unavailable
from snapshotter.mounts.capabilities import attempts, kernel_version
from snapshotter.mounts.mountinfo import read_mounts

log = structlog.get_logger(__name__)

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
        if not self.is_mounted(target):
            return
        answer = await self._child({"op": "unmount", "target": str(target)}, ())
        if answer.get("busy"):
            raise FailedPrecondition(f"unmounting {target}: in use", reason="busy")
        if "error" in answer:
            raise SnapshotterError(f"unmounting {target}: {answer['error']}", reason="mount")
        log.info("image unmounted", target=str(target))

    def is_mounted(self, target: Path) -> bool:
        """Whether something is mounted on `target`, by mountinfo; symlinks above `target` are followed."""
        point = os.path.join(os.path.realpath(target.parent), target.name)
        return any(mount.point == point for mount in read_mounts())

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
            env={},
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
