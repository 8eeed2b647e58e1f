"""`explain`: why a start was slow, told from what the workers remember of an image."""

import argparse
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from snapshotter.cli.housekeeping import ask
from snapshotter.cli.node import add_flags, load_config
from snapshotter.errors import InvalidArgument, NotFound, Unavailable

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

Story = dict[str, Any]


def register(commands: "Commands") -> None:
    command = commands.add_parser(
        "explain",
        help="say why a start was slow",
        description="Tell what happened to an image on this node and where the time went: pull, key release, mount, "
        "first read, what was fetched and who waited for it. The workers remember the start of an image and its last "
        "events in memory, until they are restarted.",
    )
    command.add_argument(
        "what", metavar="IMAGE|CONTAINER",
        help="a reference or a part of it, a manifest digest or its beginning, an id of ls, or a container's id",
    )  # fmt: skip
    add_flags(command)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from snapshotter.cli import story

    _, config = load_config(arguments)
    documents = []
    for told in _stories(config.root, arguments.what):
        served = _served(config.root, told["manifest"])
        counters = _summed(served.get("counters", {}))
        events = [*told["events"], *served.get("events", [])]
        found = story.account(events, counters, served.get("longest_waits", []))
        documents.append(
            {
                "manifest": told["manifest"],
                "references": told["references"],
                "ids": told["ids"],
                "dropped": told.get("dropped", 0) + served.get("dropped", 0),
                "counters": counters,
                **asdict(found),
            }
        )
    if arguments.json:
        print(json.dumps({"images": documents}))
    else:
        for document in documents:
            _print(document)
    return 0


def _stories(root: str, what: str) -> list[Story]:
    """The images that are meant. Raises NotFound, InvalidArgument if it could be several."""
    for field in ("image", "container"):
        if found := ask(root, "snapshotd", {"op": "explain", field: what})["images"]:
            return list(found)
    known = ask(root, "snapshotd", {"op": "explain"})["images"]
    likely = [image["manifest"] for image in known if _resembles(image, what)]
    if not likely:
        raise NotFound(f"{what[:200]}: no image or container of this name here", hint="coco-snapshotter ls")
    if len(likely) > 1:
        names = [name for image in known if image["manifest"] in likely for name in image["references"]]
        raise InvalidArgument(f"{what[:200]} could be any of {', '.join(names[:8])}")
    return list(ask(root, "snapshotd", {"op": "explain", "image": likely[0]})["images"])


def _resembles(image: Story, what: str) -> bool:
    digest = image["manifest"].removeprefix("sha256:")
    return digest.startswith(what.removeprefix("sha256:")) or any(what in name for name in image["references"])


def _served(root: str, manifest: str) -> Story:
    """What blobd knows of it: nothing if it was never attached, or does not answer."""
    with contextlib.suppress(Unavailable):
        for image in ask(root, "blobd", {"op": "explain", "image": manifest})["images"]:
            return dict(image)
    return {}


def _summed(counters: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """An image may be attached under several ids."""
    total: dict[str, int] = {}
    for counts in counters.values():
        for name, count in counts.items():
            total[name] = total.get(name, 0) + count
    return total


def _print(document: Mapping[str, Any]) -> None:
    from snapshotter.cli.table import plain

    names: Sequence[str] = document["references"]
    print(plain(names[0] if names else document["manifest"]))
    for name in [*names[1:], document["manifest"]]:
        print(f"    {plain(name)}")
    for sentence in document["summary"]:
        print(f"  {plain(sentence)}")
    print()
    for moment in document["timeline"]:
        seconds = f"{moment['seconds']:8.3f} s" if moment["seconds"] else " " * 10
        print(f"  {moment['at']:9.3f} s {seconds}  {plain(moment['text'])}")
    if document["dropped"]:
        print(f"  ({document['dropped']} events between the first and the last ones are not remembered)")
