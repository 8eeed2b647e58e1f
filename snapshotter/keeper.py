"""The keeper: parent of snapshotd and blobd, and holder of every descriptor that must outlive them.

What `serve` becomes. It restarts the workers, hands its descriptors to each new one, and after its own death takes them
back from blobd's duplicates. It trusts only root on this machine, parses nothing from outside, and needs nothing but
the standard library. Its flags are the workers' flags; of these it reads --root and --address.

A reload never bets the descriptors on a program that has not been seen to run. What is installed is first tried in a
child. Then this process becomes the new keeper while the old workers, and with them the duplicates, live on; it is the
new one that replaces them. Should it die instead, its successor adopts them like after any other death.
"""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator

from snapshotter import __version__, control, failpoints, memory, oom
from snapshotter.loop import SIGNALS, Loop
from snapshotter.mounts.syscalls import open_fuse_session
from snapshotter.notify import Systemd
from snapshotter.watchdog import Watchdog
from snapshotter.workers import Trial, Worker, log

MODULES = {"blobd": "snapshotter.ondemand.blobd", "snapshotd": "snapshotter.daemon"}
HELD = re.compile(r"image-[0-9]{1,13}|logins")
STOP = (signal.SIGTERM, signal.SIGINT)
# Environment of the re-executed keeper, JSON: the store and the lock {name: fd}, living workers {name: [pid, pidfd]}.
HANDOVER, HANDED_WORKERS = "COCO_KEEPER_HANDOVER", "COCO_KEEPER_WORKERS"
DRAIN_SECONDS, LEAVE_SECONDS, RELOAD_SECONDS = 7.0, 2.0, 5.0  # SIGTERM: snapshotd, then blobd; SIGHUP: both


