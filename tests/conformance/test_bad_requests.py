"""Requests that no client of good faith sends, at the socket of a `serve`: the right code, soon, and nothing kept."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from snapshotter.api import snapshots_pb2 as pb
from snapshotter.snapshots.filters import MAX_CHARACTERS, MAX_SELECTORS
from tests.conformance.client import Client
from tests.conformance.test_service import Code, base, refusal
from tests.harness.machine import Work
from tests.harness.serve import Serve

pytestmark = pytest.mark.root

SERVICE = "/containerd.services.snapshots.v1.Snapshots/"
METHODS = ("Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "List", "Usage", "Cleanup")
_plugins = itertools.count()


@pytest.fixture(scope="module")
def served() -> Iterator[Serve]:
    with Work("requests") as work:
        serve = Serve(work, settings={"log": {"level": "info"}})
        yield serve
        bugs = [event for event in serve.events() if event.get("level") in ("error", "warning") or "exception" in event]
        assert not bugs, "bad requests are answered, not logged as errors"
        assert serve.pids()["snapshotd"] == next(e["pid"] for e in serve.events() if e["event"] == "snapshotd serves")


@pytest.fixture
def sn(served: Serve) -> Iterator[Client]:
    client = Client(served.address, f"plugin-{next(_plugins)}")
    yield client
    client.close()


@pytest.fixture
def raw(served: Serve) -> Iterator[Callable[..., bytes]]:
    """Sends bytes as a request: `raw(method, content)`."""
    channel = grpc.insecure_channel(f"unix:{served.address}", options=[("grpc.max_send_message_length", 64 << 20)])

    def call(method: str, content: bytes = b"", **more: Any) -> bytes:
        if method == "List":
            return b"".join(channel.unary_stream(SERVICE + method)(content, timeout=60, **more))
        return bytes(channel.unary_unary(method if method[0] == "/" else SERVICE + method)(content, timeout=60, **more))

    yield call
    channel.close()


# bytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "content",
    [b"\xff" * 100, b"\x12\x05ab", b"\x12\x80\x80\x80\x80\x08", b"\x12", b"\x0b" * 200, b"\x0a\x02\xff\xfe"],
    ids=["garbage", "cut", "huge length", "no length", "groups", "not UTF-8"],
)
def test_what_is_no_message_is_an_invalid_argument(raw: Callable[..., bytes], method: str, content: bytes) -> None:
    code, message, reason = refusal(raw, method, content)
    assert (code, reason) == (Code.INVALID_ARGUMENT, "invalid-argument")
    assert "cannot be decoded" in message


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_request_names_nothing(raw: Callable[..., bytes], method: str) -> None:
    if method in ("List", "Cleanup"):
        assert raw(method) == b""
    else:
        assert refusal(raw, method)[0] in (Code.INVALID_ARGUMENT, Code.NOT_FOUND)


@pytest.mark.parametrize("path", [SERVICE + "Nothing", "/other.Service/Stat", "/", SERVICE + "x" * 4000])
def test_unknown_methods(raw: Callable[..., bytes], path: str) -> None:
    assert refusal(raw, path)[0] is Code.UNIMPLEMENTED


def test_unknown_fields_are_passed_over(raw: Callable[..., bytes], sn: Client) -> None:
    base(sn)
    request = pb.StatSnapshotRequest(snapshotter=sn.plugin, key="base").SerializeToString()
    answer = pb.StatSnapshotResponse.FromString(raw("Stat", request + b"\xfa\x3f\x05hello\x98\x06\x01"))
    assert answer.info.name == "base"


def test_messages_and_metadata_that_are_too_large(raw: Callable[..., bytes], sn: Client) -> None:
    base(sn)
    large = pb.StatSnapshotRequest(snapshotter=sn.plugin, key="x" * (17 << 20)).SerializeToString()
    assert refusal(raw, "Stat", large)[0] is Code.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as error:
        raw("Stat", metadata=(("containerd-namespace", "n" * 100_000),))
    assert error.value.code() is Code.RESOURCE_EXHAUSTED
    assert sn.names() == {"base"}


@pytest.mark.parametrize("name", ["\U0001f600" * 16_000, "\U000e0001" * 4000, "\0" * 16_000, "\r\n: x" * 100])
def test_errors_fit_into_their_trailer_whatever_they_name(sn: Client, name: str) -> None:
    """gRPC drops an error whose message and metadata exceed 8 KiB, and then nobody knows what was wrong."""
    base(sn)
    sn.prepare("child", "base")
    assert refusal(sn.stat, name)[0] is Code.NOT_FOUND
    assert refusal(sn.prepare, "key", name)[0] is Code.NOT_FOUND
    code, message, _ = refusal(sn.commit, "new", "child", {}, name)
    assert code is Code.INVALID_ARGUMENT
    assert "another parent" in message
    assert refusal(sn.walk, f'name=={name[:1000]},"')[0] is Code.INVALID_ARGUMENT
    assert refusal(sn.update, "base", {}, name)[0] is Code.INVALID_ARGUMENT
    assert sn.names() == {"base", "child"}


# labels, masks, times


def test_labels_of_one_snapshot_have_bounds_however_they_get_there(sn: Client) -> None:
    thousands = {f"key-{number}": "v" for number in range(10_000)}
    sn.prepare("key", labels=thousands)
    assert sn.stat("key").labels == thousands
    assert refusal(sn.update, "key", {"one more": "v"}, "labels.one more")[0] is Code.INVALID_ARGUMENT
    assert refusal(sn.prepare, "other", "", thousands | {"one more": "v"})[0] is Code.INVALID_ARGUMENT
    large = {f"large-{number}": "v" * 4000 for number in range(2000)}
    sn.update("key", large)
    more = {f"more-{number}": "v" * 4000 for number in range(500)}
    code, message, _ = refusal(sn.update, "key", more, *(f"labels.{key}" for key in more))
    assert code is Code.INVALID_ARGUMENT
    assert "2500 labels" in message
    assert sn.stat("key").labels == large
    assert sn.names() == {"key"}


def test_snapshots_with_many_labels_can_be_listed(sn: Client) -> None:
    """A message that exceeds what the client takes would stop every garbage collection."""
    labels = {f"key-{number}": "v" * 4000 for number in range(60)}
    for number in range(100):
        sn.view(f"key-{number}", labels=labels)
    batches = sn.batches()
    assert len(batches) > 1
    assert sorted(info.name for batch in batches for info in batch) == sorted(f"key-{n}" for n in range(100))


def test_empty_keys_are_keys(sn: Client) -> None:
    sn.prepare("key", labels={"": "v"})
    assert sn.stat("key").labels == {"": "v"}
    sn.update("key", {"": "w", "x": "y"}, "labels.")
    assert sn.stat("key").labels == {"": "w"}
    sn.update("key", {}, "labels.")
    assert sn.stat("key").labels == {}


@pytest.mark.parametrize(
    "paths",
    [("",), (".",), ("label",), ("labels ",), ("Labels",), ("labelsx",), ("labels.k", "kind"), ("kind", "labels"),
     ("info.labels",), ("labels", "parent"), ("*",), ("name",), ("updated_at",), ("x" * 1_000_000,)],
    ids=lambda paths: ",".join(paths)[:20],
)  # fmt: skip
def test_a_mask_that_names_anything_but_labels_changes_nothing(sn: Client, paths: tuple[str, ...]) -> None:
    sn.prepare("key", labels={"k": "v"})
    before = sn.stat("key")
    assert refusal(sn.update, "key", {"k": "w", "x": "y"}, *paths)[0] is Code.INVALID_ARGUMENT
    assert sn.stat("key") == before


def test_huge_masks_end_soon(sn: Client) -> None:
    labels = {f"key-{number}": "v" * 100 for number in range(5000)}
    sn.prepare("key", labels={"old": "v"})
    begin = time.monotonic()
    assert sn.update("key", labels, *["labels"] * 200_000).labels == labels
    assert sn.update("key", {}, *(f"labels.no-{number}" for number in range(200_000))).labels == labels
    assert sn.update("key", {}, *["labels.key-1"] * 200_000).labels.keys() == labels.keys() - {"key-1"}
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("seconds", "nanos"), [(-(1 << 63), -(1 << 31)), ((1 << 63) - 1, (1 << 31) - 1), (0, -1), (-62135596800, 0)]
)
def test_times_in_an_update_mean_nothing(sn: Client, seconds: int, nanos: int) -> None:
    sn.prepare("key", labels={})
    before = sn.stat("key")
    hostile = pb.Info(name="key", parent="x" * 1000, kind=77, labels={"a": "b"})  # type: ignore[arg-type]
    for stamp in (hostile.created_at, hostile.updated_at):
        stamp.seconds, stamp.nanos = seconds, nanos
    sn.stub.Update(pb.UpdateSnapshotRequest(snapshotter=sn.plugin, info=hostile), **sn.call)
    after = sn.stat("key")
    assert after._replace(updated_ns=0, labels={}) == before._replace(updated_ns=0)
    assert before.updated_ns <= after.updated_ns <= time.time_ns()
    assert after.labels == {"a": "b"}


# filters


@pytest.mark.parametrize(
    "filters",
    [
        ["name==a"] * (MAX_SELECTORS + 1),
        [""] * 100_000,
        [",".join(["a"] * (MAX_SELECTORS + 1))],
        ["name==" + "x" * MAX_CHARACTERS],
        ['"' * 1001],
        ["a." * 50_000],
        ["name~=/" + "(" * 1000 + ")" * 1000 + "/"],
        ["name~=/(((a{1000}){1000}){1000})/"],
        ["name~=/" + "x" * 2000 + "/"],
        ["name~=/[/"],
        ["name~=/a**/"],
    ],
    ids=lambda filters: f"{len(filters)} of {filters[0][:20]}",
)
def test_filters_out_of_all_bounds_are_refused_at_once(sn: Client, filters: list[str]) -> None:
    begin = time.monotonic()
    assert refusal(sn.walk, *filters)[0] is Code.INVALID_ARGUMENT
    assert time.monotonic() - begin < 10


@pytest.mark.timeout(60)
def test_filters_within_bounds_end_and_let_others_be_served(sn: Client, served: Serve) -> None:
    hard = "".join("ab"[byte & 1] for byte in os.urandom(4000))
    for number in range(200):
        sn.view(f"{number}-{hard}", labels={"hard": hard})
    other = Client(served.address, sn.plugin)

    def walk(*filters: str) -> list[object]:
        stream = sn.stub.List(pb.ListSnapshotsRequest(snapshotter=sn.plugin, filters=filters), **sn.call)
        assert other.stat(f"0-{hard}").labels == {"hard": hard}
        return list(stream)

    code, message, _ = refusal(walk, *(f"name~=/(a|b)*a(a|b){{60}}{number}/" for number in range(500)))
    assert code is Code.INVALID_ARGUMENT
    assert "take too long" in message
    assert walk(r"labels.hard~=/(a*)*(b*)*(a|b|ab)*c$/") == []
    assert walk(*["name==x"] * MAX_SELECTORS) == []
    assert len(sn.walk(rf"name~=/^\d+-{hard[:500]}/")) == 200
    other.close()
