"""What the kernel can do."""

from snapshotter.cli.doctor.check import Check, Checks, Node, Result, fail, ok, warn
from snapshotter.mounts.capabilities import directio_is_safe, kernel_version

_MULTI_DEVICE, _FILE_BACKED, _RESEND, _IDMAPPED = (5, 16, 0), (6, 12, 0), (6, 9, 0), (5, 19, 0)


def version(node: Node) -> Result:
    """EROFS with several devices is what every image needs."""
    release = node.machine.release
    if kernel_version(release) >= _MULTI_DEVICE:
        return ok(release)
    return fail(f"{release}: EROFS reads images of several blobs from 5.16 on", "boot Linux 5.16 or later, best 6.12")


def erofs(node: Node) -> Result:
    return _filesystem(node, "erofs", "CONFIG_EROFS_FS")


def fuse(node: Node) -> Result:
    try:
        node.machine.status("/dev/fuse")
    except FileNotFoundError:
        return fail("there is no /dev/fuse", "modprobe fuse; in a container: --device /dev/fuse")
    return _filesystem(node, "fuse", "CONFIG_FUSE_FS")


def overlay(node: Node) -> Result:
    return _filesystem(node, "overlay", "CONFIG_OVERLAY_FS")


def _filesystem(node: Node, name: str, option: str) -> Result:
    if name in node.machine.read("/proc/filesystems").split():
        return ok("there")
    modules = f"/lib/modules/{node.machine.release}"
    for index in ("modules.dep", "modules.builtin"):
        try:
            lines = node.machine.read(f"{modules}/{index}").splitlines()
        except OSError:
            continue
        if any(line.partition(":")[0].partition(".ko")[0].endswith(f"/{name}") for line in lines):
            return ok("a module, loaded when it is needed")
    return fail(f"the kernel has no {name}", f"a kernel with {option}, and its modules in {modules}")


def mounts(node: Node) -> Result:
    """How images are mounted: on files, or on loop devices over the same files."""
    driver = node.config.erofs.driver
    backed = kernel_version(node.machine.release) >= _FILE_BACKED and _option(node, "EROFS_FS_BACKED_BY_FILE") != "n"
    if backed and driver != "loop":
        return ok("EROFS mounts files")
    if driver == "file":
        return fail(
            f'erofs.driver is "file", and {node.machine.release} does not mount files',
            '[erofs] driver = "auto"',
        )
    try:
        node.machine.status("/dev/loop-control")
    except FileNotFoundError:
        return fail("no file-backed mounts (6.12 and later) and no /dev/loop-control", "modprobe loop")
    if driver == "loop":
        return ok("loop devices, as configured")
    return warn("loop devices: this kernel does not mount files", "Linux 6.12 or later is faster")


def directio(node: Node) -> Result:
    """CVE-2026-23224: where direct I/O frees memory in use it is left off, and image data is cached twice."""
    release = kernel_version(node.machine.release)
    if release < _FILE_BACKED:
        return Result("skip", "file-backed mounts begin with 6.12")
    if directio_is_safe(release):
        return ok("direct I/O is used")
    return warn(
        f"{node.machine.release} has CVE-2026-23224 in EROFS: direct I/O stays off and image data is cached twice",
        "boot 6.12.72, 6.18.11, 6.19.1 or a later one",
    )


def resend(node: Node) -> Result:
    """How reads survive that blobd is killed: the kernel hands them out again, or we remember them."""
    if kernel_version(node.machine.release) >= _RESEND:
        return ok("the kernel repeats reads to a new blobd (FUSE_NOTIFY_RESEND)")
    return ok("before 6.9 the kernel does not repeat reads; those of a killed blobd are answered from our own table")


def idmapped(node: Node) -> Result:
    if kernel_version(node.machine.release) >= _IDMAPPED:
        return ok("overlay takes idmapped layers")
    return warn(
        "overlay takes no idmapped layers before 5.19: pods with a user namespace do not start, or are copied",
        "boot Linux 5.19 or later, or run such pods without hostUsers: false",
    )


def _option(node: Node, name: str) -> str:
    """`y`, `m`, `n`; "" if the kernel's configuration cannot be found."""
    machine = node.machine
    for path in (f"/boot/config-{machine.release}", f"/lib/modules/{machine.release}/config"):
        try:
            lines = machine.read(path).splitlines()
        except OSError:
            continue
        return next((line.partition("=")[2] for line in lines if line.startswith(f"CONFIG_{name}=")), "n")
    return ""


CHECKS: Checks = (
    Check("kernel-version", version),
    Check("kernel-erofs", erofs),
    Check("kernel-fuse", fuse),
    Check("kernel-overlay", overlay),
    Check("kernel-mounts", mounts),
    Check("kernel-directio", directio),
    Check("kernel-resend", resend),
    Check("kernel-idmapped", idmapped),
)
