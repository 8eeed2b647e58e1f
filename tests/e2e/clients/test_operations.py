"""What else clients do with snapshots of lazy images: ctr's snapshot commands, read-only containers, deep images."""

import errno
import subprocess
from pathlib import Path

import pytest

from snapshotter.snapshots.model import Mount
from tests.conformance.layers import mounted
from tests.e2e.clients.paths import CRI, CTR_TRANSFER, NERDCTL_NYDUS, Puller
from tests.e2e.conftest import Images
from tests.e2e.test_images import READ_ALL, expected
from tests.harness import tiny
from tests.harness.containerd import Containerd

pytestmark = [pytest.mark.root, pytest.mark.real]

each_version = pytest.mark.parametrize("path", [*CRI[:2], CTR_TRANSFER], ids=str)
SELINUX_LABEL = "system_u:object_r:container_file_t:s0"


def command(containerd: Containerd, *arguments: str) -> str:
    return containerd.ctr("snapshots", "--snapshotter", containerd.layout.snapshotter, *arguments)


def parsed_mounts(line: str) -> Mount:
    """Of `mount -t KIND SOURCE TARGET -o OPTIONS`, as `ctr snapshots mounts` prints one."""
    _, _, kind, source, _, _, options = line.split()
    return Mount(kind, source, tuple(options.split(",")))


@each_version
def test_snapshot_commands_on_a_lazy_image(puller: Puller, images: Images, tmp_path: Path) -> None:
    puller.pull(images.sealed())
    containerd, top = puller.containerd, puller.top
    tree = [line.strip(" \\_") for line in command(containerd, "tree").splitlines()]
    assert tree[-1] == top
    assert len(tree) == len(images.sealed().layers)
    assert f'"Name": "{top}"' in command(containerd, "info", top)
    with containerd.view(top, tmp_path) as target:
        assert (target / "data/random").read_bytes() == tiny.data(1)
        with pytest.raises(OSError, match="Read-only") as refused:
            (target / "data/small").write_text("x")
        assert refused.value.errno == errno.EROFS
    assert command(containerd, "prepare", "work", top) == ""
    with mounted([parsed_mounts(command(containerd, "mounts", "/unused", "work"))], tmp_path) as target:
        (target / "data/small").write_text("changed\n")
        (target / "data/text").unlink()
    assert "data/.wh.text" in members(puller, "work", tmp_path)
    assert "work" in command(containerd, "usage")
    command(containerd, "commit", "layer", "work")
    assert members(puller, "layer", tmp_path) >= {"data/small", "data/.wh.text"}
    with containerd.view("layer", tmp_path) as target:
        assert (target / "data/small").read_text() == "changed\n"
        assert not (target / "data/text").exists()
    refused_text = containerd.try_ctr("snapshots", "--snapshotter", containerd.layout.snapshotter, "rm", top).stderr
    assert "cannot remove snapshot with child" in refused_text
    part = containerd.try_ctr("snapshots", "--snapshotter", containerd.layout.snapshotter, "diff", top).stderr
    assert "is read on demand as a part of its image, not by itself" in part, "what is below the last layer"
    command(containerd, "rm", "layer")
    assert "layer" not in command(containerd, "ls")


def members(puller: Puller, key: str, tmp_path: Path) -> set[str]:
    """Names in the layer that `ctr snapshots diff` makes of a snapshot."""
    containerd = puller.containerd
    diff = subprocess.run(
        [*containerd.command("snapshots", "--snapshotter", containerd.layout.snapshotter, "diff", key)],
        capture_output=True, check=True, env=containerd.environment,
    ).stdout  # fmt: skip
    names = subprocess.run(["tar", "-tz"], input=diff, capture_output=True, check=True).stdout.decode()
    return set(names.split())


@pytest.mark.parametrize("kind", ["sealed", "plain", "ordinary"])
@each_version
def test_a_read_only_container(puller: Puller, images: Images, kind: str) -> None:
    reference = puller.pull(getattr(images, kind)())
    assert puller.shell(reference, READ_ALL, "--read-only") == expected()
    refused = puller.containerd.run(reference, "/bin/sh", "-c", "touch /data/new 2>&1", options=["--read-only"])
    assert refused.returncode != 0
    assert "Read-only file system" in refused.stdout


@pytest.mark.parametrize("kind", ["sealed", "ordinary"])
@each_version
def test_an_selinux_label_has_the_effect_that_it_has_with_overlayfs(
    puller: Puller, images: Images, kind: str, tmp_path: Path
) -> None:
    """containerd appends `context="…"` to the mount of a container's root, whatever the snapshotter is."""
    puller.pull(getattr(images, kind)())
    ours = puller.containerd
    theirs = ours.within(puller.namespace, "overlayfs")
    theirs.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", images.ordinary().by_digest)
    base = next(name for name, (_, kind) in theirs.snapshots().items() if kind == "Committed")
    results = []
    for containerd, parent in ((ours, puller.top), (theirs, base)):
        command(containerd, "prepare", "labelled", parent)
        [line] = command(containerd, "mounts", "/unused", "labelled").splitlines()
        mount = parsed_mounts(line)
        with mounted([mount], tmp_path):
            pass
        results.append(labelled(mount, tmp_path))
        command(containerd, "rm", "labelled")
    assert results[0] == results[1]


def labelled(mount: Mount, tmp_path: Path) -> str:
    """The label of the root directory, or why the kernel refuses it."""
    labelled = mount._replace(options=(*mount.options, f'context="{SELINUX_LABEL}"'))
    try:
        with mounted([labelled], tmp_path) as target:
            return subprocess.run(["getfattr", "-n", "security.selinux", target], capture_output=True).stdout.decode()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@pytest.mark.parametrize("kind", ["sealed", "plain"])
@pytest.mark.parametrize("path", [CTR_TRANSFER], ids=str)
def test_ctr_exports_and_pushes_a_lazy_image(puller: Puller, images: Images, kind: str) -> None:
    """Within its registry at once; for anything else it must be fetched first."""
    image = getattr(images, kind)()
    reference = puller.pull(image)
    ctr = puller.containerd.ctr
    archive = puller.containerd.home / "exported.tar"
    beside = f"{images.registry.address}/t/{kind}:pushed"
    ctr("images", "tag", reference, beside)
    ctr("images", "push", "--plain-http", beside)
    assert images.registry.get_manifest(f"t/{kind}", "pushed")[0]
    assert "not found" in puller.containerd.try_ctr("images", "export", str(archive), reference).stderr
    ctr("content", "fetch", "--plain-http", reference)
    ctr("images", "export", "--local", str(archive), reference)  # of the transfer's stream ctr may lose the end
    assert archive.stat().st_size > sum(layer["size"] for layer in image.manifest["layers"])
    archive.unlink()


@pytest.mark.parametrize("kind", ["deep", "deep_sealed"])
@pytest.mark.parametrize("path", [CRI[0], NERDCTL_NYDUS[0], CTR_TRANSFER], ids=str)
def test_128_layers(puller: Puller, images: Images, kind: str) -> None:
    """127 of an image and the container's own; sealed, the image has one more."""
    image = getattr(images, kind)()
    reference = puller.pull(image)
    assert len(puller.containerd.snapshots()) == len(image.layers)
    numbers = "".join(f"{n}\n" for n in range(125))
    script = f"cd /layer; n=0; while [ $n -lt 125 ]; do cat $n; n=$((n+1)); done; ls | wc -l; {READ_ALL}"
    assert puller.shell(reference, script) == f"{numbers}125\n{expected()}"
