"""Workers that hang are replaced, and systemd is told what it needs to know, on a socket like its own."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter import watchdog, workers
from snapshotter.loop import Loop
from snapshotter.notify import Systemd
from tests.harness.machine import Work, alive, until
from tests.unit.node.test_keeper import Node

pytestmark = pytest.mark.root

PROBE_SECONDS = 0.25  # six of them are more than a busy machine keeps anybody from answering


class Manager:
    """systemd, as far as a service speaks to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        """Every line so far."""
        self.socket.setblocking(False)
        while True:
            try:
                self.heard += self.socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.heard

    def wait_for(self, line: str, count: int = 1) -> None:
        until(lambda: self.listen().count(line) >= count, f"{count} × {line}", 20)


@pytest.fixture
def manager(work: Work, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    made = Manager(work.path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(made.path))
    yield made
    made.socket.close()


@pytest.fixture
def start(work: Work, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Node]:
    monkeypatch.setenv("FAKE_PROBE_SECONDS", str(PROBE_SECONDS))
    return lambda: Node(work)


@pytest.mark.parametrize("name", ["blobd", "snapshotd"])
def test_a_frozen_worker_is_replaced_and_gets_everything(start: Callable[[], Node], name: str) -> None:
    node = start()
    image, session, old = node.attach(7), node.session(), node.pids()
    os.kill(old[name], signal.SIGSTOP)
    until(lambda: not alive(old[name]), "the frozen worker is killed", 20)
    until(node.ready, "a new one answers", 20)
    assert node.pids()[name] != old[name]
    assert node.session() == session
    assert node.image(7) == image
    assert "worker does not answer and is killed" in node.events()
    counts = node.ask("keeper")["workers"]
    assert (counts[name]["hangs"], counts[name]["starts"]) == (1, 2)
    other = ({"blobd", "snapshotd"} - {name}).pop()
    assert node.pids()[other] == old[other], "the other one is left alone"


def test_a_worker_that_took_over_at_a_reload_is_watched_like_the_one_before(start: Callable[[], Node]) -> None:
    node = start()
    node.reload()
    frozen = node.pids()["blobd"]
    os.kill(frozen, signal.SIGSTOP)
    until(lambda: not alive(frozen), "the frozen worker is killed", 20)
    until(node.ready, "a new one answers", 20)


def test_a_worker_that_is_slow_but_answers_is_left_alone(start: Callable[[], Node]) -> None:
    node = start()
    old = node.pids()
    for _ in range(3):  # each shorter than what is allowed, together longer
        os.kill(old["blobd"], signal.SIGSTOP)
        time.sleep(watchdog.MISSED * PROBE_SECONDS / 2)
        os.kill(old["blobd"], signal.SIGCONT)
        assert node.ask("blobd")["pid"] == old["blobd"]
    assert node.pids() == old


def test_systemd_hears_of_every_state(manager: Manager, start: Callable[[], Node]) -> None:
    node = start()
    manager.wait_for("READY=1")
    assert f"MAINPID={node.keeper.pid}" in manager.heard
    assert "STATUS=serving" in manager.heard
    node.kill("blobd")
    manager.wait_for("STATUS=waiting for blobd")
    manager.wait_for("STATUS=serving", 2)
    assert manager.heard.count("READY=1") == 1
    for worker in ("blobd", "snapshotd"):
        environment = Path(f"/proc/{node.pids()[worker]}/environ").read_bytes()
        assert b"NOTIFY_SOCKET" not in environment, "workers do not speak for the service"
    node.keeper.signal(signal.SIGHUP)
    manager.wait_for("READY=1", 2)
    reloaded = manager.heard[manager.heard.index("RELOADING=1") :]
    microseconds = int(reloaded[1].removeprefix("MONOTONIC_USEC="))
    assert abs(time.monotonic() - microseconds / 1e6) < 60
    assert "STOPPING=1" not in manager.heard
    node.keeper.stop()
    assert "STOPPING=1" in manager.listen()


def test_a_refused_reload_ends_the_state_of_reloading(manager: Manager, start: Callable[[], Node]) -> None:
    node = start()
    manager.wait_for("READY=1")
    (node.root / "broken").write_text("no")
    node.keeper.signal(signal.SIGHUP)
    manager.wait_for("RELOADING=1")
    manager.wait_for("READY=1", 2)


def test_signs_of_life_end_with_the_last_hope_but_never_while_blobd_is_away(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, start: Callable[[], Node]
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.setenv("FAKE_PROBE_SECONDS", "0.1")
    node = start()
    manager.wait_for("WATCHDOG=1", 3)
    (node.root / "mute-snapshotd").touch()
    node.kill("snapshotd")
    silence = 0.1 * watchdog.HOPELESS

    def silent() -> bool:
        before = manager.listen().count("WATCHDOG=1")
        time.sleep(0.5)
        return manager.listen().count("WATCHDOG=1") == before

    until(silent, "no more signs of life", silence + 20)
    node.kill("blobd")
    (node.root / "mute-blobd").touch()
    manager.heard.clear()
    manager.wait_for("WATCHDOG=1", 2)
    for name in ("mute-blobd", "mute-snapshotd"):
        (node.root / name).unlink()
    until(node.ready, "both answer again", 20)
    manager.wait_for("STATUS=serving")


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "200000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "x"}])
def test_who_is_not_asked_for_signs_of_life_gives_none(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    systemd = Systemd()
    assert systemd.remaining() > 1000
    systemd.alive(well=True)
    assert manager.listen() == []


def test_a_manager_that_is_gone_or_deaf_stops_nobody(manager: Manager) -> None:
    systemd = Systemd()
    for _ in range(1000):
        systemd.reloading()
        systemd.serving([])
    manager.socket.close()
    systemd.stopping()


def test_a_machine_that_stood_still_is_not_a_hanging_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    worker = workers.Worker("blobd", ["/bin/sleep", "1000"], str(tmp_path))
    loop = Loop()
    assert worker.start()
    worker.watch(loop)
    worker.ready = True
    dog = watchdog.Watchdog([worker], loop)
    dog.step()
    now[0] += 3600
    dog.step()
    assert worker.hangs == 0
    for _ in range(watchdog.MISSED):
        now[0] += watchdog.PROBE_SECONDS
        dog.step()
    assert worker.hangs == 1
    while worker.pid:
        loop.step(10)
