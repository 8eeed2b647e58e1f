"""Our own processes and sockets."""

import stat

from snapshotter import __version__
from snapshotter.cli.doctor.check import Check, Checks, Node, Result, Skipped, fail, ok, warn

_WORKERS = ("keeper", "snapshotd", "blobd")


def workers(node: Node) -> Result:
    """All three, or none before the first start."""
    answers = node.answers
    silent = [name for name in _WORKERS if name not in answers]
    if len(silent) == len(_WORKERS):
        return warn(f"nothing runs in root {node.config.root}", "systemctl enable --now coco-snapshotter")
    if silent:
        advice = "journalctl -u coco-snapshotter says why; the keeper starts workers again, serve a keeper"
        return fail(f"{', '.join(silent)} does not answer", advice)
    return ok(", ".join(f"{name} pid {node.answers['keeper']['pids'][name]}" for name in _WORKERS))  # type: ignore[index]


def orphans(node: Node) -> Result:
    """Workers without a keeper serve on, but nobody starts them again."""
    if "keeper" in node.answers:
        return ok("every worker has its keeper")
    holders = {name: node.machine.lock_holder(f"{node.config.root}/{name}.lock") for name in ("blobd", "snapshotd")}
    found = [f"{name} pid {pid}" for name, pid in holders.items() if pid]
    if found:
        return warn(f"{', '.join(found)} without a keeper", "coco-snapshotter serve adopts them")
    return ok("no worker is left over")


def version(node: Node) -> Result:
    """What runs and what is installed."""
    running = {str(answer.get("version")) for answer in node.answers.values()}
    if not running:
        raise Skipped("nothing runs")
    if running != {__version__}:
        return warn(
            f"{', '.join(sorted(running))} runs, {__version__} is installed", "systemctl reload coco-snapshotter"
        )
    return ok(__version__)


def settings(node: Node) -> Result:
    """Whether snapshotd runs with the configuration that is looked at here."""
    answer = node.answers.get("snapshotd")
    if answer is None:
        raise Skipped("snapshotd does not run")
    for key in ("mode", "cache_dir", "address"):
        stated = getattr(node.config, key)
        if answer.get(key) != stated:
            return warn(f"snapshotd runs with {key} = {answer.get(key)!r}, the file says {stated!r}", "restart serve")
    return ok("as in the file")


def socket(node: Node) -> Result:
    """The socket for containerd."""
    address = node.config.address
    try:
        status = node.machine.status(address)
    except FileNotFoundError:
        if not node.answers:
            raise Skipped("nothing runs") from None
        return fail(f"{address} does not exist", "systemctl restart coco-snapshotter; containers read on")
    if not stat.S_ISSOCK(status.st_mode):
        return fail(f"{address} is no socket", f"rm {address}; systemctl restart coco-snapshotter")
    if status.st_uid != 0 or status.st_mode & 0o022:
        found = f"{address} has owner {status.st_uid} and mode {stat.S_IMODE(status.st_mode):04o}"
        return fail(found, "only root may own it and write to it: restart serve, which makes it anew")
    try:
        node.machine.peer(address)
    except ConnectionRefusedError:
        return fail(f"{address} refuses connections", "systemctl restart coco-snapshotter; containers read on")
    return ok(f"{address} accepts")


def data_plane(node: Node) -> Result:
    """Reads that failed or did not verify since blobd started."""
    answer = node.answers.get("blobd")
    if answer is None:
        raise Skipped("blobd does not run")
    counters = answer.get("counters")
    assert isinstance(counters, dict)
    if counters.get("verify_failures"):
        return warn(
            f"{counters['verify_failures']} chunks were not what was sealed, {counters.get('eio', 0)} reads failed",
            "compare with the source: coco-snapshotter check docker://…",
        )
    if counters.get("eio"):
        advice = "coco-snapshotter explain IMAGE; with the registry back, reads succeed again"
        return warn(f"{counters['eio']} reads failed", advice)
    if counters.get("cache_errors"):
        return warn(
            f"{counters['cache_errors']} chunks could not be cached", f"space and mode of {node.config.cache_dir}"
        )
    return ok(f"{counters.get('reads', 0)} reads, none failed")


CHECKS: Checks = (
    Check("workers", workers),
    Check("workers-orphaned", orphans),
    Check("workers-version", version),
    Check("workers-config", settings),
    Check("socket", socket),
    Check("reads", data_plane),
)
