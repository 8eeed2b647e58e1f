"""Run a container from an encrypted image, lazily, and prove what that promises. Needs root on Debian 12."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from tests.demo import canary, proofs
from tests.demo.canary import Scan
from tests.demo.report import Figures, Report
from tests.demo.stage import MARK, Published, Stage, listing
from tests.demo.writes import WriteWatch
from tests.harness.containerd import Containerd
from tests.harness.machine import LeftBehindError, Work
from tests.harness.serve import Serve


def ordinary(stage: Stage, image: Published) -> tuple[Figures, str]:
    """containerd's own overlayfs: the full download."""
    containerd = stage.containerd("containerd-overlayfs", None)
    figures = stage.measure(containerd, image, None)
    files = listing(containerd, image.by_digest)
    containerd.remove_image(image.by_digest)
    containerd.process.stop()
    return figures, files


def confidential(stage: Stage, image: Published, expected: str) -> tuple[Figures, Scan, int]:
    """Our snapshotter in mode confidential, and every proof that needs it alive."""
    report = stage.report
    written = Scan(stage.canaries)
    with WriteWatch(
        [stage.work.path, stage.trusted, Path("/tmp"), Path("/run")], f"{MARK}=1", written.content
    ) as watch:
        daemon = stage.confidential(image)
        containerd = stage.containerd("containerd-coco", daemon)
        mark = stage.registry.mark()
        figures = stage.measure(containerd, image, daemon)
        proofs.no_layer_by_containerd(stage, image, containerd, mark)

        report.step("reading every file of the sealed image")
        proofs.same_files(report, listing(containerd, image.by_digest), expected)
        proofs.read_canaries(containerd, image, stage.canaries)

        report.step("flipping a byte on the registry")
        container = containerd.start(image.by_digest, "/bin/sleep", "10000")
        container.wait_running()
        proofs.flipped_byte(stage, image, container)
        container.kill()

        report.step("killing each process while a container reads")
        proofs.kills(stage, image, daemon, containerd, expected)

        report.step("who got the key")
        proofs.key_release(stage, image, daemon)

        report.step("searching for canaries, then letting the registry swap the image")
        scan = proofs.scan(daemon, image.link, stage.canaries, written)
        containerd.remove_image(image.by_digest)
        containerd.wait_for_no_snapshots()
        proofs.swaps(stage, image, daemon, containerd)
        containerd.process.stop()
        daemon.stop()
    if watch.overflowed:
        raise RuntimeError("the kernel dropped write events; the scan would be incomplete")
    return figures, scan, watch.files


def by_seal_only(stage: Stage, image: Published) -> None:
    """A node that demands sealed images but pins none."""
    settings = {"policy": {"require": "sealed"}, "keys": {"files": [str(stage.private_key)]}}
    daemon = Serve(stage.work, "sealed-only", settings)
    containerd = stage.containerd("containerd-sealed-only", daemon)
    proofs.swaps_without_pin(stage, image, daemon, containerd)
    containerd.process.stop()
    daemon.stop()


def whole_layers(stage: Stage, expected: str) -> Figures:
    """All layers are downloaded, decrypted and unpacked into the guest's memory before anything starts."""
    image = stage.encrypt("encrypted")
    daemon = stage.guest_with_key(image, "encrypted")
    containerd = stage.containerd("containerd-encrypted", daemon)
    figures = stage.measure(containerd, image, daemon)
    proofs.same_files(stage.report, listing(containerd, image.by_digest), expected, "skopeo_encrypted_image_runs")
    _leave(containerd, image, daemon)
    return figures


def plain(stage: Stage) -> tuple[Figures, Scan]:
    """The same image not encrypted: lazy too, and the scan must find every canary."""
    image = stage.convert("plain", "--plain")
    daemon = Serve(stage.work, "plain")
    containerd = stage.containerd("containerd-plain", daemon)
    figures = stage.measure(containerd, image, daemon)
    proofs.read_canaries(containerd, image, stage.canaries)
    scan = proofs.scan(daemon, image.link, stage.canaries)
    _leave(containerd, image, daemon)
    return figures, scan


def _leave(containerd: Containerd, image: Published, daemon: Serve) -> None:
    containerd.remove_image(image.by_digest)
    containerd.wait_for_no_snapshots()
    containerd.process.stop()
    daemon.stop()


def perform(stage: Stage) -> None:
    report = stage.report
    report.step("building a Debian + Python image of five layers")
    layout = stage.build()
    published = stage.publish_ordinary(layout)
    report.note(f"{sum(published.layers.values()) / 1e6:.1f} MB compressed, pushed as {published.by_tag}")

    report.step("converting it to a sealed image, for a KEK that the key broker holds, and for a key file")
    recipients = ("--recipient", stage.broker.recipient, "--recipient", f"jwe:{stage.public_key}")
    sealed = stage.convert("sealed", *recipients, "--hide-config", "all")
    report.note(f"{sum(sealed.layers.values()) / 1e6:.1f} MB, {sealed.by_digest}")

    report.step("pull and run with containerd's own overlayfs: full download")
    rows: dict[str, Figures] = {}
    rows["overlayfs, full pull"], expected = ordinary(stage, published)

    report.step("pull and run with coco-snapshotter, mode confidential, by digest")
    rows["coco-snapshotter, sealed"], scan, written = confidential(stage, sealed, expected)
    by_seal_only(stage, sealed)

    report.step("for comparison, what guests pull today: the same image, encrypted layer by layer by skopeo")
    rows["encrypted layers, full pull"] = whole_layers(stage, expected)

    report.step("the same scan on a plain conversion")
    rows["coco-snapshotter, plain"], plain_scan = plain(stage)
    proofs.canary(report, scan, written, plain_scan)
    report.table(rows)
    report.figures |= {name: asdict(row) for name, row in rows.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.parse_args()
    if os.geteuid() != 0:
        print("the demo mounts images and runs containers: it needs root", file=sys.stderr)
        return 2
    canary.self_check()
    report = Report()
    left = "left behind: nothing"
    work = Work("demo")
    try:
        with work:
            try:
                perform(Stage(work, report))
            except BaseException:
                _show_logs(work)
                raise
    except LeftBehindError as error:
        left = str(error)
    report.proof("ends_clean", left.endswith("nothing") and not work.path.exists() and not work.leftovers(), left)
    print(report.json())
    return 0 if report.ok else 1


def _show_logs(work: Work) -> None:
    """The last words of every process of the run, before its directory is removed."""
    for log in sorted(work.directory("log").glob("*.err")):
        lines = log.read_text(errors="replace").splitlines()[-8:]
        print(f"--- {log.stem}", *lines, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
