"""The keeper with stand-ins for its workers: what survives which death."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from snapshotter import control, workers
from tests.harness.machine import Work, alive, until
from tests.harness.process import Process

pytestmark = pytest.mark.root

CHECKOUT = Path(__file__).parents[3]
WORKERS = ("blobd", "snapshotd")


class Node:
    """A keeper under test; `start` again after its death makes the next one on the same root."""

    def __init__(self, work: Work) -> None:
        self.work, self.root, self.address = work, work.path / "root", work.path / "run" / "coco.sock"
        work.stack.callback(self.end)
        self.start()

    def spawn(self) -> Process:
        script = Path(__file__).with_name("fake_serve.py")
        command = [sys.executable, "-P", script, self.root, self.address]
        return Process(self.work, "keeper", command, environment={"PYTHONPATH": str(CHECKOUT)})

    def start(self) -> None:
        self.keeper = self.spawn()
        self.keeper.wait_until(self.ready, "both workers answer")

    def ready(self) -> bool:
        try:
            return all(self.ask(name)["pid"] == self.pids()[name] for name in WORKERS) and self.pids()["keeper"] > 0
        except (OSError, EOFError):
            return False

    def reload(self) -> None:
        """SIGHUP, and wait for new workers; the keeper answers nobody while it becomes the new one."""
        old = self.pids()["blobd"]
        self.keeper.signal(signal.SIGHUP)

        def replaced() -> bool:
            with suppress(OSError, EOFError):
                return self.pids()["blobd"] not in (0, old) and self.ready()
            return False

        until(replaced, "new workers", 15)

    def ask(self, name: str, op: str = "status") -> dict[str, Any]:
        return control.request(self.root / f"{name}.sock", {"op": op})[0]

    def pids(self) -> dict[str, int]:
        pids: dict[str, int] = self.ask("keeper")["pids"]
        return pids

    def session(self) -> list[object]:
        """Identity of the FUSE session, which both workers see alike."""
        seen = [[self.ask(name)["held"][key] for key in ("fuse", "fuse-root", "session")] for name in WORKERS]
        assert seen[0] == seen[1]
        return seen[0]

    def image(self, number: int) -> object:
        """Identity of an attached image in blobd's hands."""
        return self.ask("blobd")["held"].get(f"image-{number}")

    def kill(self, *names: str) -> None:
        pids = [self.pids()[name] for name in names]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            until(lambda pid=pid: not alive(pid), "killed", 10)  # type: ignore[misc]

    def attach(self, number: int) -> object:
        """Give an image to keeper and blobd as snapshotd does."""
        memfd = os.memfd_create("image")
        control.request(self.root / "keeper.sock", {"op": "put", "name": f"image-{number}"}, [memfd])
        control.request(self.root / "blobd.sock", {"op": "attach", "id": number}, [memfd])
        os.close(memfd)
        return self.image(number)

    def reachable(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.address)) == 0

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.keeper.errors().splitlines()]

    def end(self) -> None:
        (self.root / "busy").unlink(missing_ok=True)
        self.keeper.stop()
        for name in WORKERS:
            if pid := control.lock_holder(self.root / f"{name}.lock"):
                os.kill(pid, signal.SIGKILL)
                until(lambda pid=pid: not alive(pid), "killed", 10)  # type: ignore[misc]


@pytest.fixture
def node(work: Work) -> Node:
    return Node(work)


def test_root_and_sockets_are_closed_to_others(node: Node) -> None:
    assert node.root.stat().st_mode & 0o777 == 0o700
    for path in (node.address, *node.root.glob("*.sock")):
        assert path.stat().st_mode & 0o777 == 0o600, path


def test_session_is_on_no_path(node: Node) -> None:
    assert node.session()
    for process in (os.getpid(), node.keeper.pid):
        assert str(node.root) not in Path(f"/proc/{process}/mountinfo").read_text()


@pytest.mark.parametrize("names", [("blobd",), ("snapshotd",), ("blobd", "snapshotd")])
def test_dead_worker_is_replaced_and_gets_everything(node: Node, names: tuple[str, ...]) -> None:
    image, session, old = node.attach(7), node.session(), node.pids()
    node.kill(*names)
    until(node.ready, "workers answer", 10)
    assert {name for name in WORKERS if node.pids()[name] != old[name]} == set(names)
    assert node.session() == session
    assert node.image(7) == image
    assert node.reachable()


