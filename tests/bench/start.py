"""Cold starts through a slow link: bytes, requests and seconds until an image is ready, lazily and fully pulled.

Each sample has its own containerd, daemon and link, empty state, and a cold page cache. `python` is ready when it has
printed; `postgres` after initdb, when it accepts connections.
"""

import itertools
import random
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.table import Row, Say
from tests.harness import debian, serve
from tests.harness.containerd import Containerd
from tests.harness.link import ShapedLink
from tests.harness.machine import Work
from tests.harness.registry import Registry
from tests.harness.serve import Serve

ROUND_TRIP_MS, MEGABITS = 20.0, 100.0
_POSTGRES = """exec su postgres -s /bin/sh -c 'b=/usr/lib/postgresql/15/bin; $b/initdb -D /tmp/pg >/dev/null &&
exec $b/postgres -D /tmp/pg -c unix_socket_directories=/tmp -c listen_addresses= 2>&1'"""


@dataclass(frozen=True)
class Workload:
    """What is started, and the text in its output that says it is ready."""

    image: str
    command: tuple[str, ...]
    ready: str


WORKLOADS = (
    Workload("python", ("/usr/bin/python3", "-c", "print('hello')"), "hello"),
    Workload("postgres", ("/bin/sh", "-c", _POSTGRES), "ready to accept connections"),
)


@dataclass(frozen=True)
class Sample:
    """One start. Sizes in bytes, times in seconds from the start of the pull."""

    pulled: float
    ready: float
    size: int
    requests: int


@dataclass(frozen=True)
class Published:
    """The forms of one image on the registry: digests by form, and the bytes of all layers of the ordinary one."""

    digests: dict[str, str]
    full_size: int


class Starts:
    """Publishes each image once and takes samples."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._registry = Registry(work)
        self._key, self._public = serve.key_pair(work.path)
        self._numbers = itertools.count(1)

    def publish(self, image: str, say: Say) -> Published:
        layout = debian.image(image, say)
        ordinary = self._registry.push(layout.path, image, f"bench/{image}", "oci")
        base = f"docker://{self._registry.address}/bench/{image}"
        say(f"converting {image}")
        sealed = serve.convert(self._work, f"{base}:oci", f"{base}:sealed", "--recipient", f"jwe:{self._public}")
        return Published({"overlayfs": ordinary, "sealed": sealed}, sum(layer.size for layer in layout.layers(image)))

    def sample(self, workload: Workload, form: str, digest: str, round_trip_ms: float, megabits: float) -> Sample:
        with Work("start") as run:
            link = ShapedLink(run, self._registry.address, round_trip_ms=round_trip_ms, megabits=megabits, record=False)
            reference = f"{link.address}/bench/{workload.image}@{digest}"
            if form == "overlayfs":
                containerd = Containerd(run, "c", snapshotter="overlayfs")
            else:
                daemon = Serve(run, settings={"keys": {"files": [str(self._key)]}})
                containerd = Containerd(run, "c", plugins={"coco": daemon.address})
            drop_caches()
            mark = self._registry.mark()
            start = time.monotonic()
            containerd.cri.pull(reference)
            pulled = time.monotonic() - start
            container = containerd.start(reference, *workload.command)
            for line in container.stdout:
                if workload.ready in line:
                    break
            else:
                raise RuntimeError(f"{workload.image} was never ready")
            ready = time.monotonic() - start
            traffic = self._registry.since(mark)
            container.kill()
            containerd.remove_image(reference)
            return Sample(pulled, ready, traffic.size, len(traffic))


def drop_caches() -> None:
    """Write back and empty the page cache, then read in the programs that are not what is measured."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    for program in ("/usr/bin/containerd", "/usr/bin/ctr", "/usr/sbin/runc", "/usr/bin/containerd-shim-runc-v2"):
        if Path(program).exists():
            Path(program).read_bytes()


def rows(repeats: int, say: Say, workloads: Sequence[Workload] = WORKLOADS) -> list[Row]:
    """Medians over `repeats` samples of each form, taken in random order inside each round."""
    found: list[Row] = []
    with Work("bench-start") as work:
        starts = Starts(work)
        for workload in workloads:
            published = starts.publish(workload.image, say)
            samples: dict[str, list[Sample]] = {form: [] for form in published.digests}
            for turn in range(repeats):
                for form in random.sample(list(samples), len(samples)):
                    sample = starts.sample(workload, form, published.digests[form], ROUND_TRIP_MS, MEGABITS)
                    samples[form].append(sample)
                    say(f"{workload.image} {form} {turn + 1}/{repeats}: ready after {sample.ready:.2f} s")
            found += _rows(workload, published, samples)
    return found


def _rows(workload: Workload, published: Published, samples: dict[str, list[Sample]]) -> list[Row]:
    full, lazy = samples["overlayfs"], samples["sealed"]
    seconds = {form: statistics.median(s.ready for s in taken) for form, taken in samples.items()}
    size = statistics.median(s.size for s in lazy)
    share, faster = size / published.full_size, seconds["overlayfs"] / seconds["sealed"]
    promised = workload.image == "python"
    group = f"start {workload.image}, {ROUND_TRIP_MS:.0f} ms / {MEGABITS:.0f} Mbit"

    def spread(taken: list[Sample]) -> str:
        times = [sample.ready for sample in taken]
        return f"{statistics.median(times):.2f} s ({min(times):.2f}–{max(times):.2f})"

    return [
        Row(group, "pull + start", spread(lazy), spread(full), faster,
            "≥ 5 × faster" if promised else "", faster >= 5 if promised else None),
        Row(group, "of it the pull", f"{statistics.median(s.pulled for s in lazy):.2f} s",
            f"{statistics.median(s.pulled for s in full):.2f} s"),
        Row(group, "bytes", f"{size / 1e6:.1f} MB", f"{published.full_size / 1e6:.1f} MB", share,
            "< 0.10" if promised else "", share < 0.10 if promised else None),
        Row(group, "requests", f"{statistics.median(s.requests for s in lazy):.0f}",
            f"{statistics.median(s.requests for s in full):.0f}"),
    ]  # fmt: skip
