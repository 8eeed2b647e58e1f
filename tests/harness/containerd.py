"""A private containerd of any version with our daemon as proxy plugin, and `ctr` on it.

Nothing of the system's containerd is touched.
"""

import copy
import itertools
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Self

import grpc

from tests.harness.cri import Cri
from tests.harness.machine import Work, until
from tests.harness.process import Process
from tests.harness.releases import DEBIAN, Layout, Release

PLUGIN = "coco"
NAMESPACE = "k8s.io"


class Containerd:
    """A running containerd. `snapshotter` is what CRI pulls with; `plugins` are sockets of snapshotters.

    `layout` may set the other fields of `releases.Layout`.
    """

    def __init__(
        self,
        work: Work,
        name: str,
        *,
        snapshotter: str = PLUGIN,
        plugins: Mapping[str, Path] | None = None,
        release: Release = DEBIAN,
        **layout: Any,
    ) -> None:
        home = work.directory(name)
        for part in ("cni", "certs.d", "fifo", "opt"):
            (home / part).mkdir()
        self.home = home
        self.layout = Layout(home, snapshotter, plugins or {}, **layout)
        self.namespace = NAMESPACE
        self.environment = work.environment | {"PATH": release.path}
        self._numbers = itertools.count(1)
        self._label = name
        self._work = work
        (home / "config.toml").write_text(release.config(self.layout))
        self.start_daemon()

    def start_daemon(self) -> None:
        """Again after `process.stop()`, with the state that it has kept."""
        command: list[str | Path] = ["containerd", "-c", self.home / "config.toml"]
        self.process = Process(self._work, self._label, command, environment={"PATH": self.environment["PATH"]})
        self.process.wait_until(lambda: self.try_ctr("version").returncode == 0, "ctr version answers")
        self.cri = Cri(self.layout.socket)
        self._work.stack.callback(self.cri.close)
        self.process.wait_until(self._cri_answers, "its CRI plugin answers")
        self._work.stack.callback(self._remove_all_containers)

    def _cri_answers(self) -> bool:
        try:
            return bool(self.cri.version())
        except grpc.RpcError:
            return False

    # ctr

    def within(self, namespace: str, snapshotter: str = PLUGIN) -> Self:
        """The same daemon, asked about another namespace and snapshotter."""
        other = copy.copy(self)
        other.namespace = namespace
        other.layout = replace(self.layout, snapshotter=snapshotter)
        return other

    def command(self, *arguments: str) -> list[str]:
        return ["ctr", "-a", str(self.layout.socket), "-n", self.namespace, *arguments]

    def try_ctr(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, errors="replace", timeout=timeout,
            env=self.environment, check=False,
        )  # fmt: skip

    def ctr(self, *arguments: str, timeout: float = 120) -> str:
        """Standard output of a ctr command; raises with its error text when it fails."""
        result = self.try_ctr(*arguments, timeout=timeout)
        if result.returncode:
            raise RuntimeError(f"ctr {' '.join(arguments[:3])}: {result.returncode}: {result.stderr.strip()[-2000:]}")
        return result.stdout

    def run_command(self, identity: str, reference: str, command: Sequence[str], *options: str) -> list[str]:
        """The command line of `ctr run --rm` for a new container."""
        return self.command(
            "run", "--rm", "--fifo-dir", str(self.home / "fifo"), "--runc-root", str(self.home / "runc"),
            "--snapshotter", self.layout.snapshotter, *options, reference, identity, *command,
        )  # fmt: skip

    def new_identity(self) -> str:
        return f"{self._label}-{next(self._numbers)}"

    def run(
        self, reference: str, *command: str, options: Sequence[str] = (), timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a new container of an image that is here, and remove the container. See `logged`."""
        identity = self.new_identity()
        with self.logged(identity) as (to_log, read):
            result = subprocess.run(
                self.run_command(identity, reference, command, *to_log, *options), capture_output=True, text=True,
                errors="replace", timeout=timeout, env=self.environment, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            result.stdout = read()
        return result

    @contextmanager
    def logged(self, name: str) -> Iterator[tuple[Sequence[str], Callable[[], str]]]:
        """Options of ctr that have what a process writes put into a file, and what reads it.

        The pipes of ctr lose all of it when the process has ended before ctr has come to open them. Of standard error
        the end may be missing: the shim closes the file as soon as standard output has ended.
        """
        log = self.home / f"{name}.log"
        try:
            yield ("--log-uri", f"file://{log}"), lambda: log.read_text(errors="replace") if log.exists() else ""
        finally:
            log.unlink(missing_ok=True)

    def start(self, reference: str, *command: str, options: Sequence[str] = ()) -> "Container":
        """Start a container and leave it running."""
        return Container(self, reference, command, options)

    def snapshots(self, snapshotter: str | None = None) -> dict[str, tuple[str, str]]:
        """key → (parent, kind) as containerd sees them."""
        rows = self.ctr("snapshots", "--snapshotter", snapshotter or self.layout.snapshotter, "ls").splitlines()[1:]
        found = {}
        for row in rows:
            fields = row.split()
            found[fields[0]] = (fields[1] if len(fields) == 3 else "", fields[-1])
        return found

    def wait_connected(self) -> None:
        """Until containerd reaches its snapshotter again: it redials with up to 3 s in between.

        A listing shows it only where containerd knows of a snapshot; otherwise it asks nobody, and one is made.
        """
        key, named = self.new_identity(), ("snapshots", "--snapshotter", self.layout.snapshotter)

        def reached() -> bool:
            listed = self.try_ctr(*named, "ls")
            if listed.returncode or listed.stdout.count("\n") > 1:
                return listed.returncode == 0
            return self.try_ctr(*named, "prepare", key).returncode == 0

        until(reached, "containerd reaches the snapshotter")
        self.try_ctr(*named, "rm", key)

    @contextmanager
    def view(self, top: str, target: Path) -> Iterator[Path]:
        """Mount a read-only view of the committed snapshot `top` at `target`, as containerd is told to mount it."""
        key = self.new_identity()
        named = ("snapshots", "--snapshotter", self.layout.snapshotter)

        def pinned() -> bool:  # until it is a root, a collection that the pull has caused may take the view
            self.try_ctr(*named, "view", key, top)
            return self.try_ctr(*named, "label", key, "containerd.io/gc.root=view").returncode == 0

        until(pinned, f"a view of {top}", 10)
        try:
            subprocess.run(["sh", "-ec", self.ctr(*named, "mounts", str(target), key)], check=True)
            try:
                yield target
            finally:
                subprocess.run(["umount", str(target)], check=True)
        finally:
            self.ctr(*named, "rm", key)

    def content(self) -> set[str]:
        """Digests in the content store: what containerd itself has downloaded."""
        return set(self.ctr("content", "ls", "-q").split())

    def remove_containers(self) -> None:
        """Kill and remove every container of the namespace."""
        for identity in self.ctr("containers", "ls", "-q").split():
            self.try_ctr("tasks", "rm", "-f", identity)
            self.try_ctr("containers", "rm", identity)

    def _remove_all_containers(self) -> None:
        """So that shims end and overlay mounts go."""
        if self.process.running:
            for namespace in self.ctr("namespaces", "ls", "-q").split():
                self.within(namespace).remove_containers()

    def remove_image(self, reference: str) -> None:
        """Remove an image and wait until garbage collection has removed its snapshots and content."""
        self.cri.remove(reference)
        self.try_ctr("images", "rm", "--sync", reference)
        self.collect_garbage()

    def collect_garbage(self) -> None:
        """Run containerd's collector and wait for it: removing a lease with --sync does that."""
        self.try_ctr("leases", "create", "--id", "gc-now", "--expires", "1s")
        self.try_ctr("leases", "rm", "--sync", "gc-now")

    def wait_for_no_snapshots(self, timeout: float = 30) -> None:
        until(lambda: not self.snapshots(), f"{self._label}: all snapshots are collected", timeout)


class Container:
    """A running container; its standard output can be read as it comes. `kill()` ends and removes it."""

    def __init__(self, daemon: Containerd, reference: str, command: Sequence[str], options: Sequence[str]) -> None:
        self._daemon = daemon
        self._execs = itertools.count(1)
        self.identity = daemon.new_identity()
        self.process = subprocess.Popen(
            daemon.run_command(self.identity, reference, command, *options), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=daemon.environment,
        )  # fmt: skip

    @property
    def stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def wait_running(self, timeout: float = 60) -> None:
        """Not only created, when its first process is still runc's. What does not run in time is killed."""

        def running() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"container {self.identity} ended: {self.stdout.read()[-2000:]}")
            tasks = (line.split() for line in self._daemon.ctr("tasks", "ls").splitlines())
            return any(task[0] == self.identity and task[2] == "RUNNING" for task in tasks)

        try:
            until(running, f"container {self.identity} runs", timeout)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Its first process, as this machine numbers it."""
        lines = (line.split() for line in self._daemon.ctr("tasks", "ls").splitlines())
        return next(int(line[1]) for line in lines if line[0] == self.identity)

    def exec(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command inside and return its result; see `logged`."""
        name = f"exec-{next(self._execs)}"
        with self._daemon.logged(f"{self.identity}-{name}") as (to_log, read):
            result = self._daemon.try_ctr("tasks", "exec", *to_log, "--exec-id", name, self.identity, *command,
                                          timeout=timeout)  # fmt: skip
            result.stdout = read()
        return result

    def kill(self) -> None:
        """SIGKILL the container and wait until `ctr run` has removed it."""
        if self.process.poll() is None:
            self._daemon.try_ctr("tasks", "kill", "-s", "SIGKILL", self.identity)
        self.process.wait(30)
        self.stdout.close()
