"""Where state may live: checked once, before `serve` starts anything.

`root` holds what containers write and what we believe at the next start, so nobody else may be able to change it: not
another user of this machine, and in mode confidential not the host under it either.
"""

import os
import resource
import stat
from collections.abc import Sequence
from pathlib import Path

from snapshotter.config import Config
from snapshotter.errors import ConfigError
from snapshotter.mounts.mountinfo import mount_of

_MEMORY = ("tmpfs", "ramfs")
_SOCKET_PATH = 107  # bytes, of any path that a socket is bound to
_LONGEST_SOCKET = "snapshotd.sock"  # of those in root
_DESCRIPTORS = 256


def check(config: Config) -> None:
    """Raises ConfigError saying what to change. Creates nothing."""
    if os.geteuid() != 0:
        raise ConfigError("serve mounts file systems and must run as root", reason="not-root")
    root = Path(os.path.realpath(config.root))
    _check_owner("root", root)
    _check_path(root)
    for path in (config.root + f"/{_LONGEST_SOCKET}", f"{root}/{_LONGEST_SOCKET}", config.address):
        if len(os.fsencode(path)) > _SOCKET_PATH:
            raise ConfigError(f"{path} is too long for a socket ({_SOCKET_PATH} bytes)", reason="path")
    # Who can rename the socket away gets containerd, which is root, to mount what he likes.
    _check_owner("directory of address", Path(os.path.realpath(config.address)).parent)
    if listen := config.registry.image_service.listen:  # or the kubelet's logins
        _check_owner("directory of registry.image_service.listen", Path(os.path.realpath(listen)).parent)
    _check_descriptors()
    if config.mode == "confidential":
        _check_apart(root, Path(os.path.realpath(config.cache_dir)), Path(os.path.realpath(config.address)))
        _check_trusted(root, config.trusted_devices)
        check_swap(config.trusted_devices, Path("/proc/swaps").read_text())


def _check_path(root: Path) -> None:
    if set(str(root)) & set(",:\\\n"):
        raise ConfigError(f"root {str(root)!r} has a character that overlay mount options cannot hold", reason="path")


def _check_descriptors() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most < _DESCRIPTORS:
        raise ConfigError(
            f"at most {most} open files are allowed, {_DESCRIPTORS} are the least that serves anybody",
            reason="limit",
            hint="LimitNOFILE= in the systemd unit, ulimit -Hn in a shell; each image and each client needs some",
        )


def _check_owner(what: str, place: Path) -> None:
    """Only root may own or write `place` or rename anything above it; a sticky directory such as /tmp is fine above."""
    for path in (place, *place.parents):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # will be made, mode 0700
        except OSError as error:
            raise ConfigError(f"{what} {place}: {path}: {error.strerror}", reason="root-directory") from error
        if not stat.S_ISDIR(status.st_mode):
            raise ConfigError(f"{what} {place}: {path} is no directory", reason="root-directory")
        loose = status.st_mode & 0o022 and not (path != place and status.st_mode & stat.S_ISVTX)
        if status.st_uid != 0 or loose:
            raise ConfigError(
                f"{what} {place}: {path} has owner {status.st_uid} and mode {stat.S_IMODE(status.st_mode):04o}",
                reason="root-directory",
                hint="only root may own it, and neither group nor others may write to it",
            )


def _check_apart(root: Path, cache: Path, address: Path) -> None:
    if cache.is_relative_to(root) or root.is_relative_to(cache):
        raise ConfigError(
            f"cache_dir {cache} and root {root} lie inside each other",
            reason="directories",
            hint="mode confidential keeps trusted state and the untrusted cache apart",
        )
    if address.is_relative_to(cache):
        raise ConfigError(f"address {address} lies inside the untrusted cache_dir {cache}", reason="directories")


def _check_trusted(root: Path, trusted: Sequence[str]) -> None:
    existing = next(path for path in (root, *root.parents) if path.exists())
    mount = mount_of(existing)
    if mount.kind in _MEMORY or mount.device in _devices(trusted):
        return
    raise ConfigError(
        f"root {root} lies on {mount.kind}, device {mount.device} ({mount.source}), which the host can read and change",
        reason="untrusted-root",
        hint="put root on a tmpfs, or on an encrypted and integrity-protected device named in trusted_devices",
    )


def check_swap(trusted: Sequence[str], swaps: str) -> None:
    """Keys and decrypted file contents are memory: they must not be swapped out to where the host reads them."""
    for line in swaps.splitlines()[1:]:
        path = line.split()[0]
        if not path.startswith("/dev/zram") and _lies_on(path) not in _devices(trusted):
            raise ConfigError(
                f"swap space {path} is active, which the host can read",
                reason="untrusted-swap",
                hint="swapoff it, or name its encrypted device in trusted_devices",
            )


def _devices(names: Sequence[str]) -> set[str]:
    """MAJ:MIN of block devices given by path or by that very text, without those that are none."""
    return {name if not name.startswith("/") else _number(name) for name in names} - {""}


def _number(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if stat.S_ISBLK(status.st_mode) else ""


def _lies_on(swap: str) -> str:
    """The device of a swap partition or swap file; "" if that cannot be told."""
    try:
        return _number(swap) or mount_of(Path(swap)).device
    except OSError:
        return ""
