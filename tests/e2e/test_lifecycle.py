"""Starting, stopping, restarting, removing: what an operator does, with containers that live through it."""

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.conftest import Images, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness import serve
from tests.harness.containerd import Containerd
from tests.harness.machine import Work, alive, until
from tests.harness.registry import Registry
from tests.harness.serve import Serve
from tests.harness.tiny import layout

pytestmark = [pytest.mark.root, pytest.mark.real]


def test_images_run_after_a_restart_without_the_registry(node: NodeMaker, images: Images) -> None:
    """Own registry, because it is stopped for good."""
    guest = node()
    registry = Registry(guest.work, "private")
    tiny = layout(guest.work.path / "layout")
    registry.push(tiny.path, "tiny", "t/app", "oci")
    digest = serve.convert(
        guest.work, f"docker://{registry.address}/t/app:oci", f"docker://{registry.address}/t/app:sealed",
        "--recipient", f"jwe:{images.public}",
    )  # fmt: skip
    reference = f"{registry.address}/t/app@{digest}"
    guest.containerd.cri.pull(reference)
    assert guest.shell(reference, READ_ALL) == expected()
    registry.process.stop()
    assert guest.daemon.terminate() == 0
    guest.daemon.start()
    guest.containerd.wait_connected()
    assert guest.shell(reference, READ_ALL) == expected()


def key_memory(pid: int) -> list[dict[str, str]]:
    """Mappings of attached images, with their keys, in a process; descriptors of them count as unlocked mappings."""
    found: list[dict[str, str]] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):
            found.append({"name": rest})
        else:
            found[-1][head[:-1]] = rest.strip()
    held = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            held.append({"name": os.readlink(link), "VmFlags": ""})
    return [entry for entry in [*found, *held] if "memfd:image" in entry["name"]]


def test_removing_an_image_frees_its_mount_and_its_memory(node: NodeMaker, images: Images) -> None:
    guest = node()
    pids = guest.daemon.pids()
    references = [guest.pull(image) for image in (images.sealed(), images.plain())]
    for reference in references:
        assert guest.shell(reference, READ_ALL) == expected()
    assert len(guest.daemon.images_mounted()) == 2
    mapped = [entry for entry in key_memory(pids["blobd"]) if entry["VmFlags"]]
    assert len(mapped) == 2
    for entry in mapped:
        assert "lo" in entry["VmFlags"].split(), "locked, so it is never swapped"
        assert entry["Locked"] == entry["Size"], "all of it"
    assert len(key_memory(pids["keeper"])) == 2
    assert key_memory(pids["snapshotd"]) == []
    for reference in references:
        guest.containerd.remove_image(reference)
    guest.containerd.wait_for_no_snapshots()
    until(guest.is_empty, "nothing is mounted or attached", 30)
    until(lambda: not any(key_memory(pid) for pid in pids.values()), "no process holds or maps a key", 10)
    assert guest.shell(guest.pull(images.sealed()), READ_ALL) == expected()


def test_sigterm_ends_all_three_processes_and_unmounts(node: NodeMaker, images: Images) -> None:
    guest = node()
    reference = guest.pull(images.sealed())
    assert guest.shell(reference, READ_ALL) == expected()
    pids = guest.daemon.pids()
    assert guest.daemon.terminate(timeout=10) == 0
    until(lambda: not any(alive(pid) for pid in pids.values()), "all three are gone", 10)
    assert not guest.daemon.images_mounted()
    guest.daemon.start()
    guest.containerd.wait_connected()
    assert guest.shell(reference, READ_ALL) == expected(), "the image is still there for the next serve"


def test_sigterm_with_a_running_container_leaves_it_its_files(node: NodeMaker, images: Images) -> None:
    guest = node()
    reference = guest.pull(images.sealed())
    container = guest.containerd.start(reference, "/bin/sleep", "1000")
    container.wait_running()
    try:
        before = guest.daemon.pids()
        assert guest.daemon.terminate(timeout=12) == 0
        assert not alive(before["keeper"])
        assert not alive(before["snapshotd"])
        assert alive(before["blobd"])
        assert container.exec("/bin/sh", "-c", READ_ALL).stdout == expected(), "read without keeper and snapshotd"
        guest.daemon.start()
        guest.containerd.wait_connected()
        assert guest.daemon.pids()["blobd"] == before["blobd"], "the next serve adopts it"
        assert container.exec("/bin/md5sum", "/bin/busybox").returncode == 0
    finally:
        container.kill()


