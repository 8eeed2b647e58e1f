"""A real `serve` without images: status, signals, places."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter import __version__
from tests.harness.machine import Work, alive
from tests.harness.serve import Serve, program

pytestmark = pytest.mark.root


@pytest.fixture
def memory(work: Work) -> Iterator[Path]:
    """A directory on tmpfs, gone after everything that used it."""
    path = Path("/dev/shm", work.path.name)
    path.mkdir(mode=0o700)
    work.stack.callback(shutil.rmtree, path)
    return path


def test_status_of_a_running_node(work: Work) -> None:
    serve = Serve(work)
    status = serve.status()
    assert set(status) == {
        "version", "mode", "root", "cache_dir", "address", "pids", "images", "cache", "counters", "versions",
    }  # fmt: skip
    assert status["version"] == __version__
    assert status["versions"] == dict.fromkeys(("keeper", "snapshotd", "blobd"), __version__)
    assert status["mode"] == "open"
    assert (status["root"], status["cache_dir"]) == (str(serve.root), str(serve.cache))
    assert status["address"] == str(serve.address)
    assert status["pids"]["keeper"] == serve.process.pid  # type: ignore[union-attr]
    assert all(alive(pid) for pid in status["pids"].values())
    assert status["images"] == []
    assert status["cache"] == {"bytes": 0, "entries": 0}
    text = program(work, "status", "--config", serve.config).stdout
    assert f"pid {status['pids']['blobd']}" in text
    os.kill(status["pids"]["keeper"], signal.SIGSTOP)  # neither restarts blobd nor answers
    try:
        os.kill(status["pids"]["blobd"], signal.SIGKILL)
        result = program(work, "status", "--config", serve.config)
    finally:
        os.kill(status["pids"]["keeper"], signal.SIGCONT)
    assert result.returncode == 10
    assert "blobd" in result.stderr


def test_no_process_can_dump_or_swap_what_it_keeps(work: Work) -> None:
    for name, pid in Serve(work).pids().items():
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert "Max core file size        0                    0" in limits, name
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(status["CapEff"], 16), "a process without rights would say nothing about locked memory"
        if name != "keeper":  # which has descriptors of keys, and never maps them
            assert int(status["VmLck"].split()[0]) > 10_000, f"{name}: memory is not locked"


def test_interrupt_ends_all_three(work: Work) -> None:
    serve = Serve(work)
    pids = serve.pids()
    os.kill(pids["keeper"], signal.SIGINT)
    assert serve.process.wait(12) == 0  # type: ignore[union-attr]
    assert not any(alive(pid) for pid in pids.values())
    assert not serve.address.exists()


def test_confidential_node_on_tmpfs_serves(work: Work, memory: Path) -> None:
    serve = Serve(work, settings={"mode": "confidential"}, root=memory / "root")
    assert serve.status()["mode"] == "confidential"
    assert (memory / "root").stat().st_mode & 0o777 == 0o700


def test_snapshotd_holds_neither_image_keys_nor_the_fuse_connection(work: Work) -> None:
    serve = Serve(work)
    pids = serve.pids()
    held = {os.readlink(link) for link in Path(f"/proc/{pids['snapshotd']}/fd").iterdir()}
    assert not [name for name in held if "memfd" in name]
    assert not [name for name in held if name == "/dev/fuse"]


def test_root_behind_a_link_works(work: Work) -> None:
    real = work.directory("real")
    real.chmod(0o700)
    (work.path / "link").symlink_to(real)
    serve = Serve(work, root=work.path / "link")
    assert serve.status()["images"] == []
    assert (real / "metadata.db").exists()
