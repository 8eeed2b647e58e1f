"""The machine around us: rights, mount namespace, unit, disks, swap, clock."""

import contextlib
import stat
from pathlib import Path

from snapshotter.cli.doctor.check import Check, Checks, Node, Result, Skipped, fail, ok, warn
from snapshotter.errors import ConfigError
from snapshotter.mounts import placement

UNITS = ("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system")
_UNIT = "coco-snapshotter.service"
# Options of systemd.exec(5) that give a unit its own mount namespace, unless they are switched off.
_SANDBOXES = (
    "PrivateMounts", "PrivateTmp", "PrivateDevices", "PrivateIPC", "ProtectSystem", "ProtectHome",
    "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups", "ProtectProc",
    "ProcSubset", "ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths", "BindPaths",
    "BindReadOnlyPaths", "TemporaryFileSystem", "MountFlags", "MountImages", "ExtensionImages", "RootDirectory",
    "RootImage", "DynamicUser",
)  # fmt: skip
_OFF = {"", "no", "false", "0", "off", "default", "all", "shared"}
_SCARCE, _EXHAUSTED = 1 << 30, 64 << 20  # bytes


def config(node: Node) -> Result:
    """Our own configuration file."""
    if node.config_error:
        return fail(node.config_error, "the checks below use the defaults until this is right")
    return ok(str(node.config_path) if node.config_path else "all defaults: there is no file")


def privileges(node: Node) -> Result:
    if node.machine.uid == 0:
        return ok("root")
    return warn(f"user {node.machine.uid}: serve needs root, and so do some checks", "sudo coco-snapshotter doctor")


def mount_namespace(node: Node) -> Result:
    """containerd must see the mounts that we make."""
    machine = node.machine
    try:
        theirs = machine.peer(node.containerd_socket)
    except OSError:
        theirs = next(iter(machine.processes("containerd")), -1)
    if theirs < 0:
        raise Skipped("containerd does not run")
    if theirs == 0:
        return fail("containerd's process cannot be seen from here, so it would be refused", "in a pod: hostPID: true")
    ours = machine.lock_holder(f"{node.config.root}/snapshotd.lock")
    what = "the running snapshotd" if ours else "this shell"
    if machine.mount_namespace(theirs) == machine.mount_namespace(ours or 0):
        return ok(f"{what} shares it with containerd (pid {theirs})")
    return fail(
        f"{what} and containerd (pid {theirs}) are in different mount namespaces: containers would find empty "
        "directories, and are refused",
        "remove PrivateMounts= and other sandboxing from the unit; from a pod: hostPID: true and "
        "nsenter --target 1 --mount -- coco-snapshotter serve",
    )


def unit(node: Node) -> Result:
    """The systemd unit with its drop-ins, as far as it could harm containers."""
    settings: dict[str, tuple[str, str]] = {}
    paths = _unit_files(node)
    if not paths:
        raise Skipped("no systemd unit is installed")
    for path in paths:
        for line in node.machine.read(path).splitlines():
            key, equals, value = line.strip().partition("=")
            if equals and not key.startswith(("#", ";")):
                settings[key.strip()] = (value.strip(), path)
    for key in _SANDBOXES:
        value, path = settings.get(key, ("", ""))
        if value.lower() not in _OFF:
            return fail(
                f"{path}: {key}={value} gives the unit a mount namespace of its own",
                f"delete {key}= there; systemctl daemon-reload",
            )
    value, path = settings.get("KillMode", ("control-group", f"{UNITS[0]}/{_UNIT}"))
    if value != "process":
        return fail(
            f"{path}: KillMode={value} takes the data plane down with every restart, and the files of all containers",
            "KillMode=process; systemctl daemon-reload",
        )
    return ok("no sandboxing of mounts, KillMode=process")


def _unit_files(node: Node) -> list[str]:
    """The unit that counts, then its drop-ins in the order in which they are read."""
    found, additions = list[str](), dict[str, str]()
    for directory in UNITS:
        with contextlib.suppress(OSError):
            if not found and _UNIT in node.machine.names(directory):
                found.append(f"{directory}/{_UNIT}")
        with contextlib.suppress(OSError):
            for name in node.machine.names(f"{directory}/{_UNIT}.d"):
                if name.endswith(".conf"):
                    additions.setdefault(name, f"{directory}/{_UNIT}.d/{name}")
    return [*found, *(additions[name] for name in sorted(additions))]


