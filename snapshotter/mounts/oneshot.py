"""Child process of `drivers`: one mount or unmount, then gone. Run by path with `python -I -S`; standard library only.

Calls that can reach EROFS or FUSE may block for as long as blobd is away, and a process killed inside one stays until
blobd answers. So they happen here: this process inherits the directory descriptor of the FUSE session and nothing else.
It reads one JSON request from argv and writes one JSON answer to stdout.
"""

import errno
import fcntl
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))  # which -I left out

from snapshotter import failpoints
from snapshotter.mounts import syscalls

LOOP_CTL_GET_FREE, LOOP_CONFIGURE = 0x4C82, 0x4C0A
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO = 1, 4, 16
LOOP_CONFIG = struct.Struct("<II 52x I 176x 64x")  # fd, block size, info.lo_flags; the rest is zero (linux/loop.h)
TRY_NEXT = {errno.EINVAL, errno.ENOTBLK, errno.EOPNOTSUPP}  # no directio; no file-backed mounts; no multi-device


def main(request: dict[str, Any]) -> dict[str, Any]:
    failpoints.hit("oneshot.started")
    if request["op"] == "unmount":
        return unmount(request["target"], syscalls.MNT_DETACH if request["detach"] else 0)
    failures = []
    for attempt in request["attempts"]:
        try:
            mount(request, **attempt)
            return {"driver": attempt["driver"], "directio": attempt["directio"]}
        except OSError as error:
            failures.append(f"{attempt['driver']}{' directio' if attempt['directio'] else ''}: {error.strerror}")
            if error.errno not in TRY_NEXT:
                break
    return {"error": "; ".join(failures)}


def mount(request: dict[str, Any], driver: str, directio: bool) -> None:
    """Mount image `request["image"]` on its target, read-only and without any other flag.

    The target is below the 0700 root, so only containers get at it: through overlay, whose own flags count, or (a view
    of one layer) through a bind mount, which would inherit nosuid and nodev and break what other snapshotters permit.
    """
    directory, kib = f"/proc/self/fd/{request['root']}", request["read_ahead"] >> 10
    # EROFS copies the read-ahead of the files that it opens, so the session's is raised first.
    device = os.stat(directory).st_dev
    set_read_ahead(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", kib)
    sources = [f"{directory}/{request['image']}-{index}" for index in range(request["devices"])]
    opened: list[int] = []
    try:
        if driver == "loop":
            loops = [attach_loop(source, directio, opened) for source in sources]
            failpoints.hit("oneshot.loop")
            for number in loops:
                set_read_ahead(f"/sys/block/loop{number}/queue/read_ahead_kb", kib)
            sources = [f"/dev/loop{number}" for number in loops]
        context = syscalls.fsopen("erofs")
        opened.append(context)
        known = file_backed()
        try:
            configure(context, sources, directio and driver == "file")
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} ({syscalls.messages(context) or 'no details'})") from None
        # A mount that others make at this very moment may get our read-ahead too: harmless.
        for name in file_backed() - known:
            set_read_ahead(f"/sys/class/bdi/{name}/read_ahead_kb", kib)
        detached = syscalls.fsmount(context, syscalls.MOUNT_ATTR_RDONLY)
        opened.append(detached)
        failpoints.hit("oneshot.created")
        syscalls.move_mount(detached, request["target"])
        failpoints.hit("oneshot.mounted")
    finally:
        for fd in opened:
            os.close(fd)


def configure(context: int, sources: list[str], directio: bool) -> None:
    syscalls.fsconfig(context, "ro")
    syscalls.fsconfig(context, "source", sources[0])
    for source in sources[1:]:
        syscalls.fsconfig(context, "device", source)
    if directio:
        syscalls.fsconfig(context, "directio")
    syscalls.fscreate(context)


def file_backed() -> set[str]:
    """Names of the backing-device infos of file-backed EROFS mounts: `erofs-<sequence>`."""
    return {name for name in os.listdir("/sys/class/bdi") if name.startswith("erofs-")}


def attach_loop(source: str, direct: bool, opened: list[int]) -> int:
    """Give `source` a read-only loop device that vanishes with its last user; its number. Keeps it open in `opened`."""
    backing = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR | (LO_FLAGS_DIRECT_IO if direct else 0)
    try:
        for _ in range(64):
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            loop = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(loop, LOOP_CONFIGURE, LOOP_CONFIG.pack(backing, 0, flags))
            except OSError as error:
                os.close(loop)
                if error.errno != errno.EBUSY:  # EBUSY: somebody was faster
                    raise OSError(error.errno, f"loop device for {source}: {error.strerror}") from None
            else:
                opened.append(loop)
                return number
        raise OSError(errno.EBUSY, "no free loop device")
    finally:
        os.close(control)
        os.close(backing)


def set_read_ahead(path: str, kib: int) -> None:
    try:
        Path(path).write_text(str(kib))
    except OSError as error:  # slower, not wrong
        sys.stderr.write(f"{path}: {error.strerror}\n")


def unmount(target: str, flags: int) -> dict[str, Any]:
    """Unmount all that is stacked on `target`; that nothing is there is fine."""
    try:
        while True:
            syscalls.umount(target, syscalls.UMOUNT_NOFOLLOW | flags)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            failpoints.hit("oneshot.unmounted")
            return {}
        return {"error": str(error.strerror), "busy": error.errno == errno.EBUSY}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
