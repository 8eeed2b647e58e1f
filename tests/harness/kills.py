"""A node whose processes are killed at named points, and the invariants that must hold afterwards.

One daemon (three processes), one containerd, one registry, and a container that reads sealed files and writes its own
all the time, each byte verified by fio. `Stage.kill` arms a point, does the operation that reaches it, restarts what a
service manager would restart, does the operation again, and checks everything that can be seen from outside.
"""

import fcntl
import itertools
import os
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from snapshotter import control
from snapshotter.digest import Digest
from snapshotter.failpoints import POINTS, VARIABLE
from snapshotter.snapshots.model import Kind
from tests.conformance.client import Client
from tests.harness import oci, serve, tiny
from tests.harness.containerd import PLUGIN, Containerd
from tests.harness.machine import Work, alive, loops, mounts, until
from tests.harness.oci import member
from tests.harness.registry import Registry
from tests.harness.serve import WORKERS, Serve

FILES, FILE_BYTES = 6, 256 << 10
# What `Stage` can do, and the state in which some of it begins.
OPERATIONS = (
    "pull", "start", "remove", "unpack", "decrypt", "label", "read", "restart_snapshotd", "restart_blobd",
    "restart_keeper", "reload", "stop", "lose_database", "lose_log", "lose_directory",
)  # fmt: skip
CALLS = ("pull", "start", "remove", "unpack", "decrypt", "label", "read")  # which restart nothing themselves
STATES = {"pull": "absent", "start": "pulled", "remove": "mounted", "unpack": "absent", "decrypt": "absent"}
_LOOP_GET_STATUS64, _LOOP_INFO64 = 0x4C05, 232
# One round of the container's work: sealed files read in random order past the page cache, own files written and read
# back. fio comes from the machine; its verify headers are in the image's files.
_ROUND = """
[global]
verify=crc32c
verify_fatal=1
invalidate=1
randrepeat=0
thread=1
disk_util=0
[sealed]
rw=randread
bs=16k
filename={names}
time_based=1
runtime={milliseconds}ms
rate_iops=150
[own]
rw=randwrite
bs=16k
size=1m
filename=/w/file
do_verify=1
"""
_ROUNDS = "n=0; while :; do if fio /w/job --output=/w/out; then n=$((n+1)); echo ok $n; else echo BAD; fi; done"


def verified_members(directory: Path) -> list[tiny.Member]:
    """Files full of blocks that say where they belong, with checksums: what `fio --verify` can check by itself."""
    found: list[tiny.Member] = [(member("fio/"), b"")]
    for number in range(FILES):
        path = directory / f"fio-{number}"
        subprocess.run(
            ["fio", "--name=lay", "--rw=write", "--bs=16k", f"--size={FILE_BYTES}", "--verify=crc32c", "--do_verify=0",
             f"--filename={path}", f"--randseed={number + 1}", "--output=/dev/null"],
            check=True, cwd=directory,
        )  # fmt: skip
        found.append((member(f"fio/{number}"), path.read_bytes()))
        path.unlink()
    return found


class Worker:
    """The container that works all the time; a thread follows what it says."""

    def __init__(self, stage: "Stage", seconds: float) -> None:
        shared = stage.work.directory("fio")
        names = ":".join(f"/fio/{number}" for number in range(FILES))
        (shared / "job").write_text(_ROUND.format(names=names, milliseconds=int(seconds * 1000)))
        binds = [f"type=bind,src={path.resolve()},dst={path},options=rbind:ro" for path in map(Path, _HOST)]
        binds.append(f"type=bind,src={shared / 'job'},dst=/w/job,options=bind:ro")
        self.container = stage.containerd.start(
            stage.app, "/bin/sh", "-c", _ROUNDS, options=[part for bind in binds for part in ("--mount", bind)]
        )
        self.rounds = 0
        self._said: deque[str] = deque(maxlen=20)
        self._failed = False
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        with suppress(ValueError):  # closed when the container is killed
            for line in self.container.stdout:
                if line.startswith("ok "):
                    self.rounds = int(line.split()[1])
                elif line.startswith("BAD"):
                    self._failed = True
                else:
                    self._said.append(line.strip())
        self._failed = True

    def advance(self, count: int = 1, timeout: float = 60) -> None:
        """Wait for `count` more rounds; a failed or wrong read or write is an AssertionError."""
        goal = self.rounds + count
        until(lambda: self.rounds >= goal or self._failed, f"{count} more rounds of the container", timeout)
        if self._failed:
            raise AssertionError(f"after {self.rounds} rounds the container fails: {list(self._said)}")


_HOST = ("/usr", "/lib", "/lib64")  # of this machine, for fio and its libraries


