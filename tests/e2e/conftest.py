"""One registry with a few small images for the whole tier; a fresh node (our daemon and containerd) for each test."""

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness import oci, serve, tiny
from tests.harness.containerd import Containerd
from tests.harness.machine import Work
from tests.harness.oci import member
from tests.harness.registry import Registry
from tests.harness.serve import Serve

Change = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Image:
    """An image on the tier's registry."""

    registry: Registry
    repository: str
    tag: str
    digest: str

    @property
    def by_digest(self) -> str:
        return f"{self.registry.address}/{self.repository}@{self.digest}"

    @property
    def by_tag(self) -> str:
        return f"{self.registry.address}/{self.repository}:{self.tag}"

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.registry.get_manifest(self.repository, self.digest)[0])
        return found

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.registry.get_blob(self.repository, self.manifest["config"]["digest"]))
        return found

    @property
    def layers(self) -> list[str]:
        return [layer["digest"] for layer in self.manifest["layers"]]

    def variant(
        self,
        tag: str,
        change_manifest: Change | None = None,
        change_config: Change | None = None,
    ) -> "Image":
        """What a registry can make of it: the same repository, a changed manifest or config, another tag."""
        manifest, config = self.manifest, self.config
        kind = manifest["mediaType"]
        if change_config:
            change_config(config)
        content = json.dumps(config).encode()
        digest = self.registry.put_blob(self.repository, content)
        manifest["config"] |= {"digest": digest, "size": len(content)}
        if change_manifest:
            change_manifest(manifest)
        made = self.registry.put_manifest(self.repository, tag, json.dumps(manifest).encode(), kind)
        return Image(self.registry, self.repository, tag, made)


class Images:
    """Makes, pushes and converts images once each. All are in repository t/app."""

    repository = "t/app"

    def __init__(self, work: Work) -> None:
        self.work = work
        self.registry = Registry(work)
        self.key, self.public = serve.key_pair(work.path)
        self.other_key, self.other_public = serve.key_pair(work.path, "other")
        self._layout = oci.Layout(work.path / "layout")
        self._made: dict[str, Image] = {}

    def _once(self, tag: str, make: Callable[[], str]) -> Image:
        if tag not in self._made:
            self._made[tag] = Image(self.registry, self.repository, tag, make())
        return self._made[tag]

    def ordinary(self, seed: int = 1) -> Image:
        """busybox and data of a seed, as tar.gz layers."""

        def make() -> str:
            layout = tiny.layout(self.work.path / f"layout-{seed}", seed=seed)
            return self.registry.push(layout.path, "tiny", self.repository, f"oci-{seed}")

        return self._once(f"oci-{seed}", make)

    def _converted(self, tag: str, seed: int, *options: str | Path) -> Image:
        source = f"docker://{self.ordinary(seed).by_tag}"
        target = f"docker://{self.registry.address}/{self.repository}:{tag}"
        return self._once(tag, lambda: serve.convert(self.work, source, target, *options))

    def sealed(self, seed: int = 1, *options: str | Path, label: str = "sealed") -> Image:
        """The same, sealed for `key`."""
        return self._converted(f"{label}-{seed}", seed, "--recipient", f"jwe:{self.public}", *options)

    def plain(self, seed: int = 1) -> Image:
        """The same as a plain Nydus image."""
        return self._converted(f"plain-{seed}", seed, "--plain")

    def pause(self) -> Image:
        """A pod's sandbox, sealed: it waits until it is told to end."""
        wait = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"

        def make() -> str:
            layout = tiny.layout(self.work.path / "layout-pause", config={"Entrypoint": ["/bin/sh", "-c", wait]})
            target = f"docker://{self.registry.address}/{self.repository}:pause"
            return serve.convert(self.work, f"oci:{layout.path}:tiny", target, "--recipient", f"jwe:{self.public}")

        return self._once("pause", make)

    def deep(self) -> Image:
        """An ordinary image of 127 layers; /layer/N holds a line for each of 125."""

        def make() -> str:
            extra = [[(member(f"layer/{n}"), b"%d\n" % n)] for n in range(125)]
            layout = tiny.layout(self.work.path / "layout-deep", extra=extra)
            return self.registry.push(layout.path, "tiny", self.repository, "deep")

        return self._once("deep", make)

    def deep_sealed(self) -> Image:
        source, target = (
            f"docker://{self.registry.address}/{self.repository}:{tag}" for tag in ("deep", "deep-sealed")
        )
        self.deep()
        return self._once(
            "deep-sealed", lambda: serve.convert(self.work, source, target, "--recipient", f"jwe:{self.public}")
        )

    def above(self, base: Image) -> Image:
        """An ordinary layer on top of another image: /data/text is gone, /data/small is another file."""
        members = [member("data/"), member("data/.wh.text"), member("data/small")]
        layer = self._layout.add_members(zip(members, (b"", b"", b"replaced\n"), strict=True))
        self.registry.put_blob(self.repository, self._layout.blob(layer.digest))
        return base.variant(
            f"above-{base.tag}",
            lambda manifest: manifest["layers"].append(dict(layer.descriptor)),
            lambda config: config["rootfs"]["diff_ids"].append(layer.diff_id),
        )


@pytest.fixture(scope="session")
def images() -> Iterator[Images]:
    with Work("e2e") as run:
        yield Images(run)


@dataclass
class Node:
    """Our daemon and a containerd that pulls with it."""

    work: Work
    daemon: Serve
    containerd: Containerd

    def pull(self, image: Image, by: str = "digest") -> str:
        reference = image.by_digest if by == "digest" else image.by_tag
        self.containerd.cri.pull(reference)
        return reference

    def shell(self, reference: str, script: str) -> str:
        """Output of a script in a new container; a failing script is a failing test."""
        result = self.containerd.run(reference, "/bin/sh", "-ec", script)
        assert result.returncode == 0, (
            f"{script!r}: {result.stdout[-500:]} {result.stderr[-1500:]}\n{self.daemon.log()[-3000:]}"
        )
        return result.stdout

    def is_empty(self) -> bool:
        """No snapshot, no mounted image, nothing attached."""
        return (
            not self.containerd.snapshots() and not self.daemon.images_mounted() and not self.daemon.status()["images"]
        )

    def cached_files(self) -> set[Path]:
        return {path for path in self.daemon.cache.rglob("*") if path.is_file()}


NodeMaker = Callable[..., Node]


def state_directory(work: Work, name: str, settings: Mapping[str, Any]) -> Path:
    """For a daemon's `root`: on a tmpfs where mode confidential asks for that."""
    root = work.directory(f"{name}-root")
    if settings.get("mode") == "confidential":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m,mode=0700", "tmpfs", str(root)], check=True)
        work.stack.callback(subprocess.run, ["umount", str(root)], check=True)
    return root


@pytest.fixture
def node(work: Work, images: Images) -> NodeMaker:
    """Make a node: `node(mode="confidential", erofs={"driver": "loop"})`. The key of `images` is configured."""

    def make(*, name: str = "coco", key: Path | None = None, **settings: Any) -> Node:
        root = state_directory(work, name, settings)
        table: Mapping[str, Any] = {"keys": {"files": [str(key or images.key)]}} | settings
        daemon = Serve(work, name, table, root=root)
        return Node(work, daemon, Containerd(work, f"{name}-containerd", plugins={"coco": daemon.address}))

    return make
