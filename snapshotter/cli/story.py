"""From the events of an image to an account of a start: what happened when, and where the time went. Pure.

Events come from snapshotd and blobd (docs/architecture.md, "explain"); `monotonic` is when one ended, on one clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snapshotter.cli.progress import size

Event = Mapping[str, Any]

_QUIET_SECONDS = 5.0  # without a fetch: the start is over
_NOTICEABLE = 0.05
_PULL, _KEY, _VERIFY, _ATTACH, _MOUNT, _DATA = (
    "registry, for metadata", "key release", "verification", "attach", "mount", "registry, for data",
)  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """A line of the timeline: seconds since its first event, how long it took, what it was."""

    at: float
    seconds: float
    text: str


@dataclass(frozen=True)
class Account:
    """`phases`: seconds of the last pull and start by what they were spent on. `summary`: the same in sentences."""

    phases: Mapping[str, float] = field(default_factory=dict)
    data: Mapping[str, float] = field(default_factory=dict)
    timeline: Sequence[Moment] = ()
    summary: Sequence[str] = ()


def account(events: Sequence[Event], counters: Mapping[str, int], waits: Sequence[Event]) -> Account:
    """`events` of both processes in any order; `counters` and `waits` of blobd, empty if it is not attached."""
    ordered = sorted(events, key=_begin)
    if not ordered:
        return Account(summary=("Nothing is remembered of it: the workers were started after its last use.",))
    phases, sentences = _pull(ordered)
    started, told = _start(ordered)
    phases |= started
    sentences += told
    ranges = _of_the_start(ordered)
    data = _data(ranges)
    if data["ranges"]:
        phases[_DATA] = data["seconds"]
    sentences += _told_of_data(data, counters, waits)
    sentences += _trouble(ordered, counters)
    if verdict := _verdict(phases):
        sentences.insert(0, verdict)
    return Account({name: round(seconds, 4) for name, seconds in phases.items()}, data, _timeline(ordered), sentences)


def _begin(event: Event) -> float:
    return float(event["monotonic"]) - float(event.get("seconds") or 0)


def _seconds(events: Iterable[Event]) -> float:
    return sum(float(event.get("seconds") or 0) for event in events)


def _covered(events: Iterable[Event]) -> float:
    """Time in which at least one of the events was under way."""
    covered, until = 0.0, float("-inf")
    for event in sorted(events, key=_begin):
        begin, end = max(_begin(event), until), float(event["monotonic"])
        if end > begin:
            covered, until = covered + end - begin, end
    return covered


def _last(events: Sequence[Event], name: str) -> Event | None:
    return next((event for event in reversed(events) if event["event"] == name), None)


def _pull(events: Sequence[Event]) -> tuple[dict[str, float], list[str]]:
    """The last time that the image was verified: `load` holds its own fetches and keys, `resolve` comes before it."""
    load = _last(events, "load")
    if load is None:
        return {}, []
    resolve = next(
        (e for e in reversed(events) if e["event"] == "resolve" and e["monotonic"] <= _begin(load) + 0.001), load
    )
    begin, end = _begin(resolve), float(load["monotonic"])
    inside = [event for event in events if begin <= _begin(event) and event["monotonic"] <= end + 0.001]
    fetches = [event for event in inside if event["event"] == "fetch"]
    keys = [event for event in inside if event["event"] == "key"]
    phases = {_PULL: _covered(fetches), _KEY: _covered(keys)}
    phases[_VERIFY] = max(end - begin - _covered([*fetches, *keys]), 0.0)
    amount = sum(int(event.get("bytes") or 0) for event in fetches)
    parts = [f"{_time(phases[_PULL])} fetching {size(amount)} of metadata in {len(fetches)} requests"]
    parts += [f"{_time(phases[_KEY])} for its key ({', '.join(str(key['by']) for key in keys)})"] if keys else []
    parts += [f"{_time(phases[_VERIFY])} verifying"]
    verb = "Pulled" if load["outcome"] == "ok" else f"Refused ({load['outcome']})"
    return phases, [f"{verb} in {_time(end - begin)}: {', '.join(parts)}."]


def _start(events: Sequence[Event]) -> tuple[dict[str, float], list[str]]:
    """Attach, mount and first read."""
    mount = _last(events, "mount")
    if mount is None:
        return {}, ["It was not mounted: no container has used it."]
    attach = _last([event for event in events if event["monotonic"] <= mount["monotonic"]], "attach")
    phases = {_MOUNT: _seconds([mount])}
    parts = [f"{_time(phases[_MOUNT])} for the kernel's mount"]
    if attach:
        phases[_ATTACH] = _seconds([attach])
        parts.insert(0, f"{_time(phases[_ATTACH])} to hand it to the data plane")
    if mount["outcome"] != "ok":
        return phases, [f"The mount failed: {mount['outcome']}."]
    sentences = [f"Mounted: {', '.join(parts)}."]
    first = next((e for e in events if e["event"] == "first-read" and e["monotonic"] >= _begin(mount)), None)
    if first:
        found = "was in the cache" if first.get("found") == "cached" else "had to be fetched"
        sentences.append(f"The first data was read {_time(_begin(first) - mount['monotonic'])} later and {found}.")
    return phases, sentences


def _of_the_start(events: Sequence[Event]) -> list[Event]:
    """The ranges fetched since the image was attached, up to the first silence."""
    attached = _last(events, "attached")
    found: list[Event] = []
    for event in events:
        if event["event"] == "range" and (attached is None or event["monotonic"] >= attached["monotonic"]):
            if found and _begin(event) - max(e["monotonic"] for e in found) > _QUIET_SECONDS:
                break
            found.append(event)
    return found


def _data(ranges: Sequence[Event]) -> dict[str, float]:
    wanted = [event for event in ranges if event.get("purpose") == "read"]
    return {
        "ranges": len(ranges),
        "bytes": sum(int(event.get("length") or 0) for event in ranges),
        "seconds": round(_covered(ranges), 4),
        "reads_waited": sum(int(event.get("reads") or 0) for event in ranges),
        "seconds_awaited": round(_covered(wanted), 4),
    }


def _told_of_data(data: Mapping[str, float], counters: Mapping[str, int], waits: Sequence[Event]) -> list[str]:
    sentences = []
    if data["ranges"]:
        rate = f", {size(data['bytes'] / data['seconds'])}/s" if data["seconds"] > _NOTICEABLE else ""
        sentences.append(
            f"Starting took {size(data['bytes'])} from the registry in {data['ranges']:.0f} ranges, "
            f"{_time(data['seconds'])} in all{rate}; {data['reads_waited']:.0f} reads waited for them."
        )
    looked = counters.get("hits", 0) + counters.get("misses", 0)
    if looked:
        share = 100 * counters.get("hits", 0) / looked
        sentences.append(f"Since it was attached, {share:.0f} % of {looked} chunks that reads wanted were here.")
    if waits and (longest := max(float(wait["seconds"]) for wait in waits)) > _NOTICEABLE:
        sentences.append(f"The longest read waited {_time(longest)}.")
    return sentences


def _trouble(events: Sequence[Event], counters: Mapping[str, int]) -> list[str]:
    sentences = []
    if counters.get("retries"):
        sentences.append(f"{counters['retries']} requests had to be repeated: the registry is slow or unreliable.")
    failed = [event for event in events if event["event"] == "range" and event.get("outcome", "ok") != "ok"]
    if failed:
        sentences.append(f"{len(failed)} ranges were not delivered, at last because of {failed[-1]['outcome']}.")
    if counters.get("verify_failures"):
        sentences.append(f"{counters['verify_failures']} chunks were not what was sealed, and were thrown away.")
    if counters.get("eio"):
        sentences.append(f"{counters['eio']} reads failed with EIO.")
    return sentences


def _verdict(phases: Mapping[str, float]) -> str:
    total = sum(phases.values())
    if total < _NOTICEABLE:
        return ""
    slowest = max(phases, key=lambda name: phases[name])
    return f"Most of {_time(total)} went to: {slowest} ({100 * phases[slowest] / total:.0f} %)."


def _timeline(events: Sequence[Event]) -> list[Moment]:
    """One line an event, but one for ranges that follow each other."""
    origin = _begin(events[0])
    moments: list[Moment] = []
    run: list[Event] = []
    for event in [*events, None]:
        if event is not None and event["event"] == "range":
            run.append(event)
            continue
        if run:
            begin = _begin(run[0])
            data = _data(run)
            text = f"{data['ranges']:.0f} ranges, {size(data['bytes'])}, {data['reads_waited']:.0f} reads waited"
            moments.append(Moment(round(begin - origin, 4), round(max(e["monotonic"] for e in run) - begin, 4), text))
            run = []
        if event is not None:
            moments.append(
                Moment(round(_begin(event) - origin, 4), round(float(event.get("seconds") or 0), 4), _text(event))
            )
    return moments


def _text(event: Event) -> str:
    shown = {"wall", "monotonic", "event", "seconds", "counters"}
    fields = [f"{name}={value}" for name, value in event.items() if name not in shown and value is not None]
    return " ".join([str(event["event"]), *fields])


def _time(seconds: float) -> str:
    seconds = max(seconds, 0.0)
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
