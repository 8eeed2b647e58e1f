"""A machine made of dictionaries: healthy to begin with, until a test breaks something."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snapshotter import __version__, control
from snapshotter.cli.doctor import host
from snapshotter.cli.doctor.check import Node
from snapshotter.config import Config
from snapshotter.mounts.mountinfo import Mount

NOW = 2_000_000_000.0
ROOT, CACHE = Config().root, Config().cache_dir
ADDRESS = Config().address
CONTAINERD = "/etc/containerd/config.toml"
SOCKET = "/run/containerd/containerd.sock"
BOOTSTRAP = "sha256:" + "b" * 64
IMAGE = {"id": 3, "reference": "registry/app@sha256:…", "bootstrap": BOOTSTRAP}
CONFIG_1 = f"""
version = 2
[proxy_plugins.coco]
  type = "snapshot"
  address = "{ADDRESS}"
  [proxy_plugins.coco.exports]
    root = "{ROOT}"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "coco"
  disable_snapshot_annotations = false
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
CONFIG_2 = f"""
version = 3
[proxy_plugins.coco]
  type = "snapshot"
  address = "{ADDRESS}"
  [proxy_plugins.coco.exports]
    root = "{ROOT}"
    enable_remote_snapshot_annotations = "true"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "coco"
  disable_snapshot_annotations = false
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux/amd64"
  snapshotter = "overlayfs"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux/amd64"
  snapshotter = "coco"
"""
UNIT = "[Service]\nExecStart=/usr/local/bin/coco-snapshotter serve\nKillMode=process\n"


def entry(kind: int = stat.S_IFREG, mode: int = 0o600, uid: int = 0, mtime: float = NOW - 5000) -> os.stat_result:
    return os.stat_result((kind | mode, 0, 0, 1, uid, 0, 0, mtime, mtime, mtime))


def space(free: int = 1 << 40, total: int = 1 << 41, free_inodes: int = 10**6) -> os.statvfs_result:
    blocks, free_blocks, inodes = total >> 12, free >> 12, 10**6
    return os.statvfs_result((4096, 4096, blocks, free_blocks, free_blocks, inodes, free_inodes, free_inodes, 0, 255))


def erofs_mount(number: int) -> Mount:
    return Mount(100, "0:50", "/", f"{ROOT}/snapshots/{number}/mnt", "erofs", "none", "ro")


class FakeMachine:
    """Answers from its attributes; an exception in one of them is raised."""

    def __init__(self) -> None:
        self.uid = 0
        self.release = "6.18.44-cloud"
        self.texts: dict[str, Any] = {
            "/proc/filesystems": "nodev\tfuse\n\terofs\nnodev\toverlay\n",
            "/proc/swaps": "Filename Type Size Used Priority\n",
            CONTAINERD: CONFIG_1,
            f"{host.UNITS[0]}/coco-snapshotter.service": UNIT,
        }
        self.entries: dict[str, Any] = {
            "/dev/fuse": entry(stat.S_IFCHR),
            "/dev/loop-control": entry(stat.S_IFCHR),
            CACHE: entry(stat.S_IFDIR, 0o700),
            ADDRESS: entry(stat.S_IFSOCK),
            CONTAINERD: entry(mtime=NOW - 9000),
            host.__file__: entry(),
        }
        self.directories: dict[str, Any] = {
            host.UNITS[0]: ["coco-snapshotter.service"],
            ROOT: ["metadata.db", "snapshots"],
            f"{ROOT}/snapshots": ["2", "3"],
        }
        self.digests: dict[str, Any] = {f"{CACHE}/bootstraps/{'b' * 64}": BOOTSTRAP}
        self.spaces: dict[str, os.statvfs_result] = {}
        self.mounted = [erofs_mount(3)]
        self.namespaces = {0: "mnt:[1]", 11: "mnt:[1]", 50: "mnt:[1]"}
        self.peers: dict[str, Any] = {SOCKET: 50, ADDRESS: 11}
        self.named: dict[str, list[int]] = {"containerd": [50]}
        self.outputs: dict[tuple[str, ...], str] = {
            ("containerd", "--version"): "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1",
            ("ctr", "--address", SOCKET, "plugins", "ls"): "io.containerd.snapshotter.v1  coco  -  ok\n",
        }
        self.answers: dict[str, Any] = {
            "keeper": {"version": __version__, "pids": {"keeper": 10, "snapshotd": 11, "blobd": 12}},
            "snapshotd": {"version": __version__, "mode": "open", "cache_dir": CACHE, "address": ADDRESS},
            "blobd": {"version": __version__, "images": [{"id": 3}], "counters": {"reads": 7}},
        }
        self.streams: dict[tuple[str, str], Any] = {
            ("snapshotd", "images"): [{"image": IMAGE}],
            ("snapshotd", "snapshots"): [{"snapshots": [{"id": 2}, {"id": 3}]}],
        }
        self.locks = {"snapshotd": 11, "blobd": 12}
        self.reachable: set[tuple[str, int]] = set()
        self.time = NOW
        self.synchronised = True

    def silence(self) -> None:
        """Nothing of ours runs."""
        self.answers, self.streams, self.locks, self.mounted = {}, {}, {}, []
        del self.entries[ADDRESS], self.peers[ADDRESS]

    def use_2x(self, text: str = CONFIG_2, version: str = "v2.4.2") -> None:
        self.texts[CONTAINERD] = text
        self.outputs["containerd", "--version"] = f"containerd github.com/containerd/containerd/v2 {version} abc"

    def read(self, path: Path | str) -> str:
        return str(_found(self.texts, path))

    def digest(self, path: Path) -> str:
        return str(_found(self.digests, path))

    def status(self, path: Path | str) -> os.stat_result:
        found: os.stat_result = _found(self.entries, path)
        return found

    def names(self, path: Path | str) -> list[str]:
        return list(_found(self.directories, path))

    def space(self, path: Path | str) -> os.statvfs_result:
        return self.spaces.get(str(path), space())

    def mounts(self) -> list[Mount]:
        return self.mounted

    def mount_namespace(self, pid: int) -> str:
        return self.namespaces[pid]

    def peer(self, path: Path | str) -> int:
        return int(_found(self.peers, path))

    def processes(self, name: str) -> list[int]:
        return self.named.get(name, [])

    def started(self, pid: int) -> float:
        return NOW - 7000

    def output(self, *command: str) -> str | None:
        return self.outputs.get(command)

    def ask(self, path: str, message: control.Message) -> control.Message:
        found: control.Message = _found(self.answers, Path(path).stem)
        return found

    def stream(self, path: str, message: control.Message) -> Iterator[control.Message]:
        found = self.streams.get((Path(path).stem, message["op"]), FileNotFoundError(errno.ENOENT, "no socket"))
        if isinstance(found, BaseException):
            raise found
        return iter(found)

    def lock_holder(self, path: str) -> int | None:
        return self.locks.get(Path(path).stem)

    def connect(self, host: str, port: int) -> None:
        if (host, port) not in self.reachable:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    def now(self) -> float:
        return self.time

    def clock_is_synchronised(self) -> bool:
        return self.synchronised


def _found(table: dict[str, Any], key: Path | str) -> Any:
    found = table.get(str(key), FileNotFoundError(errno.ENOENT, "No such file or directory", str(key)))
    if isinstance(found, BaseException):
        raise found
    return found


Break = Callable[[FakeMachine, Node], object]
