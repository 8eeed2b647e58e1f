"""Each check passes on a healthy machine, and fails, warns or skips on one that was broken for it."""

import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from snapshotter.cli.doctor import command
from snapshotter.cli.doctor.check import Node, Status
from snapshotter.config import Config
from tests.unit.doctor.fake import (
    ADDRESS,
    CACHE,
    CONFIG_1,
    CONFIG_2,
    CONTAINERD,
    NOW,
    ROOT,
    SOCKET,
    Break,
    FakeMachine,
    entry,
    erofs_mount,
    space,
)

CHECKS = {check.id: check for check in command.checks()}
GIB = 1 << 30
UNIT = "/etc/systemd/system/coco-snapshotter.service"


def configure(**changes: Any) -> Break:
    def apply(_: FakeMachine, node: Node) -> None:
        node.config = msgspec.convert(changes, Config)

    return apply


def cri(old: str, new: str, text: str = CONFIG_1) -> Break:
    """containerd's configuration with a change."""
    assert old in text

    def apply(machine: FakeMachine, _: Node) -> None:
        if "version = 3" in text:
            machine.use_2x(text.replace(old, new))
        else:
            machine.texts[CONTAINERD] = text.replace(old, new)

    return apply


def put(attribute: str, key: Any, value: Any) -> Break:
    return lambda machine, _: getattr(machine, attribute).__setitem__(key, value)


def drop(attribute: str, key: Any) -> Break:
    return lambda machine, _: getattr(machine, attribute).pop(key)


def kernel(release: str) -> Break:
    return lambda machine, _: setattr(machine, "release", release)


def both(*breaks: Break) -> Break:
    return lambda machine, node: [apply(machine, node) for apply in breaks]


def silent(machine: FakeMachine, _: Node) -> None:
    machine.silence()


def modern(machine: FakeMachine, _: Node) -> None:
    machine.use_2x()


def old_file_on_2x(machine: FakeMachine, _: Node) -> None:
    machine.use_2x(CONFIG_1.partition("  [plugins")[0])


def dumped(machine: FakeMachine, _: Node) -> None:
    """containerd itself says what it made of the file."""
    machine.use_2x(CONFIG_1)
    machine.outputs["containerd", "--config", CONTAINERD, "config", "dump"] = CONFIG_2.replace(
        "disable_snapshot_annotations = false", "disable_snapshot_annotations = true"
    ).replace('annotations = "true"', 'annotations = "no"')


def imported(machine: FakeMachine, _: Node) -> None:
    machine.texts[CONTAINERD] = 'version = 2\nimports = ["more/*.toml", "/etc/last.toml"]\n'
    machine.directories["/etc/containerd/more"] = ["b.toml", "a.toml", "a.txt"]
    machine.texts["/etc/containerd/more/a.toml"] = CONFIG_1
    machine.texts["/etc/containerd/more/b.toml"] = f'imports = ["{CONTAINERD}"]\n'
    machine.texts["/etc/last.toml"] = (
        '[plugins."io.containerd.grpc.v1.cri".containerd]\n  disable_snapshot_annotations = true\n'
    )


