"""containerd: does it know us, and does its configuration let pulls be lazy?"""

from snapshotter.cli.doctor.check import Check, Checks, Node, Result, Skipped, fail, ok, warn
from snapshotter.cli.doctor.containerd_config import CRI_IMAGES, CRI_V1, TRANSFER, ContainerdConfig, Table, table

# Names of snapshotters to which nerdctl sends the labels that make a pull lazy.
NERDCTL_NAMES = ("nydus", "stargz", "overlaybd", "soci", "cvmfs-snapshotter")


CAPABILITIES = {"remap-ids"}
_CLOCKS_DIFFER = 2.0  # seconds: a process's age is known by another clock than a file's


def configuration(node: Node) -> Result:
    """The file that containerd reads, and what reads it."""
    try:
        read = ContainerdConfig.read(node.machine, node.containerd_path)
    except FileNotFoundError as error:
        advice = f"--containerd-config FILE; or: containerd config default >{node.containerd_path}"
        return warn(f"there is no {error.filename}", advice)
    except ValueError as error:
        found = f"{node.containerd_path}: {error}; containerd does not start with it"
        return fail(found, "correct it; systemctl restart containerd")
    release = ".".join(map(str, read.release)) if read.release != (0, 0) else "not installed here"
    return ok(f"{', '.join(map(str, read.files))} (version {read.version}), containerd {release}")


def _plugins(node: Node) -> dict[str, Table]:
    proxies = node.containerd.proxies(node.config.address)
    if not proxies:
        raise Skipped("containerd-plugin says what is missing")
    return proxies


def plugin(node: Node) -> Result:
    """A proxy plugin on our socket."""
    found = node.containerd.proxies(node.config.address)
    if not found:
        return fail(
            f"{node.containerd_path}: no proxy plugin has address {node.config.address}",
            f'[proxy_plugins.coco] type = "snapshot", address = "{node.config.address}"; then restart containerd',
        )
    wrong = [name for name, proxy in found.items() if proxy.get("type") != "snapshot"]
    if wrong:
        return fail(
            f'proxy plugin {wrong[0]}: its type is not "snapshot"', f'[proxy_plugins.{wrong[0]}] type = "snapshot"'
        )
    for name, proxy in found.items():
        claimed = proxy.get("capabilities", [])
        unknown = sorted(set(map(str, claimed)) - CAPABILITIES) if isinstance(claimed, list) else ["capabilities"]
        if unknown:
            return fail(
                f"proxy plugin {name} claims {unknown[0]}, which is not offered: pulls fail",
                f'[proxy_plugins.{name}] capabilities = ["remap-ids"], or none',
            )
    return ok(f"{', '.join(found)} at {node.config.address}")


def exported_root(node: Node) -> Result:
    """CRI measures the disk of images there."""
    for name, proxy in _plugins(node).items():
        exported = table(proxy, "exports").get("root")
        if exported != node.config.root:
            return warn(
                f"proxy plugin {name} exports root {exported or 'nothing'}: kubelet watches another disk than ours",
                f'[proxy_plugins.{name}.exports] root = "{node.config.root}"',
            )
    return ok(node.config.root)


def migration(node: Node) -> Result:
    """containerd 2.x takes files of version 2, but drops three keys of a table that has no runtimes in it."""
    containerd = node.containerd
    cri = table(table(table(containerd.stated, "plugins"), CRI_V1), "containerd")
    if not containerd.is_2x or containerd.version >= 3 or not cri:
        return ok(f"version {containerd.version} is what this containerd reads")
    dropped = [key for key in ("snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers") if key in cri]
    if dropped and not cri.get("runtimes"):
        return fail(
            f"containerd 2.x forgets {', '.join(dropped)} of a version 2 file in which no runtimes are listed",
            f'[plugins."{CRI_V1}".containerd.runtimes.runc] runtime_type = "io.containerd.runc.v2"; or: containerd '
            "config migrate",
        )
    return ok("version 2, migrated by containerd 2.x")


