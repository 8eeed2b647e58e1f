"""The rest of the node as metrics: what containerd asks for, what pulls do, and our processes."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from snapshotter import __version__
from snapshotter.monitor.exposition import Family, by, counter, gauge, histogram
from snapshotter.monitor.processes import Process
from snapshotter.monitor.tally import Counts, Histograms
from snapshotter.monitor.trail import Trail

WORKERS = ("keeper", "snapshotd", "blobd")


class Calls(Protocol):
    """What containerd has asked: an interceptor's numbers."""

    seconds: Histograms  # by method and code
    refusals: Counts  # by reason
    running: int


class State(NamedTuple):
    """What is on the node now."""

    snapshots: Mapping[str, int]  # by kind
    images: Mapping[int, str]  # references by attach id
    mounted: int


def of_calls(calls: Calls) -> list[Family]:
    return [
        histogram(
            "coco_rpc_duration_seconds",
            "How long containerd waited for answers, by method and code.",
            ["method", "code"],
            calls.seconds.snapshot(),
        ),
        gauge("coco_rpcs_running", "Calls of containerd that are not answered yet.", [({}, calls.running)]),
        counter(
            "coco_refusals_total",
            "Calls refused, by reason; ordinary answers such as not-found are left out.",
            by(["reason"], calls.refusals.snapshot()),
        ),
    ]


def of_pulls(trail: Trail) -> list[Family]:
    return [
        counter("coco_pulls_total", "Images that were admitted, by kind.", by(["kind"], trail.pulls.snapshot())),
        histogram(
            "coco_phase_duration_seconds",
            "How long the phases of a pull and of a mount took.",
            ["phase"],
            trail.phases.snapshot(),
        ),
        counter(
            "coco_phase_failures_total",
            "Phases that failed, by reason.",
            by(["phase", "reason"], trail.failures.snapshot()),
        ),
        counter(
            "coco_key_releases_total",
            "Layer keys asked for, by who was asked and outcome: released, or a reason.",
            by(["by", "outcome"], trail.keys.snapshot()),
        ),
    ]


def of_state(state: State) -> list[Family]:
    return [
        gauge("coco_snapshots", "Snapshots by kind.", [({"kind": k}, n) for k, n in state.snapshots.items()]),
        gauge("coco_images", "Lazy images that are on this node.", [({}, len(state.images))]),
        gauge("coco_images_mounted", "Lazy images that are mounted.", [({}, state.mounted)]),
    ]


def of_processes(
    mode: str, answers: Mapping[str, bool], keeper: Mapping[str, Any] | None, found: Mapping[str, Process]
) -> list[Family]:
    """`answers`: who answered just now; `keeper`: what it says; `found`: what the kernel says."""
    workers: Mapping[str, Mapping[str, int]] = (keeper or {}).get("workers", {})

    def each(field: str) -> list[tuple[dict[str, str], float]]:
        return [({"process": name}, getattr(process, field)) for name, process in found.items()]

    def of_workers(field: str) -> list[tuple[dict[str, str], float]]:
        return [({"process": name}, counts[field]) for name, counts in workers.items()]

    return [
        gauge("coco_build_info", "Always 1.", [({"version": __version__, "mode": mode}, 1)]),
        gauge("coco_up", "1 if the process answers.", [({"process": n}, answers.get(n, False)) for n in WORKERS]),
        counter("coco_worker_starts_total", "Starts of a worker by this keeper.", of_workers("starts")),
        counter("coco_worker_hangs_total", "Workers killed because they did not answer.", of_workers("hangs")),
        gauge("coco_process_resident_memory_bytes", "Resident memory.", each("resident_bytes")),
        counter("coco_process_cpu_seconds_total", "User and system time.", each("cpu_seconds")),
        gauge("coco_process_open_fds", "Open descriptors.", each("open_files")),
        gauge("coco_process_threads", "Threads.", each("threads")),
        gauge("coco_process_start_time_seconds", "Start, in seconds since the epoch.", each("started")),
    ]