KEY = configure(keys={"files": ["/k"]})
STATE, BOOTSTRAP_FILE = f"{ROOT}/snapshots", f"{CACHE}/bootstraps/{'b' * 64}"
CASES: list[tuple[str, Break, Status, str]] = [
    # the machine
    ("config", lambda _, node: setattr(node, "config_error", "config: $.mode"), "fail", "$.mode"),
    ("privileges", lambda machine, _: setattr(machine, "uid", 1000), "warn", "sudo"),
    ("mount-namespace", put("namespaces", 50, "mnt:[2]"), "fail", "nsenter --target 1 --mount"),
    ("mount-namespace", put("peers", SOCKET, 0), "fail", "hostPID: true"),
    ("mount-namespace", both(drop("peers", SOCKET), put("namespaces", 50, "mnt:[2]")), "fail", "PrivateMounts"),
    ("mount-namespace", both(drop("peers", SOCKET), drop("named", "containerd")), "skip", "does not run"),
    ("mount-namespace", both(silent, put("namespaces", 0, "mnt:[2]")), "fail", "this shell"),
    ("unit", put("texts", UNIT, "KillMode=process\nPrivateTmp=yes\n"), "fail", "delete PrivateTmp="),
    ("unit", put("texts", UNIT, "KillMode=process\nProtectSystem = strict\n"), "fail", "ProtectSystem=strict"),
    ("unit", put("texts", UNIT, "KillMode=mixed\n"), "fail", "KillMode=process"),
    ("unit", put("texts", UNIT, "# KillMode=process\n"), "fail", "KillMode=control-group"),
    (
        "unit",
        both(
            put("directories", "/run/systemd/system/coco-snapshotter.service.d", ["x.conf", "README"]),
            put("texts", "/run/systemd/system/coco-snapshotter.service.d/x.conf", "PrivateMounts=yes"),
        ),
        "fail",
        "service.d/x.conf: PrivateMounts=yes",
    ),
    ("unit", drop("directories", "/etc/systemd/system"), "skip", "no systemd unit"),
    ("root-space", put("spaces", ROOT, space(free=10 << 20)), "fail", "0.0 GiB free"),
    ("root-space", put("spaces", ROOT, space(free=GIB // 2)), "warn", "prune"),
    ("root-space", put("spaces", ROOT, space(free_inodes=9)), "warn", "9 inodes"),
    ("cache-space", put("spaces", CACHE, space(total=5 * GIB, free=4 * GIB)), "warn", 'quota = "4096MiB"'),
    ("cache-directory", put("entries", CACHE, entry(stat.S_IFDIR, 0o777)), "warn", "chmod 700"),
    ("cache-directory", put("entries", CACHE, entry(stat.S_IFDIR, 0o700, uid=33)), "warn", "owner 33"),
    ("cache-directory", put("entries", CACHE, entry()), "fail", "no directory"),
    ("cache-directory", drop("entries", CACHE), "ok", "will be made"),
    ("swap", put("texts", "/proc/swaps", "Filename\n/dev/sda2 partition 1 0 -2\n"), "skip", "only mode"),
    (
        "swap",
        both(configure(mode="confidential"), put("texts", "/proc/swaps", "Filename\n/dev/sda2 partition 1 0 -2\n")),
        "fail",
        "swapoff",
    ),
    ("clock", lambda machine, _: setattr(machine, "time", NOW - 10**7), "fail", "set the clock"),
    ("clock", lambda machine, _: setattr(machine, "synchronised", False), "warn", "chronyd"),
    # the kernel
    ("kernel-version", kernel("5.15.0-91-generic"), "fail", "5.16"),
    ("kernel-erofs", put("texts", "/proc/filesystems", "fuse overlay"), "fail", "CONFIG_EROFS_FS"),
    (
        "kernel-erofs",
        both(
            put("texts", "/proc/filesystems", "fuse"),
            put("texts", "/lib/modules/6.18.44-cloud/modules.dep", "kernel/fs/erofs/erofs.ko.xz: kernel/lib/x.ko\n"),
        ),
        "ok",
        "module",
    ),
    ("kernel-fuse", put("texts", "/proc/filesystems", "erofs overlay"), "fail", "CONFIG_FUSE_FS"),
    ("kernel-fuse", drop("entries", "/dev/fuse"), "fail", "modprobe fuse"),
    ("kernel-overlay", put("texts", "/proc/filesystems", "erofs fuse"), "fail", "CONFIG_OVERLAY_FS"),
    ("kernel-mounts", kernel("6.1.0-50-cloud-amd64"), "warn", "6.12"),
    ("kernel-mounts", put("texts", "/boot/config-6.18.44-cloud", "CONFIG_EROFS_FS=y\n"), "warn", "loop devices"),
    ("kernel-mounts", both(kernel("6.1.0"), drop("entries", "/dev/loop-control")), "fail", "modprobe loop"),
    ("kernel-mounts", both(kernel("6.1.0"), configure(erofs={"driver": "file"})), "fail", 'driver = "auto"'),
    ("kernel-mounts", configure(erofs={"driver": "loop"}), "ok", "as configured"),
    ("kernel-directio", kernel("6.12.43"), "warn", "CVE-2026-23224"),
    ("kernel-directio", kernel("6.1.0"), "skip", "6.12"),
    ("kernel-resend", kernel("6.1.0"), "ok", "from our own table"),
    ("kernel-idmapped", kernel("5.16.0"), "warn", "5.19"),
    # our processes
    ("workers", silent, "warn", "systemctl enable"),
    ("workers", drop("answers", "blobd"), "fail", "blobd does not answer"),
    ("workers", put("answers", "keeper", PermissionError()), "skip", "only root"),
    ("workers-orphaned", drop("answers", "keeper"), "warn", "blobd pid 12, snapshotd pid 11"),
    ("workers-version", put("answers", "blobd", {"version": "0.0.1"}), "warn", "systemctl reload"),
    ("workers-version", silent, "skip", "nothing runs"),
    ("workers-config", configure(cache_dir="/srv/cache"), "warn", "cache_dir = '/var/cache"),
    ("workers-config", silent, "skip", "does not run"),
    ("socket", silent, "skip", "nothing runs"),
    ("socket", drop("entries", ADDRESS), "fail", "does not exist"),
    ("socket", put("entries", ADDRESS, entry()), "fail", "no socket"),
    ("socket", put("entries", ADDRESS, entry(stat.S_IFSOCK, 0o666)), "fail", "mode 0666"),
    ("socket", put("peers", ADDRESS, ConnectionRefusedError()), "fail", "refuses"),
    ("reads", put("answers", "blobd", {"counters": {"verify_failures": 2}}), "warn", "coco-snapshotter check"),
    ("reads", put("answers", "blobd", {"counters": {"eio": 2}}), "warn", "2 reads failed"),
    ("reads", put("answers", "blobd", {"counters": {"cache_errors": 1}}), "warn", f"space and mode of {CACHE}"),
    ("reads", silent, "skip", "blobd does not run"),
    # containerd
    ("containerd-config", drop("texts", CONTAINERD), "warn", "--containerd-config"),
    ("containerd-config", put("texts", CONTAINERD, "version = [\n"), "fail", "containerd does not start"),
    ("containerd-config", imported, "ok", "/etc/containerd/more/a.toml, /etc/containerd/more/b.toml, /etc/last.toml"),
    ("containerd-plugin", cri(ADDRESS, "/elsewhere.sock"), "fail", f'address = "{ADDRESS}"'),
    ("containerd-plugin", cri('"snapshot"', '"content"'), "fail", 'type = "snapshot"'),
    ("containerd-plugin", drop("texts", CONTAINERD), "skip", "cannot be read"),
    ("containerd-plugin", cri("  type", '  capabilities = ["rebase"]\n  type'), "fail", "claims rebase"),
    ("containerd-plugin", cri("  type", '  capabilities = ["remap-ids"]\n  type'), "ok", "coco at"),
    ("containerd-exports", cri(f'root = "{ROOT}"', 'root = "/elsewhere"'), "warn", f'exports] root = "{ROOT}"'),
    ("containerd-exports", cri(f'root = "{ROOT}"', "", CONFIG_2), "warn", "exports root nothing"),
    ("containerd-exports", cri(ADDRESS, "/elsewhere.sock"), "skip", "containerd-plugin"),
    ("containerd-migration", lambda m, _: m.use_2x(CONFIG_1), "ok", "migrated"),
    ("containerd-migration", lambda m, _: m.use_2x(CONFIG_1.rpartition("  [plugins")[0]), "fail", "runtimes.runc]"),
    ("containerd-tables", lambda m, _: m.use_2x(CONFIG_1.replace("version = 2", "version = 3")), "fail", "is not read"),
    ("containerd-tables", put("texts", CONTAINERD, CONFIG_2), "fail", "containerd 1.x does not read"),
    ("containerd-annotations", cri("annotations = false", "annotations = true"), "fail", "annotations = false"),
    ("containerd-annotations", cri("  disable_snapshot_annotations = false\n", ""), "fail", "annotations = false"),
    ("containerd-annotations", imported, "fail", "annotations = false"),
    ("containerd-annotations", dumped, "fail", "[plugins.'io.containerd.cri.v1.images']"),
    ("containerd-annotations", cri("annotations = false", "annotations = true", CONFIG_2), "ok", "transfer service"),
    ("containerd-annotations", put("texts", CONTAINERD, f'disabled_plugins = ["cri"]\n{CONFIG_1}'), "skip", "disabled"),
    ("containerd-snapshotter", cri('snapshotter = "coco"', ""), "warn", 'snapshotter = "coco"'),
    (
        "containerd-snapshotter",
        cri(
            'runtime_type = "io.containerd.runc.v2"',
            'snapshotter = "coco"\n[x]',
            CONFIG_1.replace('r = "coco"', 'r = "x"'),
        ),
        "ok",
        "runtime runc",
    ),
    ("containerd-unpack", modern, "ok", "coco and overlayfs"),
    (
        "containerd-unpack",
        cri("[[plugins", "[[other", CONFIG_2.replace("annotations = false", "annotations = true")),
        "fail",
        "differ",
    ),
    ("containerd-unpack", lambda m, _: m.use_2x(CONFIG_1), "warn", "no unpack platforms defined"),
    ("containerd-unpack", cri('snapshotter = "overlayfs"', 'snapshotter = "x"', CONFIG_2), "warn", '"overlayfs"'),
    ("containerd-transfer", modern, "ok", "sends"),
    ("containerd-transfer", cri('annotations = "true"', "annotations = true", CONFIG_2), "warn", '"true"   (a string)'),
    ("containerd-transfer", lambda m, _: m.use_2x(version="v2.0.1"), "skip", "2.1"),
    (
        "containerd-layers",
        cri("  disable", "  discard_unpacked_layers = true\n  disable"),
        "warn",
        "layers = false",
    ),
    ("containerd-nerdctl", put("outputs", ("nerdctl", "--version"), "2.2.2"), "warn", "[proxy_plugins.nydus]"),
    (
        "containerd-nerdctl",
        both(put("outputs", ("nerdctl", "--version"), "2"), cri("[proxy_plugins.coco", "[proxy_plugins.nydus")),
        "ok",
        "nerdctl --snapshotter nydus",
    ),
    ("containerd-socket", drop("peers", SOCKET), "warn", "--containerd SOCK"),
    ("containerd-socket", put("peers", SOCKET, ConnectionRefusedError(111, "Connection refused")), "fail", "refused"),
    ("containerd-socket", put("peers", SOCKET, PermissionError()), "skip", "only root"),
    ("containerd-restart", put("entries", CONTAINERD, entry(mtime=NOW - 60)), "warn", "systemctl restart containerd"),
    ("containerd-restart", drop("peers", SOCKET), "skip", "does not run"),
    ("containerd-loaded", put("outputs", ("ctr", "--address", SOCKET, "plugins", "ls"), ""), "fail", "no snapshotter"),
    (
        "containerd-loaded",
        put("outputs", ("ctr", "--address", SOCKET, "plugins", "ls"), "io.containerd.snapshotter.v1 coco - error\n"),
        "fail",
        "an error with",
    ),
    # keys
    ("keys", configure(keys={"files": ["/nonexistent.pem"]}), "fail", "/nonexistent.pem"),
    ("keys", configure(mode="confidential"), "warn", "files = ["),
    (
        "keys-secrecy",
        both(KEY, put("entries", "/k", entry(mode=0o640))),
        "fail",
        "chmod 600",
    ),
    ("keys-secrecy", both(configure(keys={"files": ["/k"]}), put("entries", "/k", entry(uid=5))), "fail", "chown root"),
    ("keys-secrecy", configure(keys={"files": ["/k"]}), "skip", "keys says"),
    (
        "keys-services",
        configure(keys={"kbs": {"url": "https://kbs.example", "insecure_sample_attester": True}}),
        "fail",
        "keys.kbs.url = 'https://kbs.example': Connection refused",
    ),
    ("keys-services", configure(keys={"cdh": {"address": "unix:///cdh.sock"}}), "fail", "keys.cdh.address"),
    (
        "keys-services",
        both(
            configure(keys={"kbs": {"url": "http://127.0.0.1:8080"}}),
            lambda machine, _: machine.reachable.add(("127.0.0.1", 8080)),
        ),
        "fail",
        "keys.kbs.agent_socket",
    ),
    # leftovers
    ("state-mounts", lambda machine, _: machine.mounted.append(erofs_mount(9)), "warn", "snapshots/9/mnt"),
    ("state-mounts", silent, "skip", "does not answer"),
    ("state-dead-mounts", put("answers", "blobd", {"images": []}), "fail", "restart the containers"),
    (
        "state-dead-mounts",
        both(silent, lambda machine, _: machine.mounted.append(erofs_mount(3))),
        "fail",
        "lost together",
    ),
    ("state-dead-mounts", drop("answers", "blobd"), "skip", "starts it again"),
    (
        "state-directories",
        put("directories", STATE, ["2", "3", "7", "old-1-x", "lost-4"]),
        "warn",
        "7, old",
    ),
    ("state-directories", drop("directories", STATE), "skip", "no snapshots yet"),
    ("state-directories", put("directories", STATE, PermissionError(13, "", ROOT)), "skip", "only root"),
    ("state-lost", put("directories", STATE, ["lost-4-x"]), "warn", f"rm -r {ROOT}/snapshots/lost-4-x"),
    ("state-lost", put("directories", ROOT, ["metadata.db.damaged-1"]), "warn", "metadata.db.damaged-1"),
    (
        "state-bootstraps",
        put("digests", BOOTSTRAP_FILE, "sha256:0"),
        "warn",
        f"rm {CACHE}/bootstraps/b",
    ),
    ("state-bootstraps", drop("digests", BOOTSTRAP_FILE), "warn", "needs the registry"),
]
SKIPPED_IN_HEALTH = {
    "swap", "containerd-unpack", "containerd-transfer", "containerd-nerdctl", "keys-secrecy", "keys-services",
    "image-manifest", "image-kind", "image-policy", "image-ranges", "image-key",
}  # fmt: skip
REAL = {"root-directory", "image-manifest", "image-kind", "image-policy", "image-ranges", "image-key"}


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture
def node(machine: FakeMachine) -> Node:
    return Node(machine, Config(), containerd_path=Path(CONTAINERD), containerd_socket=Path(SOCKET))


@pytest.mark.parametrize("name", sorted(CHECKS.keys() - {"root-directory"}))
def test_a_healthy_machine_passes(node: Node, name: str) -> None:
    found = command.result(node, CHECKS[name])
    assert found.status == ("skip" if name in SKIPPED_IN_HEALTH else "ok"), found
    assert not found.advice


@pytest.mark.parametrize(
    ("name", "broken", "status", "said"), CASES, ids=[f"{n}-{case[0]}-{case[2]}" for n, case in enumerate(CASES)]
)
def test_what_is_wrong_is_found_and_said(
    node: Node, machine: FakeMachine, name: str, broken: Break, status: Status, said: str
) -> None:
    broken(machine, node)
    found = command.result(node, CHECKS[name])
    assert found.status == status, found
    assert said in f"{found.found} → {found.advice}"
    assert bool(found.advice) == (status in ("warn", "fail")), "what is wrong comes with what to change"


def test_every_check_was_seen_failing() -> None:
    seen = {name for name, _, status, _ in CASES if status in ("warn", "fail")}
    assert CHECKS.keys() - seen == REAL | {"kernel-resend"}, "kernel-resend never fails"


def test_a_machine_that_refuses_everything_breaks_no_check(node: Node, machine: FakeMachine) -> None:
    """What a user without rights sees: skips, not tracebacks."""
    refused = PermissionError(13, "Permission denied", "/secret")
    for table in (machine.texts, machine.entries, machine.directories, machine.digests, machine.peers, machine.answers):
        for key in table:
            table[key] = refused
    machine.streams = dict.fromkeys(machine.streams, refused)
    found = {check.id: result.status for check, result in command.examine(node)}
    assert "fail" not in found.values(), found
