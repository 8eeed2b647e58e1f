"""Resident memory of the three processes: idle, and with an image mounted."""

from pathlib import Path

from tests.bench.table import Row
from tests.harness import serve, tiny
from tests.harness.containerd import Containerd
from tests.harness.machine import Work
from tests.harness.registry import Registry
from tests.harness.serve import WORKERS, Serve

_TARGETS_MB = {"blobd": 60, "keeper": 16}


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1e3
    raise RuntimeError(f"no VmRSS of {pid}")


def rows() -> list[Row]:
    """Idle figures carry the targets; the second column is after a container has read a small image."""
    with Work("bench-memory") as work:
        registry = Registry(work)
        key, public = serve.key_pair(work.path)
        layout = tiny.layout(work.path / "layout")
        target = f"docker://{registry.address}/t/tiny:sealed"
        digest = serve.convert(work, f"oci:{layout.path}:tiny", target, "--recipient", f"jwe:{public}")
        daemon = Serve(work, settings={"keys": {"files": [str(key)]}})
        pids = daemon.pids()
        idle = {name: resident_mb(pids[name]) for name in WORKERS}
        containerd = Containerd(work, "c", plugins={"coco": daemon.address})
        reference = f"{registry.address}/t/tiny@{digest}"
        containerd.cri.pull(reference)
        containerd.run(reference, "/bin/sh", "-c", "cat /data/* >/dev/null")
        used = {name: resident_mb(pids[name]) for name in WORKERS}
        containerd.remove_image(reference)
    found = []
    for name in WORKERS:
        limit = _TARGETS_MB.get(name)
        found.append(
            Row("memory", f"{name}, idle", f"{idle[name]:.1f} MB", f"{used[name]:.1f} MB after one image", None,
                f"< {limit} MB" if limit else "", idle[name] < limit if limit else None)
        )  # fmt: skip
    return found