@dataclass(frozen=True)
class Pulled:
    """An image on the registry and what is in it."""

    reference: str
    seed: int


class Stage:
    """See above. `round_seconds` is how long the container reads in one round; `settings` go into the configuration."""

    def __init__(self, work: Work, *, round_seconds: float = 0.3, settings: dict[str, Any] | None = None) -> None:
        self.work = work
        self.armed = work.directory("armed")
        self._round_seconds = round_seconds
        self.registry = Registry(work)
        key, public = serve.key_pair(work.path)
        layout = oci.Layout(work.path / "layout")

        def publish(name: str, seed: int, *extra: list[tiny.Member], sealed: bool = True) -> Pulled:
            made = tiny.layout(layout.path / name, seed=seed, extra=extra)
            target = f"docker://{self.registry.address}/t/{name}:1"
            if sealed:
                digest = serve.convert(work, f"oci:{made.path}:tiny", target, "--recipient", f"jwe:{public}")
            else:
                digest = self.registry.push(made.path, "tiny", f"t/{name}", "1")
            return Pulled(f"{self.registry.address}/t/{name}@{digest}", seed)

        self.app = publish("app", 1, verified_members(work.path)).reference
        self.other = publish("other", 2)
        self.ordinary = publish("ordinary", 3, sealed=False)
        self.encrypted = self._encrypted(public)
        self.daemon = Serve(
            work,
            # The working set does not fit, so that the cache writes and evicts all the time.
            settings={"keys": {"files": [str(key)]}, "cache": {"quota": FILES * FILE_BYTES * 2 // 3}}
            | (settings or {}),
            environment={VARIABLE: f"keeper.no-delay:on,@{self.armed}"},
        )
        self.containerd = Containerd(work, "c", plugins={PLUGIN: self.daemon.address})
        self.client = Client(self.daemon.address, PLUGIN, namespace="k8s.io")
        work.stack.callback(self.client.close)
        self.containerd.cri.pull(self.app)
        self.worker = Worker(self, round_seconds)
        work.stack.callback(lambda: self.worker.container.kill())
        self.worker.advance()
        self._app_snapshots = self.containerd.snapshots()
        self._labels = itertools.count()

    # operations: each can be done again after it was cut short

    def pull(self) -> None:
        self.containerd.cri.pull(self.other.reference)

    def start(self) -> None:
        self._run(self.other)

    def remove(self) -> None:
        """Until nothing of the images is left: containerd's collector and then our clean-up have done their work."""
        self.containerd.remove_image(self.other.reference)
        self.containerd.remove_image(self.ordinary.reference)
        self.containerd.remove_image(self.encrypted)
        until(self._forgotten, "nothing is left of the image")

    def unpack(self) -> None:
        self.containerd.cri.pull(self.ordinary.reference)

    def decrypt(self) -> None:
        self.containerd.cri.pull(self.encrypted)

    def label(self) -> None:
        top = next(info for info in self.client.walk() if info.kind is Kind.COMMITTED)
        label = "containerd.io/snapshot/note"
        self.client.update(top.name, {label: str(next(self._labels))}, f"labels.{label}")

    def read(self) -> None:
        self.worker.advance(2)

    def restart_snapshotd(self) -> None:
        self._restart("snapshotd")

    def restart_blobd(self) -> None:
        self._restart("blobd")

    def restart_keeper(self) -> None:
        self._restart("keeper")

    def lose_session(self) -> None:
        """The one loss: what runs gets EIO, but what comes must work."""
        self._restart("keeper", "blobd")

    def _restart(self, *names: str) -> None:
        old = self.pids()
        assert all(old.values())
        for name in names:
            os.kill(old[name], signal.SIGKILL)
        for name in names:
            until(lambda pid=old[name]: not alive(pid), f"{name} ends", 10)  # type: ignore[misc]
        self.recover()
        assert not {old[name] for name in names} & set(self.pids().values())

    def reload(self) -> None:
        old = self.pids()
        os.kill(old["keeper"], signal.SIGHUP)

        def over() -> bool:  # or the keeper was killed at it
            return not alive(old["keeper"]) or not (alive(old["snapshotd"]) or alive(old["blobd"]))

        until(over, "the workers end", 60)
        self.recover()

    def stop(self) -> None:
        """A stop and a start, with an image in use."""
        assert self.daemon.process is not None
        self.daemon.process.signal(signal.SIGTERM)
        self.daemon.process.wait(20)
        self.recover()

    def lose_database(self) -> None:
        """All of it is garbage, also what was written last."""
        for name in ("metadata.db", "metadata.db-wal"):
            with (self.daemon.root / name).open("r+b") as file:
                file.write(b"garbage" * 1000)
        self.restart_snapshotd()

    def lose_log(self) -> None:
        """The database is whole, but does not know the newest snapshots."""
        with closing(sqlite3.connect(self.daemon.root / "metadata.db")) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        keys = [f"log-{next(self._labels)}" for _ in range(2)]
        for key in keys:
            self.client.prepare(key)
        for log in self.daemon.root.glob("metadata.db-[ws]*"):
            log.unlink()
        self.restart_snapshotd()
        for key in keys:
            self.client.mounts(key)
            self.client.remove(key)

    def lose_directory(self) -> None:
        """Of a data layer, which has nothing in it but its sidecar."""
        with closing(self._database()) as database:
            query = "SELECT min(id) FROM snapshot WHERE ref IS NOT NULL AND id NOT IN (SELECT id FROM image)"
            (number,) = database.execute(query).fetchone()
        shutil.rmtree(self.daemon.root / f"snapshots/{number}")
        self.restart_snapshotd()

    # states in which an operation has something to do

    def absent(self) -> None:
        """Neither image is here, nor anything of them in the cache."""
        self.remove()
        shutil.rmtree(self.daemon.cache, ignore_errors=True)

    def pulled(self) -> None:
        if len(self.daemon.images_mounted()) > 1:
            self.absent()
        self.pull()

    def mounted(self) -> None:
        self.pull()
        self.start()

    # killing

    def kill(
        self, operation: str, points: Mapping[str, int], *, thorough: bool = True, patience: float = 40
    ) -> list[str]:
        """Do an operation until whoever comes to each point is killed there; recover; do it whole; check everything.

        `points` says how many hits pass before the kill. Returns those that were come to within `patience` seconds: one
        kill may keep the system from the next.
        """
        if operation in STATES:
            getattr(self, STATES[operation])()
        perform: Callable[[], None] = getattr(self, operation)
        for point, passes in points.items():
            self._arm(point, passes)
        done = False
        watched = self._service_manager() if operation in CALLS else nullcontext()
        with (
            suppress(RuntimeError, AssertionError, grpc.RpcError, subprocess.SubprocessError, OSError, EOFError),
            watched,
        ):
            perform()
            done = True
        hits = {point: self.armed / f"{point}.hit" for point in points}

        def reached() -> bool:
            self._revive()  # what starts again may be killed again
            return all(hit.exists() for hit in hits.values())

        with suppress(TimeoutError):
            until(reached, "every point", patience)
        for point in points:
            (self.armed / point).unlink(missing_ok=True)
        found = [point for point, hit in hits.items() if hit.exists()]
        for point in found:
            hits[point].unlink()
        self.recover()
        if not done:
            perform()
        self.check(thorough)
        return found

    def hits(self, operation: str) -> dict[str, int]:
        """How often an operation comes to each point."""
        many = 100_000
        if operation in STATES:
            getattr(self, STATES[operation])()
        armed = [self._arm(name, many) for names in POINTS.values() for name in names]
        getattr(self, operation)()
        counts = {path.name: many - path.stat().st_size for path in armed}
        for path in armed:
            path.unlink()
        return {name: count for name, count in counts.items() if count}

    def _arm(self, point: str, passes: int) -> Path:
        """In one step: an empty file kills."""
        new = self.armed / "new"
        new.write_bytes(b"." * passes)
        return new.rename(self.armed / point)

    def renew_worker(self) -> None:
        """After the session was lost."""
        self.worker.container.kill()
        self.worker = Worker(self, self._round_seconds)
        self.worker.advance()
        self._app_snapshots = self.containerd.snapshots()

    def recover(self) -> None:
        """Wait until all three processes answer, and containerd reaches them."""

        def answers() -> bool:
            self._revive()
            return self._answers()

        until(answers, "all processes answer", 60)
        self.containerd.wait_connected()

    def _revive(self) -> None:
        """Start a keeper if there is none, as a service manager would."""
        assert self.daemon.process is not None
        if not self.daemon.process.running:
            self.daemon.spawn()

    @contextmanager
    def _service_manager(self) -> Iterator[None]:
        """Revive at once inside: calls wait for a keeper that is away."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                self._revive()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def pids(self) -> dict[str, int]:
        return dict(control.request(self.daemon.root / "keeper.sock", {"op": "status"})[0]["pids"])

    def _answers(self) -> bool:
        with suppress(OSError, EOFError):
            pids = self.pids()
            return all(
                alive(pids[name]) and (name == "keeper" or self._ask(name)["pid"] == pids[name]) for name in WORKERS
            )
        return False

    def _ask(self, name: str) -> control.Message:
        return control.request(self.daemon.root / f"{name}.sock", {"op": "status"}, timeout=2)[0]

    # invariants

    def check(self, thorough: bool = True) -> None:
        self.worker.advance()
        self.client.cleanup()
        self._check_directories()
        self._check_images()
        self._check_containerd()
        if not thorough:
            return
        result = self.containerd.run(self.app, "/bin/cat", "/data/small")
        assert result.stdout == "small 1\n", f"a new container ends with {result.returncode}: {result.stderr}"

    def _check_directories(self) -> None:
        """Every snapshot has its directory, and there are no others."""

        def agree() -> bool:  # a clean-up that a start began may still be at it
            with closing(self._database()) as database:
                ids = {str(number) for (number,) in database.execute("SELECT id FROM snapshot")}
            self.names = set(os.listdir(self.daemon.root / "snapshots")), ids
            return self.names[0] == ids

        with suppress(TimeoutError):
            until(agree, "directories and database agree", 5)
        present, known = self.names
        assert present == known, f"directories without a row: {present - known}, rows without one: {known - present}"

    def _check_images(self) -> None:
        """What is mounted is attached, what is attached is held by the keeper and known; no loop device is left."""
        held, _ = control.fetch_all(self.daemon.root / "keeper.sock", {"op": "list"})
        try:
            kept = {int(name[6:]) for name in held if name.startswith("image-")}
            session = os.fstat(held["fuse-root"]).st_dev
        finally:
            control.close_all(held.values())
        served = {image["id"] for image in self._ask("blobd")["images"]}
        mounted = {int(Path(point).parent.name) for point in self.daemon.images_mounted()}
        with closing(self._database()) as database:
            known = {number for (number,) in database.execute("SELECT id FROM image")}
        assert mounted <= served == kept <= known, f"mounted {mounted}, blobd {served}, keeper {kept}, known {known}"
        stacked = [mount.target for mount in mounts() if mount.target.startswith(f"{self.daemon.root}/")]
        assert len(stacked) == len(set(stacked)), f"mounted twice: {stacked}"
        until(lambda: len(self._loops(session)) <= self._loops_wanted(len(mounted)), "loop devices are gone", 5)

    def _loops_wanted(self, images: int) -> int:
        return 4 * images if "loop" in self.daemon.config.read_text() else 0

    def _loops(self, session: int) -> list[str]:
        """Loop devices on files of our FUSE session."""
        found = []
        for device in loops():
            with suppress(OSError), open(device, "rb") as file:
                info = fcntl.ioctl(file, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64))
                if struct.unpack_from("<Q", info)[0] == session:
                    found.append(device)
        return found

    def _check_containerd(self) -> None:
        """containerd's own view is served: what it has of the running container is there, and every mount is."""
        seen = self.containerd.snapshots()
        assert self._app_snapshots.items() <= seen.items(), f"containerd misses {self._app_snapshots.keys() - seen}"
        points = {mount.target for mount in mounts()}
        for info in self.client.walk():
            if info.kind is not Kind.COMMITTED:
                for option in self._options(info.name):
                    for lower in re.findall(r"[^:=,]+/mnt\b", option):
                        assert lower in points, f"{info.name}: {lower} is not mounted"

    def _options(self, key: str) -> list[str]:
        """Of a snapshot's mounts; none if containerd's collector has removed it meanwhile."""
        try:
            return [option for mount in self.client.mounts(key) for option in mount.options]
        except grpc.RpcError:
            if key in {info.name for info in self.client.walk()}:
                raise
            return []

    def _database(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{self.daemon.root}/metadata.db?mode=ro", uri=True)

    # details

    def _encrypted(self, public: Path) -> str:
        """The ordinary image with each of its layers encrypted as a whole, by skopeo."""
        where = f"docker://{self.registry.address}/t/ordinary"
        subprocess.run(
            ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false",
             "--encryption-key", f"jwe:{public}", f"{where}:1", f"{where}:encrypted"],
            check=True, capture_output=True, timeout=100,
        )  # fmt: skip
        raw, _ = self.registry.get_manifest("t/ordinary", "encrypted")
        return f"{self.registry.address}/t/ordinary@{Digest.of(raw)}"

    def _run(self, image: Pulled) -> None:
        result = self.containerd.run(image.reference, "/bin/cat", "/data/small")
        assert result.stdout == f"small {image.seed}\n", f"{result.stdout[-300:]} {result.stderr[-900:]}"

    def _forgotten(self) -> bool:
        self.containerd.collect_garbage()
        self.client.cleanup()
        if len(self.client.walk()) == len(self._app_snapshots):
            return True
        # A collection that failed is not repeated before another snapshot of this snapshotter is removed.
        named = ("snapshots", "--snapshotter", PLUGIN)
        self.containerd.try_ctr(*named, "prepare", "nudge")
        self.containerd.try_ctr(*named, "rm", "nudge")
        return False
