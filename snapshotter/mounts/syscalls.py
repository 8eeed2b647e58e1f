"""Linux system calls that the standard library lacks, by ctypes. Standard library only: keeper and one-shots use it.

Numbers are those of the unified table (>= 5.1), equal on every architecture but alpha. Each call raises OSError.
"""

import ctypes
import os

FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 0x01, 0x02, 0x04, 0x08
MNT_DETACH, UMOUNT_NOFOLLOW = 0x02, 0x08

_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432
_CLOEXEC = 1  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_AT_FDCWD = -100

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def fsopen(kind: str) -> int:
    """A new, unconfigured file system context."""
    return _syscall("fsopen", _FSOPEN, kind.encode(), _CLOEXEC)


def fsconfig(context: int, key: str, value: str | None = None) -> None:
    """Set one option of the context; None sets a flag. Unlike mount(2) options there is no 4 KiB limit on the whole."""
    if value is None:
        _syscall(f"fsconfig {key}", _FSCONFIG, context, FSCONFIG_SET_FLAG, key.encode(), None, 0)
    else:
        _syscall(f"fsconfig {key}={value}", _FSCONFIG, context, FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)


def fscreate(context: int) -> None:
    """Make the super block: the call in which the file system reads its device."""
    _syscall("fsconfig create", _FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(context: int, attributes: int) -> int:
    """A mount of the context's super block that is attached nowhere; an O_PATH descriptor of its root."""
    return _syscall("fsmount", _FSMOUNT, context, _CLOEXEC, attributes)


def move_mount(mount: int, target: str) -> None:
    """Attach a detached mount at a path."""
    _syscall("move_mount", _MOVE_MOUNT, mount, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)


def messages(context: int) -> str:
    """What the kernel said about the context's failures, e.g. the option that it does not know."""
    lines = []
    while True:
        try:
            lines.append(os.read(context, 1024).decode(errors="replace").strip())
        except OSError:
            return "; ".join(lines)


def umount(target: str, flags: int = 0) -> None:
    if _libc.umount2(os.fsencode(target), flags) < 0:
        raise _error("umount2")


def open_fuse_session() -> tuple[int, int]:
    """A FUSE connection (/dev/fuse) and an O_PATH descriptor of its root, valid while any process holds a copy.

    The mount is never attached anywhere, so no path leads to its files; only `/proc/self/fd/<root>/<name>` does.
    """
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    context = fsopen("fuse")
    try:
        for key, value in (("fd", str(fuse)), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")):
            fsconfig(context, key, value)
        fscreate(context)
        attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
        return fuse, fsmount(context, attributes)
    except OSError:
        os.close(fuse)
        raise
    finally:
        os.close(context)


def _syscall(what: str, number: int, *arguments: int | bytes | None) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *(_argument(value) for value in arguments))
    if result < 0:
        raise _error(what)
    return result


def _argument(value: int | bytes | None) -> ctypes.c_long | ctypes.c_char_p:
    return ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value)


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