def test_reload_replaces_the_workers_and_keeps_the_keeper(node: NodeMaker, images: Images) -> None:
    guest = node()
    reference = guest.pull(images.sealed())
    container = guest.containerd.start(reference, "/bin/sleep", "1000")
    container.wait_running()
    try:
        before = guest.daemon.pids()
        assert guest.daemon.process is not None
        guest.daemon.process.signal(signal.SIGHUP)
        for worker in ("blobd", "snapshotd"):
            guest.daemon.wait_replaced(worker, before[worker])
        assert guest.daemon.pids()["keeper"] == before["keeper"]
        assert container.exec("/bin/sh", "-c", READ_ALL).stdout == expected()
    finally:
        container.kill()


def test_a_container_starts_while_the_keeper_is_away(node: NodeMaker, images: Images) -> None:
    guest = node()
    reference = guest.pull(images.sealed())
    guest.daemon.kill("keeper")
    with ThreadPoolExecutor(1) as pool:  # its image has to be given to the keeper first
        started = pool.submit(guest.shell, reference, READ_ALL)
        guest.daemon.start()
        assert started.result(60) == expected()


@pytest.mark.parametrize("victims", [["keeper"], ["snapshotd"], ["blobd"], ["snapshotd", "blobd"]], ids="+".join)
def test_a_container_outlives_killed_processes(node: NodeMaker, images: Images, victims: list[str]) -> None:
    guest = node(mode="confidential")
    reference = guest.pull(images.sealed())
    container = guest.containerd.start(reference, "/bin/sleep", "1000")
    container.wait_running()
    try:
        old = {worker: guest.daemon.pids()[worker] for worker in victims}
        for pid in old.values():
            os.kill(pid, signal.SIGKILL)
        if "keeper" in victims:
            until(lambda: not alive(old["keeper"]), "the keeper is gone", 10)
            guest.daemon.start()
            guest.containerd.wait_connected()
        assert container.exec("/bin/sh", "-c", READ_ALL).stdout == expected()
        for worker, pid in old.items():
            guest.daemon.wait_replaced(worker, pid)
        guest.containerd.wait_connected()
        assert guest.shell(reference, READ_ALL) == expected(), "a new container starts too"
    finally:
        container.kill()


def test_a_second_daemon_on_the_same_root_refuses(node: NodeMaker, images: Images) -> None:
    guest = node()
    second = Serve(guest.work, "second", root=guest.daemon.root, start=False)
    process = second.spawn()
    assert process.wait(20) == 5
    assert "runs already" in process.errors() or "lock" in process.errors(), process.errors()
    assert guest.shell(guest.pull(images.sealed()), READ_ALL) == expected()


def test_mode_confidential_refuses_a_root_on_a_disk(work: Work) -> None:
    image, disk = work.path / "disk.img", work.directory("disk")
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    work.stack.callback(subprocess.run, ["umount", str(disk)], check=True)
    daemon = Serve(work, "untrusted", {"mode": "confidential"}, root=disk / "state", start=False)
    process = daemon.spawn()
    assert process.wait(20) == 2
    assert "trusted_devices" in process.errors()


def test_another_plugin_name_on_the_same_socket_has_its_own_snapshots(node: NodeMaker, images: Images) -> None:
    """Two containerds with two plugin names: the garbage collector of one never touches the other's."""
    guest = node()
    reference = guest.pull(images.sealed())
    second = Containerd(guest.work, "second", snapshotter="nydus", plugins={"nydus": guest.daemon.address})
    second.cri.pull(reference)
    second.remove_image(reference)
    second.wait_for_no_snapshots()
    assert guest.shell(reference, READ_ALL) == expected()