def test_new_keeper_adopts_living_workers_and_takes_back_what_they_hold(node: Node) -> None:
    image, session, old = node.attach(7), node.session(), node.pids()
    node.kill("keeper")
    node.start()
    assert {name: node.pids()[name] for name in WORKERS} == {name: old[name] for name in WORKERS}
    node.kill("blobd")  # the next blobd gets its descriptors from the new keeper
    until(node.ready, "blobd answers", 10)
    assert node.session() == session
    assert node.image(7) == image


@pytest.mark.parametrize("rounds", [2])
def test_keeper_and_snapshotd_may_die_together(node: Node, rounds: int) -> None:
    image, session = node.attach(7), node.session()
    for _ in range(rounds):  # the second time, blobd's copy of the listening socket is a dead one
        node.kill("keeper", "snapshotd")
        node.start()
        assert node.reachable()
        assert node.session() == session
        assert node.image(7) == image
    node.kill("keeper")
    node.start()
    node.kill("snapshotd")
    until(node.ready, "snapshotd answers", 10)
    assert node.reachable()


def test_losing_keeper_and_blobd_costs_the_session_and_replaces_snapshotd(node: Node) -> None:
    session, old = node.session(), node.pids()
    node.kill("keeper", "blobd")
    node.start()
    assert node.session() != session
    assert node.pids()["snapshotd"] != old["snapshotd"]
    assert "new FUSE session" in node.events()


def test_start_after_everything_was_killed(node: Node) -> None:
    node.kill("keeper", "snapshotd", "blobd")
    node.start()
    assert node.reachable()


def test_worker_of_an_earlier_keeper_that_was_not_seen_is_replaced(node: Node) -> None:
    """A keeper may die before the worker that it has just started holds its lock; the next one sees no worker."""
    node.keeper.signal(signal.SIGSTOP)
    node_pid = control.lock_holder(node.root / "snapshotd.lock")
    assert node_pid
    os.kill(node_pid, signal.SIGKILL)
    worker = Path(__file__).with_name("fake_worker.py")
    orphan = Process(
        node.work,
        "orphan",
        [sys.executable, "-P", worker, "snapshotd", node.root],
        environment={"PYTHONPATH": str(CHECKOUT)},
    )
    until(lambda: control.lock_holder(node.root / "snapshotd.lock") == orphan.pid, "the orphan has the lock", 10)
    node.keeper.signal(signal.SIGCONT)
    assert orphan.wait() == -signal.SIGKILL
    until(node.ready, "snapshotd answers", 10)


def test_second_keeper_on_the_same_root_is_refused(node: Node) -> None:
    second = node.spawn()
    assert second.wait() == 5
    assert f"already running as pid {node.keeper.pid}" in second.errors()
    assert node.ready()


def test_image_is_held_until_it_is_dropped(node: Node) -> None:
    keeper = node.root / "keeper.sock"
    node.attach(7)
    before = len(os.listdir(f"/proc/{node.keeper.pid}/fd"))
    node.attach(7)  # again: replaced, not doubled
    until(lambda: len(os.listdir(f"/proc/{node.keeper.pid}/fd")) == before, "no descriptor more", 5)
    control.request(keeper, {"op": "drop", "name": "image-7"})
    held, _ = control.fetch_all(keeper, {"op": "list"})
    control.close_all(held.values())
    assert set(held) == {"fuse", "fuse-root", "session", "listen-grpc", "listen-blobd"}


@pytest.mark.parametrize(
    "message",
    [
        {"op": "put", "name": "fuse"},
        {"op": "put", "name": "image-7"},
        {"op": "drop", "name": "listen-grpc"},
        {"op": ["x"]},
        {"name": {}},
    ],
)
def test_wrong_request_is_refused(node: Node, message: dict[str, object]) -> None:
    with pytest.raises(control.ControlError) as caught:
        control.request(node.root / "keeper.sock", message)
    assert caught.value.reason == "invalid-argument"
    assert node.ready()


def test_garbage_and_silent_connections_do_not_stop_the_keeper(node: Node) -> None:
    with control.connect(node.root / "keeper.sock", 5), control.connect(node.root / "keeper.sock", 5) as noisy:
        noisy.send(b"garbage")
        assert node.ready()


