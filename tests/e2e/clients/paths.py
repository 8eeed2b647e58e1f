"""Every way in which a real client pulls: versions, commands, and a daemon and containerd that serve many tests.

Tests of one module share a `Station` per containerd configuration and have a namespace each, except those of CRI, which
knows one namespace only. Whatever a test pulled is removed when it ends, and then nothing of it may be left.
"""

import itertools
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tests.clients import CLIENTS
from tests.e2e.conftest import Image, Images, state_directory
from tests.harness.containerd import NAMESPACE, Containerd
from tests.harness.crictl import Crictl
from tests.harness.machine import Work, until
from tests.harness.nerdctl import Nerdctl
from tests.harness.releases import CONTAINERD_1_7, CONTAINERD_2_4, DEBIAN, RELEASES, Release
from tests.harness.serve import Serve

_numbers = itertools.count(1)


@dataclass(frozen=True)
class PullPath:
    """A client and how it is told to pull."""

    release: Release
    client: str  # crictl, ctr, nerdctl
    plugin: str = "coco"  # the name under which it knows us
    options: tuple[str, ...] = ()
    annotations: bool = True  # see Layout: CRI of 2.x pulls by its transfer service without

    def __str__(self) -> str:
        parts = [self.release.version, self.client, *self.options]
        parts += ["transfer"] * (not self.annotations) + [self.plugin] * (self.client == "nerdctl")
        return " ".join(parts)

    @property
    def missing(self) -> str:
        """Why it cannot be tried here; empty when it can."""
        if self.client in CLIENTS and not CLIENTS[self.client].built:
            return f"{self.client} is not built (tests/setup.sh does)"
        return self.release.missing


CRI = [PullPath(release, "crictl") for release in RELEASES]
CRI_TRANSFER = PullPath(CONTAINERD_2_4, "crictl", annotations=False)
CTR_TRANSFER = PullPath(CONTAINERD_2_4, "ctr")
NERDCTL_NYDUS = [PullPath(release, "nerdctl", "nydus") for release in (CONTAINERD_1_7, CONTAINERD_2_4)]
NERDCTL_COCO = [
    PullPath(release, "nerdctl") for release in (DEBIAN, CONTAINERD_2_4)
]  # sends no more than the layers' annotations
LAZY = [*CRI, CRI_TRANSFER, CTR_TRANSFER, *NERDCTL_NYDUS, *NERDCTL_COCO]
BARE = [  # these say nothing at all
    PullPath(DEBIAN, "ctr"), PullPath(CONTAINERD_1_7, "ctr"), PullPath(CONTAINERD_2_4, "ctr", options=("--local",))
]  # fmt: skip
ALL = [*LAZY, *BARE]


class Station:
    """Our daemon and a containerd that knows it under two names."""

    def __init__(self, work: Work, images: Images, release: Release, *, annotations: bool, **settings: object) -> None:
        name = f"{release.version.replace('.', '')}{'' if annotations else 't'}"
        self.daemon = Serve(
            work,
            f"coco-{name}",
            {"keys": {"files": [str(images.key)]}} | settings,
            root=state_directory(work, name, settings),
        )
        self.containerd = Containerd(
            work, f"containerd-{name}", plugins=dict.fromkeys(("coco", "nydus"), self.daemon.address), release=release,
            exports={"root": str(self.daemon.root)}, sandbox=images.pause().by_tag, annotations=annotations,
        )  # fmt: skip
        self._crictl: Crictl | None = None

    @property
    def crictl(self) -> Crictl:
        if self._crictl is None:
            self._crictl = Crictl(self.containerd)
        return self._crictl


class Puller:
    """A client at a station, in a namespace."""

    def __init__(self, path: PullPath, station: Station, namespace: str) -> None:
        self.path = path
        self.station = station
        self.daemon = station.daemon
        self.namespace = namespace
        self.containerd = station.containerd.within(namespace, path.plugin)
        self.nerdctl = Nerdctl(self.containerd, path.plugin, namespace)

    def attempt(self, reference: str) -> "subprocess.CompletedProcess[str]":
        if self.path.client == "crictl":
            return self.station.crictl.attempt("pull", reference)
        if self.path.client == "nerdctl":
            return self.nerdctl.attempt("pull", *self.path.options, reference)
        return self.containerd.try_ctr(
            "images", "pull", "--plain-http", "--snapshotter", self.path.plugin, *self.path.options, reference
        )

    def pull(self, image: Image) -> str:
        """Pull by digest; returns the reference."""
        result = self.attempt(image.by_digest)
        assert result.returncode == 0, f"{result.stderr[-2000:]}\n{self.daemon.log()[-2000:]}"
        return image.by_digest

    def shell(self, reference: str, script: str, *options: str) -> str:
        """Output of a script in a new container; a failing script is a failing test."""
        result = self.containerd.run(reference, "/bin/sh", "-ec", script, options=options)
        assert result.returncode == 0, f"{script!r}: {result.stdout[-500:]} {result.stderr[-1500:]}"
        return result.stdout

    @property
    def top(self) -> str:
        """The one committed snapshot that has no children."""
        found = self.containerd.snapshots()
        parents = {parent for parent, _ in found.values()}
        [top] = [name for name, (_, kind) in found.items() if kind == "Committed" and name not in parents]
        return top

    def in_namespace(self, namespace: str) -> "Puller":
        """The same elsewhere. CRI has one namespace only: there ctr asks."""
        path = replace(self.path, client="ctr") if self.path.client == "crictl" else self.path
        return Puller(path, self.station, namespace)

    def assert_empty(self) -> None:
        """containerd's collector has nothing to leave of what was removed in this namespace."""

        def empty() -> bool:
            self.containerd.collect_garbage()
            return not (self.containerd.snapshots() or self.containerd.content())

        until(empty, f"namespace {self.namespace} is empty", 15, every=0.2)

    def remove_images(self) -> None:
        """Remove every image of the namespace; nothing of them may be left."""
        for reference in self.containerd.ctr("images", "ls", "-q").split():
            self.containerd.try_ctr("images", "rm", reference)
        self.assert_empty()

    def remove_all(self) -> None:
        """The same of the last namespace that has images: we mount nothing any more."""
        self.remove_images()
        try:
            until(lambda: not self.daemon.images_mounted(), "no image is mounted", 30)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.daemon.log()[-4000:]}") from error


class Stations:
    """Started when they are first asked for."""

    def __init__(self, work: Work, images: Images, **settings: object) -> None:
        self._work, self._images, self._settings = work, images, settings
        self._made: dict[tuple[str, bool], Station] = {}

    def at(self, path: PullPath) -> Station:
        key = path.release.version, path.annotations
        if key not in self._made:
            self._made[key] = Station(
                self._work, self._images, path.release, annotations=path.annotations, **self._settings
            )
        return self._made[key]

    @contextmanager
    def puller(self, path: PullPath) -> Iterator[Puller]:
        """A client in a namespace of its own, empty before and after."""
        namespace = NAMESPACE if path.client == "crictl" else f"ns{next(_numbers)}"
        made = Puller(path, self.at(path), namespace)
        try:
            yield made
        finally:
            if path.client == "crictl":
                made.station.crictl.attempt("rmp", "--force", "--all")
            made.containerd.remove_containers()
        made.remove_all()