def misplaced(node: Node) -> Result:
    """Tables of the other major version are ignored without a word."""
    containerd = node.containerd
    plugins = table(containerd.stated, "plugins")
    if containerd.version >= 3 and CRI_V1 in plugins and "containerd" in table(plugins, CRI_V1):
        return fail(
            f'a version {containerd.version} file: plugins."{CRI_V1}".containerd is not read',
            f"move snapshotter and disable_snapshot_annotations to [plugins.'{CRI_IMAGES}']",
        )
    if not containerd.is_2x and CRI_IMAGES in plugins:
        return fail(
            f"containerd 1.x does not read plugins.'{CRI_IMAGES}'",
            f'version = 2, and the keys in [plugins."{CRI_V1}".containerd]',
        )
    return ok("no table of another version")


def _cri(node: Node) -> tuple[str, Table]:
    if not node.containerd.has_cri:
        raise Skipped("containerd's CRI plugin is disabled")
    return node.containerd.cri


def annotations(node: Node) -> Result:
    """The labels by which we know an image. Without them CRI downloads everything."""
    name, cri = _cri(node)
    if cri.get("disable_snapshot_annotations") is False:
        return ok("CRI sends them")
    if _transfers_labels(node):
        return ok("CRI pulls by the transfer service, which sends them")
    return fail(
        f"{name}: disable_snapshot_annotations is not false, so CRI sends no image labels and nothing is lazy",
        f"[{name}] disable_snapshot_annotations = false",
    )


def _transfers_labels(node: Node) -> bool:
    if node.containerd.release < (2, 1):
        return False
    listed = {entry.get("snapshotter") for entry in node.containerd.unpackers}
    return any(
        name in listed and table(proxy, "exports").get("enable_remote_snapshot_annotations") == "true"
        for name, proxy in node.containerd.proxies(node.config.address).items()
    )


def snapshotter(node: Node) -> Result:
    """Which snapshotter pods use."""
    name, cri = _cri(node)
    used, ours = cri.get("snapshotter"), _plugins(node)
    if used in ours:
        return ok(f"pods use {used}")
    runtimes = table(node.containerd.plugin(CRI_V1 if name.endswith("containerd") else CRI_IMAGES), "runtime_platforms")
    runtimes = runtimes or table(cri, "runtimes")
    chosen = [runtime for runtime in runtimes if table(runtimes, runtime).get("snapshotter") in ours]
    if chosen:
        return ok(f"pods of runtime {', '.join(chosen)} use us")
    return warn(f"pods use {used or 'overlayfs'}", f'[{name}] snapshotter = "{next(iter(ours))}"')


def unpack(node: Node) -> Result:
    """The transfer service (`ctr images pull`, CRI in 2.1 and later) unpacks only for snapshotters it is told of."""
    if not node.containerd.is_2x:
        raise Skipped("containerd 1.x has no need of it")
    ours, entries = _plugins(node), node.containerd.unpackers
    missing = [name for name in ours if name not in {entry.get("snapshotter") for entry in entries}]
    if missing:
        local = node.containerd.has_cri and node.containerd.cri[1].get("disable_snapshot_annotations") is False
        return (warn if local else fail)(
            f'no unpack_config for {missing[0]}: ctr images pull ends with "no unpack platforms defined"',
            f'[[plugins.\'{TRANSFER}\'.unpack_config]] platform = "linux/amd64", snapshotter = "{missing[0]}", '
            'differ = "walking"; and the same for overlayfs, since this replaces the built-in list',
        )
    if "overlayfs" not in {entry.get("snapshotter") for entry in entries}:
        return warn(
            "unpack_config replaces the built-in list and does not name overlayfs: pulls with it fail",
            f'[[plugins.\'{TRANSFER}\'.unpack_config]] platform = "linux/amd64", snapshotter = "overlayfs", '
            'differ = "walking"',
        )
    return ok(f"{', '.join(ours)} and overlayfs")


