"""What keeps secrets in a process's memory inside it. Standard library only: the keeper uses it."""

import ctypes
import os
import resource

_PR_SET_DUMPABLE = 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


def set_undumpable() -> None:
    """No core dump, no ptrace by others, /proc/self/mem owned by root (prctl(2)). Raises OSError."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _check("prctl", _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def lock() -> None:
    """Nothing that this process touches, now or later, is swapped (mlockall(2)). Raises OSError."""
    _check("mlockall", _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT))


def _check(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