def test_reload_keeps_pid_and_descriptors_and_replaces_both_workers(node: Node) -> None:
    image, session, old = node.attach(7), node.session(), node.pids()
    node.reload()
    new = node.pids()
    assert new["keeper"] == old["keeper"] == node.keeper.pid
    assert new["snapshotd"] != old["snapshotd"]
    assert node.session() == session
    assert node.image(7) == image
    assert node.reachable()
    assert node.spawn().wait() == 5  # the lock was never free


def test_reload_is_refused_if_what_is_installed_cannot_serve(node: Node) -> None:
    old = node.pids()
    (node.root / "broken").write_text("SyntaxError: no such program")
    node.keeper.signal(signal.SIGHUP)
    until(lambda: any(event.startswith("reload refused") for event in node.events()), "the refusal is logged", 10)
    refusal = json.loads(node.keeper.errors().splitlines()[-1])
    assert (refusal["level"], refusal["cause"]) == ("error", "SyntaxError: no such program")
    assert node.pids() == old
    (node.root / "broken").unlink()
    node.reload()
    assert node.pids()["blobd"] != old["blobd"]


def test_reload_by_a_keeper_that_has_adopted_its_workers(node: Node) -> None:
    image, session = node.attach(7), node.session()
    node.kill("keeper")
    node.start()
    old = node.pids()
    node.reload()
    assert node.pids()["keeper"] == old["keeper"]
    assert (node.image(7), node.session()) == (image, session)


def test_new_keeper_that_dies_in_a_reload_costs_nothing(node: Node) -> None:
    """Workers, and with them the duplicates of everything, live until the new keeper is there and replaces them."""
    image, session, old = node.attach(7), node.session(), node.pids()
    (node.root / "die").touch()
    node.keeper.signal(signal.SIGHUP)
    assert node.keeper.wait(10) == 9
    (node.root / "die").unlink()
    assert all(alive(old[name]) for name in WORKERS)
    node.start()
    assert (node.image(7), node.session()) == (image, session)


def test_stop_ends_all_three_and_removes_the_socket(node: Node) -> None:
    old = node.pids()
    assert node.keeper.stop() == 0
    assert not any(alive(pid) for pid in old.values())
    assert not node.address.exists()


def test_stop_while_images_are_in_use_leaves_blobd_to_the_next_start(node: Node) -> None:
    (node.root / "busy").touch()
    image, session, old = node.attach(7), node.session(), node.pids()
    assert node.keeper.stop() == 0
    assert alive(old["blobd"])
    assert not alive(old["snapshotd"])
    assert not node.reachable()
    assert "images are in use: blobd stays and serves them" in node.events()
    node.start()
    assert node.pids()["blobd"] == old["blobd"]
    assert node.session() == session
    assert node.image(7) == image
    assert node.reachable()


def test_second_stop_signal_ends_blobd_too(node: Node) -> None:
    (node.root / "busy").touch()
    old = node.pids()
    node.keeper.signal(signal.SIGTERM)
    until(lambda: not alive(old["snapshotd"]), "snapshotd has drained", 10)
    node.keeper.signal(signal.SIGTERM)
    assert node.keeper.wait() == 0
    assert not alive(old["blobd"])


def test_keeper_is_small(node: Node) -> None:
    status = Path(f"/proc/{node.keeper.pid}/status").read_text()
    assert int(status.split("VmRSS:")[1].split()[0]) < 16 << 10


def test_keeper_imports_nothing_but_the_standard_library() -> None:
    code = "import sys, snapshotter.keeper; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    modules = {name.split(".")[0] for name in loaded.stdout.split()}
    site = {name for name in modules - set(sys.stdlib_module_names) if not name.startswith("_")}
    assert site <= {"snapshotter", "sitecustomize", "usercustomize"}
    assert not modules & {"asyncio", "logging", "subprocess", "threading", "ssl"}


def test_worker_that_keeps_dying_is_restarted_ever_more_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    worker = workers.Worker("blobd", ["/bin/false"], str(tmp_path))
    delays = []
    for lifetime in (0, 0, 0, 0, 0, 0, 11):
        run_to_its_end(worker, lambda lifetime=lifetime: now.__setitem__(0, now[0] + lifetime))
        delays.append(round(worker.due - now[0], 1))
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 0.1]


def run_to_its_end(worker: workers.Worker, live: Callable[[], None]) -> None:
    loop = workers.Loop()
    assert worker.start()
    worker.watch(loop)
    live()
    while worker.pid:
        loop.step(10)