def transfer_annotations(node: Node) -> Result:
    """Whether the transfer service says which image a layer belongs to."""
    if not node.containerd.is_2x or node.containerd.release == (2, 0):
        raise Skipped("from containerd 2.1 on")
    for name, proxy in _plugins(node).items():
        if table(proxy, "exports").get("enable_remote_snapshot_annotations") != "true":
            return warn(
                f"proxy plugin {name}: the transfer service sends no image labels, so ctr images pull is not lazy",
                f'[proxy_plugins.{name}.exports] enable_remote_snapshot_annotations = "true"   (a string)',
            )
    return ok("the transfer service sends image labels")


def layers_kept(node: Node) -> Result:
    """Needed by other snapshotters on the node."""
    name, cri = _cri(node)
    if cri.get("discard_unpacked_layers") is True:
        return warn(
            f"{name}: discard_unpacked_layers is true: other snapshotters miss the layers of ordinary images",
            f"[{name}] discard_unpacked_layers = false",
        )
    return ok("unpacked layers are kept")


def nerdctl(node: Node) -> Result:
    """nerdctl sends image labels to snapshotters whose names it knows."""
    if node.machine.output("nerdctl", "--version") is None:
        raise Skipped("nerdctl is not installed")
    known = [name for name in _plugins(node) if name in NERDCTL_NAMES]
    if known:
        return ok(f"nerdctl --snapshotter {known[0]} pulls lazily")
    return warn(
        "nerdctl pull downloads everything: it does not know our plugin's name",
        f'a second plugin on the same socket: [proxy_plugins.nydus] type = "snapshot", address = '
        f'"{node.config.address}"; then nerdctl --snapshotter nydus',
    )


def socket(node: Node) -> Result:
    """containerd itself."""
    try:
        pid = node.machine.peer(node.containerd_socket)
    except FileNotFoundError:
        return warn(f"no socket {node.containerd_socket}", "start containerd, or --containerd SOCK")
    except PermissionError:
        raise Skipped("only root may talk to containerd") from None
    except OSError as error:
        return fail(
            f"{node.containerd_socket}: {error.strerror}", "systemctl start containerd; journalctl -u containerd"
        )
    return ok(f"{node.containerd_socket}, pid {pid}")


def restarted(node: Node) -> Result:
    """It reads its configuration only when it starts."""
    try:
        pid = node.machine.peer(node.containerd_socket)
        began = node.machine.started(pid)
        changed = max(node.machine.status(path).st_mtime for path in node.containerd.files)
    except OSError:
        raise Skipped("containerd does not run") from None
    if changed > began + _CLOCKS_DIFFER:
        return warn("its configuration is newer than the running containerd", "systemctl restart containerd")
    return ok("it runs with its present configuration")


def loaded(node: Node) -> Result:
    """What the running containerd says of our plugin."""
    try:
        node.machine.peer(node.containerd_socket)
    except OSError:
        raise Skipped("containerd-socket says why") from None
    listed = node.machine.output("ctr", "--address", str(node.containerd_socket), "plugins", "ls")
    if listed is None:
        raise Skipped("ctr is not installed, or containerd does not answer")
    rows = [line.split() for line in listed.splitlines()]
    for name in _plugins(node):
        row = next((row for row in rows if row[:2] == ["io.containerd.snapshotter.v1", name]), None)
        if row is None or row[-1] != "ok":
            return fail(
                f"the running containerd has {'an error with' if row else 'no'} snapshotter {name}",
                "systemctl restart containerd; journalctl -u containerd",
            )
    return ok("the running containerd has loaded it")


CHECKS: Checks = (
    Check("containerd-config", configuration),
    Check("containerd-migration", migration),
    Check("containerd-tables", misplaced),
    Check("containerd-plugin", plugin),
    Check("containerd-exports", exported_root),
    Check("containerd-annotations", annotations),
    Check("containerd-snapshotter", snapshotter),
    Check("containerd-unpack", unpack),
    Check("containerd-transfer", transfer_annotations),
    Check("containerd-layers", layers_kept),
    Check("containerd-nerdctl", nerdctl),
    Check("containerd-socket", socket),
    Check("containerd-restart", restarted),
    Check("containerd-loaded", loaded),
)
