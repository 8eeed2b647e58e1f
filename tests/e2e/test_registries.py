"""Mirrors that die, registries with passwords, and a kubelet whose pulls come through our image service."""

import base64
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import grpc
import pytest

from tests.e2e.conftest import Image, Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness import tiny
from tests.harness.cri import Cri
from tests.harness.machine import Work, until
from tests.harness.registry import Registry

pytestmark = [pytest.mark.root, pytest.mark.real]

PIECE = 256 << 10
# bcrypt, cost 4
USER, PASSWORD = "user", "hunter2"
HTPASSWD = "user:$2y$04$abcdefghijklmnopqrstuuV3duMsC0HpUex6N9qapiuOHHWkwRXVm\n"
CANARIES = [PASSWORD.encode(), base64.b64encode(f"{USER}:{PASSWORD}".encode())]


def copy(registry: Registry, name: str, work: Work, **options: str) -> Registry:
    """Another docker-registry process with the same content."""
    other = Registry(work, name, **options)
    shutil.copytree(registry.storage, other.storage, dirs_exist_ok=True)
    return other


def test_a_mirror_that_dies_while_a_container_reads_is_not_noticed(node: NodeMaker, images: Images, work: Work) -> None:
    image = images.sealed()
    mirror = copy(images.registry, "mirror", work)
    certs = work.directory("certs.d")
    folder = certs / images.registry.address
    folder.mkdir()
    (folder / "hosts.toml").write_text(f'[host."http://{mirror.address}"]\n')
    guest = node(registry={"hosts_dir": str(certs)}, fetch={"window": "64KiB", "parallel": 1})
    mark = images.registry.mark()
    reference = guest.pull(image)
    pieces = tiny.DATA_SIZE // PIECE
    script = (
        f"i=0; while [ $i -lt {pieces} ]; do dd if=/data/random bs={PIECE} skip=$i count=1 2>/dev/null | md5sum; "
        "i=$((i+1)); sleep 0.1; done"
    )
    container = guest.containerd.start(reference, "/bin/sh", "-ec", script)
    lines = [container.stdout.readline() for _ in range(3)]
    assert mirror.since().by("coco-snapshotter").of(set(image.layers))
    assert not images.registry.since(mark).by("coco-snapshotter"), "the mirror serves"
    mirror.process.signal(signal.SIGKILL)
    lines += container.stdout.read().splitlines(keepends=True)
    container.process.wait(30)
    container.stdout.close()
    data = tiny.data()
    sums = [hashlib.md5(data[i * PIECE : (i + 1) * PIECE]).hexdigest() for i in range(pieces)]
    assert [line.split()[0] for line in lines] == sums
    assert images.registry.since(mark).by("coco-snapshotter").of(set(image.layers)), "the registry took over"
    assert guest.daemon.status()["counters"]["eio"] == 0


@pytest.fixture
def private(images: Images, work: Work) -> Registry:
    """The same images behind a password."""
    images.sealed()
    return copy(images.registry, "private", work, htpasswd=HTPASSWD)


def kubelet_node(node: NodeMaker, work: Work, **settings: object) -> tuple[Node, Cri]:
    """A node, and what a kubelet has as --image-service-endpoint."""
    socket = work.path / "kubelet.sock"
    service = {"listen": str(socket), "backend": str(work.path / "coco-containerd" / "c.sock")}
    guest = node(registry={"image_service": service}, cache={"quota": 0}, **settings)
    until(socket.exists, "the image service listens")
    cri = Cri(socket)
    work.stack.callback(cri.close)
    return guest, cri


def auth(password: str = PASSWORD) -> dict[str, str]:
    return {"username": USER, "password": password}


def found_in(directory: Path) -> list[Path]:
    """Files that hold a canary."""
    return [
        path
        for path in directory.rglob("*")
        if path.is_file() and any(canary in path.read_bytes() for canary in CANARIES)
    ]