class Keeper:
    """`commands` maps each worker to its argv; `trial` is a command that fails if what is installed cannot serve here.

    `root` and `address` are absolute paths, `root` exists.
    """

    def __init__(self, root: str, address: str, commands: dict[str, list[str]], trial: list[str]) -> None:
        self.root, self.address = root, address
        self.blobd = Worker("blobd", commands["blobd"], root)
        self.snapshotd = Worker("snapshotd", commands["snapshotd"], root)
        self.workers = [self.blobd, self.snapshotd]
        self.holder = 0  # pid of a blobd that holds everything and waits for the one that serves
        self.loop = Loop()
        self.watchdog, self.systemd = Watchdog(self.workers, self.loop), Systemd()
        self.trial = Trial(trial)

    def run(self) -> int:
        """Keep until SIGTERM or SIGINT; the exit status. Raises BlockingIOError if another keeper has the root."""
        handover, living = (json.loads(os.environ.pop(name, "{}")) for name in (HANDOVER, HANDED_WORKERS))
        for fd in [*handover.values(), *(pidfd for _, pidfd in living.values())]:
            os.set_inheritable(fd, False)
        self.lock = handover.pop("lock", None) or control.take_lock(f"{self.root}/lock")
        failpoints.hit("keeper.took-over" if handover else "keeper.locked")
        self.loop.catch_signals()
        self.store: dict[str, int] = handover or self._recover()
        failpoints.hit("keeper.recovered")
        # Only now: a worker that started without us must not wait for descriptors that we are asking it for.
        self.listener = control.listen(f"{self.root}/keeper.sock")
        self.loop.watch(self.listener, self._accept)
        failpoints.hit("keeper.listens")
        log("info", "keeper runs", pid=os.getpid(), root=self.root, address=self.address, version=__version__)
        self._replace(living)
        while True:
            for worker in self.workers:
                if not worker.pid and worker.due <= time.monotonic() and worker.start():
                    worker.watch(self.loop)
            self.watchdog.step()
            if not self.trial.runs:
                self.systemd.serving([worker.name for worker in self.workers if not worker.ready])
            # While blobd is away its descriptors are here alone: whatever else is wrong, systemd must not kill us.
            self.systemd.alive(well=not self.watchdog.helpless or not self.blobd.ready)
            dead = [worker.due - time.monotonic() for worker in self.workers if not worker.pid]
            pauses = (self.trial.remaining(), self.watchdog.remaining(), self.systemd.remaining())
            self.loop.step(min(*pauses, *dead))
            if not self.trial.runs and self.loop.told(signal.SIGHUP):
                self.loop.forget_signals(signal.SIGHUP)
                log("info", "reload: trying what is installed")
                self.systemd.reloading()
                self.trial.start(self.loop, self._tried)
            if self.loop.told(*STOP):
                return self._shut_down()

    def _recover(self) -> dict[str, int]:
        """Adopt living workers and take back what they hold; make anew what nobody holds."""
        store = self.blobd.adopt({"fuse", "fuse-root", "session", "listen-blobd"}, patience=10)
        failpoints.hit("keeper.blobd-adopted")
        # Clients reach the listener of the living snapshotd; without the old session that one must go.
        served = self.snapshotd.adopt({"listen-grpc"}, patience=10 if store else 0)
        if not store:
            store["fuse"], store["fuse-root"] = open_fuse_session()
            store["session"] = os.memfd_create("session", os.MFD_CLOEXEC)
            store["listen-blobd"] = control.listen(f"{self.root}/blobd.sock").detach()
            log("info", "new FUSE session")
        if "listen-grpc" in store:
            with socket.socket(fileno=store.pop("listen-grpc")) as stale:
                if not served:
                    stale.shutdown(socket.SHUT_RDWR)  # and all its duplicates: clients are refused, not kept waiting
        os.makedirs(os.path.dirname(self.address), 0o755, exist_ok=True)
        store["listen-grpc"] = served.get("listen-grpc") or control.bind(self.address, socket.SOCK_STREAM).detach()
        for worker in self.workers:
            if worker.pid:
                worker.watch(self.loop)
        return store

    def _accept(self) -> None:
        try:
            peer, _ = self.listener.accept()
        except OSError as error:  # out of descriptors: some other connection will end
            log("error", "control connection refused", error=str(error))
            time.sleep(0.1)
        else:
            peer.settimeout(5)
            if control.peer_is_root(peer):
                self.loop.watch(peer, lambda: self._serve(peer))

    def _serve(self, peer: socket.socket) -> None:
        fds: list[int] = []
        try:
            message, fds = control.receive(peer)
            for answer, attached in self._answers(message, fds, control.peer_pid(peer)):
                control.send(peer, answer, attached)
        except (EOFError, OSError):
            self.loop.forget(peer)
            peer.close()
        finally:
            control.close_all(fds)

    def _answers(self, message: control.Message, fds: list[int], pid: int) -> Iterator[control.Reply]:
        op, name = message.get("op"), str(message.get("name"))
        if op == "list":
            failpoints.hit("keeper.lists")
            yield from [({"name": held}, [fd]) for held, fd in self.store.items()]
            yield {"end": True}, ()
        elif HELD.fullmatch(name) and (op, len(fds)) in (("put", 1), ("drop", 0)):
            failpoints.hit("keeper.puts" if op == "put" else "keeper.drops")
            control.close_all([self.store.pop(name)] if name in self.store else [])
            self.store |= {name: fds.pop()} if op == "put" else {}
            failpoints.hit("keeper.put" if op == "put" else "keeper.dropped")
            yield {}, ()
        elif op == "holds":  # a successor of blobd
            self.holder = pid
            yield {}, ()
        elif op == "ready":
            for worker in self.workers:
                if worker.name == name:
                    worker.announced(pid)
            failpoints.hit("keeper.ready")
            yield {}, ()
        elif op == "status":
            pids = {"keeper": os.getpid()} | {worker.name: worker.pid for worker in self.workers}
            counts = {w.name: {"starts": w.starts, "hangs": w.hangs, "ready": w.ready} for w in self.workers}
            yield {"version": __version__, "pids": pids, "workers": counts}, ()
        else:
            yield {"error": f"no such request: {str(op)[:40]} {name[:40]}", "reason": "invalid-argument"}, ()

    def _end(self, workers: list[Worker], number: int, seconds: float) -> None:
        """Signal the workers and serve them until they are gone, `seconds` are over, or we are told to stop (again)."""
        for worker in workers:
            worker.kill(number)
        self.loop.run_while(lambda: any(worker.pid for worker in workers) and not self.loop.told(*STOP), seconds)

    def _shut_down(self) -> int:
        log("info", "shutting down")
        self.systemd.stopping()
        self.loop.forget_signals(*SIGNALS)
        self._end([self.snapshotd], signal.SIGTERM, DRAIN_SECONDS)
        self.snapshotd.kill(signal.SIGKILL)
        failpoints.hit("keeper.stops")
        self._end([self.blobd], signal.SIGTERM, LEAVE_SECONDS)
        if self.loop.told(*STOP):  # a second time
            self.loop.forget_signals(*SIGNALS)
            self._end([self.blobd], signal.SIGINT, LEAVE_SECONDS)
        if self.blobd.pid:
            log("warning", "images are in use: blobd stays and serves them", pid=self.blobd.pid)
        failpoints.hit("keeper.stopped")
        socket.socket(fileno=self.store["listen-grpc"]).shutdown(socket.SHUT_RDWR)
        for path in (self.address, f"{self.root}/keeper.sock"):
            with contextlib.suppress(OSError):  # the next start knows that nobody listens there
                os.unlink(path)
        return 0

    def _tried(self, failure: str | None) -> None:
        """What the trial of the installed program said; None: it can serve."""
        if failure is not None:
            log("error", "reload refused: what is installed cannot serve, going on as before", cause=failure)
        elif not self.loop.told(*STOP):
            self._become_new()

    def _become_new(self) -> None:
        """Become the program that is installed now; pid, lock, descriptors, workers stay. Returns only if it fails."""
        log("info", "reloading")
        failpoints.hit("keeper.reloads")
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what comes now stays pending for the successor
        handover = {**self.store, "lock": self.lock}
        living = {worker.name: (worker.pid, worker.pidfd) for worker in self.workers if worker.pid}
        descriptors = [*handover.values(), *(pidfd for _, pidfd in living.values())]
        names = {HANDOVER: json.dumps(handover), HANDED_WORKERS: json.dumps(living), **self.systemd.environment}
        os.environ |= names
        for fd in descriptors:
            os.set_inheritable(fd, True)
        failpoints.hit("keeper.hands-over")
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - our own command line
        except OSError as error:
            log("error", "reload failed, going on as before", error=str(error))
        for fd in descriptors:
            os.set_inheritable(fd, False)
        for name in names:
            del os.environ[name]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _replace(self, living: dict[str, tuple[int, int]]) -> None:
        """End the workers that the keeper before us handed over; the caller starts new ones."""
        handed = [worker for worker in self.workers if worker.name in living]
        for worker in handed:
            worker.take_over(*living[worker.name])
            worker.watch(self.loop)
        successor = self._successor() if self.blobd.pid else self.blobd
        self._end(handed, signal.SIGINT, RELOAD_SECONDS)
        self._end(handed, signal.SIGKILL, 1)
        failpoints.hit("keeper.replaced")
        if self.blobd.pid:
            successor.kill(signal.SIGKILL)
        elif successor.pid:
            self.workers[0] = self.blobd = successor

    def _successor(self) -> Worker:
        """A blobd that waits for the living one to end, with all descriptors: meanwhile nobody's death loses them."""
        successor = Worker("blobd", self.blobd.command, self.root)
        if successor.start():
            successor.watch(self.loop)
            self.loop.run_while(
                lambda: successor.pid not in (0, self.holder) and not self.loop.told(*STOP), RELOAD_SECONDS
            )
        return successor


def main(flags: list[str]) -> int:
    """`flags` come in pairs and have been checked by the caller."""
    options = dict(zip(flags[::2], flags[1::2], strict=True))
    root, address = options["--root"], options["--address"]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one descriptor per image
    oom.protect()
    memory.set_undumpable()
    os.umask(0o077)
    os.makedirs(root, exist_ok=True)
    run = [sys.executable, "-P", "-m"]
    commands = {name: [*run, module, *flags] for name, module in MODULES.items()}
    return supervise(root, address, commands, [*run, "snapshotter", "serve", "--check", *flags])


def supervise(root: str, address: str, commands: dict[str, list[str]], trial: list[str]) -> int:
    """Run a keeper; its exit status: 5 if another one has the root."""
    try:
        return Keeper(root, address, commands, trial).run()
    except BlockingIOError:
        pid = control.lock_holder(f"{root}/lock")
        sys.stderr.write(f"coco-snapshotter: error: already running as pid {pid}, which holds {root}/lock\n")
        return 5
    except OSError as error:
        sys.stderr.write(f"coco-snapshotter: error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
