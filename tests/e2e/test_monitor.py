"""What an operator sees of a node with containerd: the story of an image, and logs whose lines belong together."""

import os
import signal
import sys
from typing import Any

import pytest

from snapshotter import control
from tests.e2e.conftest import Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.containerd import Containerd
from tests.harness.machine import Work, alive, until
from tests.harness.process import Process
from tests.harness.serve import Serve

pytestmark = [pytest.mark.root, pytest.mark.real]


IMPATIENT = """
import sys
from snapshotter import keeper, watchdog
watchdog.PROBE_SECONDS = 0.8
sys.exit(keeper.main(sys.argv[1:]))
"""


class Impatient(Serve):
    """A `serve` whose keeper gives workers five seconds to answer instead of thirty."""

    def spawn(self) -> Process:
        flags = {"--root": self.root, "--cache": self.cache, "--address": self.address, "--config": self.config}
        command = [sys.executable, "-P", "-c", IMPATIENT, *(word for flag in flags.items() for word in flag)]
        self.process = Process(self._work, f"{self.name}-serve", command, environment=self.environment)
        return self.process


def explain(guest: Node, worker: str, **about: str) -> list[dict[str, Any]]:
    answer, _ = control.request(guest.daemon.root / f"{worker}.sock", {"op": "explain", **about})
    return list(answer["images"])


def test_a_start_can_be_explained_from_pull_to_first_read(node: NodeMaker, images: Images) -> None:
    guest = node()
    reference = guest.pull(images.sealed())
    assert guest.shell(reference, READ_ALL) == expected()
    (pulled,) = explain(guest, "snapshotd", image=reference)
    assert pulled["manifest"] == images.sealed().digest
    phases = [event["event"] for event in pulled["events"]]
    assert phases.index("resolve") < phases.index("key") < phases.index("load") < phases.index("attach")
    assert phases[-1] == "mount"
    told = {event["event"]: event for event in pulled["events"]}
    assert (told["key"]["by"], told["key"]["outcome"]) == ("files", "released")
    assert told["load"]["kind"] == "sealed"
    assert any(event["event"] == "fetch" and event["bytes"] > 0 for event in pulled["events"])
    (served,) = explain(guest, "blobd", image=pulled["manifest"])
    assert served["ids"] == pulled["ids"]
    ranges = [event for event in served["events"] if event["event"] == "range"]
    assert sum(event["length"] for event in ranges) == guest.daemon.status()["counters"]["fetched_bytes"]
    first = next(event for event in served["events"] if event["event"] == "first-read")
    assert told["resolve"]["monotonic"] < first["monotonic"]


def test_a_refused_image_can_be_explained(node: NodeMaker, images: Images) -> None:
    guest = node(key=images.other_key)
    with pytest.raises(Exception, match="no-key"):
        guest.pull(images.sealed())
    (refused,) = explain(guest, "snapshotd", image=images.sealed().by_digest)
    assert refused["ids"] == []
    key = next(event for event in refused["events"] if event["event"] == "key")
    assert (key["by"], key["outcome"]) == ("files", "no-key")
    load = next(event for event in refused["events"] if event["event"] == "load")
    assert load["outcome"] == "no-key"
    lines = [event for event in guest.daemon.events() if event.get("reason") == "no-key" and event["event"] == "rpc"]
    assert lines[0]["method"] == "Prepare"
    assert lines[0]["namespace"] == "k8s.io"


def test_lines_of_one_call_share_its_id_in_both_workers(node: NodeMaker, images: Images) -> None:
    guest = node()
    reference = guest.pull(images.sealed())
    container = guest.containerd.start(reference, "/bin/sleep", "1000")
    container.wait_running()
    try:
        by_container = explain(guest, "snapshotd", container=container.identity)
        assert [image["manifest"] for image in by_container] == [images.sealed().digest]
        attached = next(event for event in guest.daemon.events() if event["event"] == "image attached")
        assert attached["process"] == "blobd"
        same = [event for event in guest.daemon.events() if event.get("request") == attached["request"]]
        assert {event["process"] for event in same} == {"blobd", "snapshotd"}
        assert [event["event"] for event in same][-1] == "rpc"
        assert any(event["event"] == "image mounted" for event in same)
    finally:
        container.kill()


def test_a_container_reads_on_when_blobd_freezes(work: Work, images: Images) -> None:
    daemon = Impatient(work, settings={"keys": {"files": [str(images.key)]}, "cache": {"quota": 0}})
    guest = Node(work, daemon, Containerd(work, "containerd", plugins={"coco": daemon.address}))
    reference = guest.pull(images.sealed())
    container = guest.containerd.start(reference, "/bin/sleep", "1000")
    container.wait_running()
    try:
        frozen = daemon.pids()["blobd"]
        os.kill(frozen, signal.SIGSTOP)
        assert container.exec("/bin/sh", "-c", READ_ALL).stdout == expected()
        until(lambda: not alive(frozen), "the frozen blobd is killed", 20)
        daemon.wait_replaced("blobd", frozen)
        counts = control.request(daemon.root / "keeper.sock", {"op": "status"})[0]["workers"]
        assert counts["blobd"]["hangs"] >= 1
    finally:
        container.kill()