def test_logins_of_pulls_are_remembered_survive_our_processes_and_are_written_nowhere(
    node: NodeMaker, images: Images, work: Work, private: Registry
) -> None:
    image = Image(private, images.repository, "sealed-1", images.sealed().digest)
    guest, kubelet = kubelet_node(node, work)
    assert oct(os.stat(work.path / "kubelet.sock").st_mode & 0o777) == "0o600"
    assert kubelet.version() == guest.containerd.cri.version()

    with pytest.raises(grpc.RpcError, match=r"401|denied|authorization failed") as refused:
        kubelet.pull(image.by_digest)
    with pytest.raises(grpc.RpcError) as wrong:
        kubelet.pull(image.by_digest, auth=auth("wrong"))
    assert kubelet.status(image.by_digest) is None
    assert kubelet.pull(image.by_digest, auth=auth()) == guest.containerd.cri.pull(image.by_digest, auth=auth())
    assert kubelet.status(image.by_digest) == guest.containerd.cri.status(image.by_digest)
    assert not private.since().by("containerd").of(set(images.sealed().layers)), "it is lazy"

    container = guest.containerd.start(image.by_digest, "/bin/sleep", "1000")
    container.wait_running()
    guest.daemon.kill("keeper")
    guest.daemon.start()
    killed = guest.daemon.pids()
    for worker in ("snapshotd", "blobd"):
        os.kill(killed[worker], signal.SIGKILL)
    for worker in ("snapshotd", "blobd"):
        guest.daemon.wait_replaced(worker, killed[worker])
    guest.containerd.wait_connected()
    os.kill(guest.daemon.pids()["snapshotd"], signal.SIGSTOP)  # nobody who could be asked for a login
    try:
        before = len(private.since().by("coco-snapshotter"))
        assert container.exec("/bin/sh", "-c", READ_ALL).stdout == expected()
        assert len(private.since().by("coco-snapshotter")) > before
    finally:
        os.kill(int((guest.daemon.root / "snapshotd.lock").read_text()), signal.SIGCONT)
    container.kill()

    assert guest.shell(image.by_digest, READ_ALL) == expected()
    said = f"{refused.value} {wrong.value} {guest.daemon.log()} {json.dumps(guest.daemon.status())}"
    said += guest.containerd.ctr("snapshots", "--snapshotter", "coco", "ls")
    said += "".join(
        guest.containerd.ctr("snapshots", "--snapshotter", "coco", "info", key) for key in guest.containerd.snapshots()
    )
    assert not [canary for canary in CANARIES if canary.decode() in said]
    assert found_in(guest.daemon.root) == found_in(guest.daemon.cache) == []
    assert "login of a pull is remembered" in said


def test_images_run_on_when_their_credentials_have_expired(
    node: NodeMaker, images: Images, work: Work, private: Registry
) -> None:
    """Both daemons ask a credential provider, which has nothing good to say any more after a restart."""
    image = Image(private, images.repository, "sealed-1", images.sealed().digest)
    api = "credentialprovider.kubelet.k8s.io/v1"
    provider = {"name": "provider", "matchImages": [private.address], "apiVersion": api}
    (work.path / "providers.json").write_text(json.dumps({"kind": "CredentialProviderConfig", "providers": [provider]}))
    (work.path / "provider").write_text(f"#!/bin/sh\ncat {work.path}/answer\n")
    (work.path / "provider").chmod(0o700)

    def answer(password: str) -> None:
        head = {"kind": "CredentialProviderResponse", "apiVersion": api, "cacheKeyType": "Registry"}
        (work.path / "answer").write_text(json.dumps(head | {"auth": {private.address: auth(password)}}))

    answer(PASSWORD)
    programs = {"config": str(work.path / "providers.json"), "bin_dir": str(work.path)}
    guest = node(registry={"credential_providers": programs})
    guest.containerd.cri.pull(image.by_digest, auth=auth())
    assert guest.shell(image.by_digest, READ_ALL) == expected()
    answer("expired")
    assert guest.daemon.terminate() == 0
    guest.daemon.start()
    guest.containerd.wait_connected()
    assert guest.shell(image.by_digest, READ_ALL) == expected()
