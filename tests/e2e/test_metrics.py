"""The monitor address of a real node; documentation, dashboard and alerts speak of what is really there."""

import json
import os
import re
import signal
import time
from pathlib import Path

import grpc
import pytest

from tests.e2e.conftest import Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.machine import until
from tests.harness.metrics import get, scrape

pytestmark = [pytest.mark.root, pytest.mark.real]

CHECKOUT = Path(__file__).parents[2]
NAME = re.compile(r"coco_[a-z_]+")
IN_STEP_SECONDS = 1.1  # an answer is given again for a second


def monitored(node: NodeMaker) -> tuple[Node, str]:
    guest = node(monitor={"listen": "127.0.0.1:0"})
    return guest, bound(guest)


def bound(guest: Node) -> str:
    """The address that was chosen for port 0, as the last worker tells."""

    def told() -> list[str]:
        return [event["address"] for event in guest.daemon.events() if event["event"] == "monitor listens"]

    return until(told, "the monitor listens", 20)[-1]


def ready(address: str) -> bool:
    return get(address, "/readyz")[0] == 200


def test_numbers_of_a_pull_and_a_start(node: NodeMaker, images: Images) -> None:
    guest, address = monitored(node)
    with pytest.raises(grpc.RpcError, match="config-mismatch"):
        guest.pull(images.sealed().variant("other-command", change_config=lambda config: config["config"].clear()))
    assert guest.shell(guest.pull(images.sealed()), READ_ALL) == expected()
    found = scrape(address)
    counters = guest.daemon.status()["counters"]
    assert found["coco_fetched_bytes_total"].value() == counters["fetched_bytes"] > 0
    assert found["coco_reads_total"].value() == counters["reads"]
    assert found["coco_pulls_total"].value(kind="sealed") == 1
    assert found["coco_images_mounted"].value() == found["coco_images_attached"].value() == 1
    assert found["coco_image_fetched_bytes_total"].value(image=images.sealed().by_digest) == counters["fetched_bytes"]
    assert found["coco_snapshots"].value(kind="committed") >= 2
    assert found["coco_rpc_duration_seconds"].count(method="Prepare", code="ALREADY_EXISTS") >= 2
    assert found["coco_key_releases_total"].value(by="files", outcome="released") == 2
    assert found["coco_refusals_total"].value(reason="config-mismatch") >= 1
    for phase in ("resolve", "fetch", "key", "load", "attach", "mount"):
        assert found["coco_phase_duration_seconds"].count(phase=phase) >= 1, phase
    assert found["coco_fetch_duration_seconds"].count(outcome="ok") == counters["requests"]
    assert found["coco_decode_duration_seconds"].count() > 0
    assert {found["coco_up"].value(process=name) for name in ("keeper", "snapshotd", "blobd")} == {1}
    assert ready(address)
    check_names(set(found))


def check_names(found: set[str]) -> None:
    """What is written about metrics, and what there is."""
    documented = set(re.findall(r"^\| `(coco_[a-z_]+)", (CHECKOUT / "docs/monitoring.md").read_text(), re.MULTILINE))
    assert documented == found
    known = found | {f"{name}{suffix}" for name in found for suffix in ("_bucket", "_sum", "_count")}
    dashboard = json.loads((CHECKOUT / "deploy/grafana/dashboard.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    alerts = (CHECKOUT / "deploy/prometheus/alerts.yaml").read_text()
    asked = re.findall(r"expr: (.*)", alerts)
    assert len(shown) > 40
    assert len(asked) == alerts.count("- alert: ") > 8
    for expression in (*shown, *asked):
        names = set(NAME.findall(expression))
        assert names, expression
        assert names <= known, expression
    used = {name for expression in shown for name in NAME.findall(expression)}
    assert {name for name in found if not any(use.startswith(name) for use in used)} == set()


def test_a_frozen_blobd_is_seen_at_once_and_a_reload_moves_the_address(node: NodeMaker) -> None:
    guest, address = monitored(node)
    blobd = guest.daemon.pids()["blobd"]
    os.kill(blobd, signal.SIGSTOP)
    try:
        time.sleep(IN_STEP_SECONDS)
        begin = time.monotonic()
        found = scrape(address)
        assert time.monotonic() - begin < 5
        assert found["coco_up"].value(process="blobd") == 0
        assert found["coco_up"].value(process="keeper") == 1
        assert not ready(address)
        assert get(address, "/healthz") == (200, "ok\n")
    finally:
        os.kill(blobd, signal.SIGCONT)
    until(lambda: ready(address), "blobd answers again", 10)
    socket = guest.work.path / "monitor.sock"
    settings = guest.daemon.config.read_text()
    guest.daemon.config.write_text(settings.replace('"127.0.0.1:0"', f'"unix:{socket}"'))
    assert guest.daemon.process
    guest.daemon.process.signal(signal.SIGHUP)
    until(lambda: socket.exists() and ready(f"unix:{socket}"), "the new address answers", 20)
    with pytest.raises(OSError, match="refused"):
        get(address, "/healthz")
    assert not socket.stat().st_mode & 0o077