def root_directory(node: Node) -> Result:
    """Where the state lies: `serve` refuses what is refused here."""
    try:
        placement.check(node.config)
    except ConfigError as error:
        if error.reason == "not-root":
            raise Skipped("only root can tell") from None
        if error.reason != "untrusted-swap":  # `swap` says that
            return fail(str(error), error.hint or f'root = "…" in {node.config_path or "the configuration"}')
    return ok(f"{node.config.root}, as mode {node.config.mode} needs it")


def swap(node: Node) -> Result:
    """Keys and plaintext are memory, which must not be written to where the host reads."""
    if node.config.mode != "confidential":
        raise Skipped("only mode confidential minds")
    try:
        placement.check_swap(node.config.trusted_devices, node.machine.read("/proc/swaps"))
    except ConfigError as error:
        return fail(str(error), "swapoff -a, or name its encrypted device in trusted_devices")
    return ok("none that the host can read")


def cache_directory(node: Node) -> Result:
    """Nothing in the cache is believed; who may fill it is another matter."""
    try:
        status = node.machine.status(node.config.cache_dir)
    except FileNotFoundError:
        return ok(f"{node.config.cache_dir} will be made")
    if not stat.S_ISDIR(status.st_mode):
        return fail(f"{node.config.cache_dir} is no directory", 'cache_dir = "…" names another place')
    if status.st_uid != 0 or status.st_mode & 0o022:
        return warn(
            f"{node.config.cache_dir} has owner {status.st_uid} and mode {stat.S_IMODE(status.st_mode):04o}: others "
            "can fill or empty it, which costs time",
            f"chown root {node.config.cache_dir}; chmod 700 {node.config.cache_dir}",
        )
    return ok(node.config.cache_dir)


def root_space(node: Node) -> Result:
    return _space(node, node.config.root, "containers write here")


def cache_space(node: Node) -> Result:
    found = _space(node, node.config.cache_dir, "without space nothing is cached, and every read asks the registry")
    space = node.machine.space(node.config.cache_dir)
    total, quota = space.f_blocks * space.f_frsize, node.config.cache.quota
    if found.status == "ok" and quota > total:
        return warn(
            f"cache.quota is {_gib(quota)}, the file system has {_gib(total)}",
            f'[cache] quota = "{int(total * 0.8) >> 20}MiB"',
        )
    return found


def _space(node: Node, path: str, why: str) -> Result:
    space = node.machine.space(path)
    free = space.f_bavail * space.f_frsize
    inodes_low = space.f_files > 0 and space.f_favail < min(10_000, space.f_files // 100)
    advice = f"free some on the file system of {path}: coco-snapshotter prune, crictl rmi --prune; or move it"
    if free < _EXHAUSTED:
        return fail(f"{_gib(free)} free for {path}: {why}", advice)
    if free < _SCARCE or inodes_low:
        return warn(f"{_gib(free)} and {space.f_favail} inodes free for {path}: {why}", advice)
    return ok(f"{_gib(free)} free for {path}")


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def clock(node: Node) -> Result:
    """Tokens and certificates are believed by the clock."""
    installed = node.machine.status(Path(__file__)).st_mtime
    if node.machine.now() < installed - 86400:
        return fail("the clock is behind the day on which this program was installed", "set the clock: chronyd -q")
    if not node.machine.clock_is_synchronised():
        advice = "run chronyd or systemd-timesyncd, in a confidential VM with an authenticated source"
        return warn("the kernel's clock is not synchronised: tokens and certificates may seem expired", advice)
    return ok("synchronised")


CHECKS: Checks = (
    Check("config", config),
    Check("privileges", privileges),
    Check("mount-namespace", mount_namespace),
    Check("unit", unit),
    Check("root-directory", root_directory),
    Check("root-space", root_space),
    Check("cache-directory", cache_directory),
    Check("cache-space", cache_space),
    Check("swap", swap),
    Check("clock", clock),
)
