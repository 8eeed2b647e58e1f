"""`recipients`: who can open an image, and changing that without a new conversion."""

import argparse
import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshotter.cli import image
from snapshotter.errors import InvalidArgument

if TYPE_CHECKING:
    from snapshotter.build.rewrap import EncryptedManifest
    from snapshotter.config import Config

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = f"""\
list shows for whom the layer keys of an encrypted image are wrapped. add opens them with a key of ours (--key, or
[keys] of --config) and wraps them for more recipients; remove takes recipients away. REF is {image.LOCATION}.
Only the manifest changes, under the same tag: no layer is fetched, and the last line of the output is
REF@sha256:… of the new one, which pins and signatures must name from now on. Where a registry is not trusted, give
REF as TAG@sha256:…, or it chooses the image whose key you hand on."""
_NOT_REVOKED = (
    "removing a recipient revokes nothing that it knows: it may have kept the layer key, the old manifest is still at "
    "the registry under its digest, and the layers are the same. Only a new conversion changes the keys."
)


def register(commands: "Commands") -> None:
    command = commands.add_parser(
        "recipients",
        help="list, add or remove who can open an image",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("action", choices=("list", "add", "remove"), help="what to do")
    add("image", metavar="REF", help="the image")
    add(
        "--recipient",
        action="append",
        default=[],
        metavar="WHO",
        help="add: as for convert; remove: kbs:///repository/type/tag, which packets name; may be repeated",
    )
    add(
        "--number",
        action="append",
        default=[],
        type=int,
        metavar="N",
        help="remove: a number that list shows, for recipients that are not named; may be repeated",
    )
    add("--key", action="append", default=[], type=Path, metavar="PRIV.pem", help="add: a private key that opens it")
    image.add_sign_key(add)
    add("--repository", metavar="HOST/REPO", default="", help="the name to sign, if not that of REF")
    add("--json", action="store_true", help="list: print one JSON object")
    add("--config", type=Path, metavar="FILE", help="configuration file; [registry], [keys] and [limits] are used")
    command.set_defaults(run=run_recipients)


def run_recipients(arguments: argparse.Namespace) -> int:
    config = image.load_config(arguments)
    _check(arguments)
    return asyncio.run(_list(arguments, config) if arguments.action == "list" else _change(arguments, config))


def _check(arguments: argparse.Namespace) -> None:
    """Options that say nothing for an action are refused rather than ignored."""
    signing = {"sign_key", "repository"}
    fitting = {"list": {"json"}, "add": {"recipient", "key"} | signing, "remove": {"recipient", "number"} | signing}
    for name in ("recipient", "number", "key", "sign_key", "repository", "json"):
        if getattr(arguments, name) and name not in fitting[arguments.action]:
            raise InvalidArgument(f"recipients {arguments.action}: --{name.replace('_', '-')} does not go with it")
    if arguments.action == "add" and not arguments.recipient:
        raise InvalidArgument("recipients add: give --recipient")
    if arguments.action == "remove" and bool(arguments.recipient) == bool(arguments.number):
        raise InvalidArgument("recipients remove: give either --recipient kbs:///… or --number")


async def _list(arguments: argparse.Namespace, config: "Config") -> int:
    from snapshotter.build.rewrap import EncryptedManifest
    from snapshotter.cli import table
    from snapshotter.keys import recipients
    from snapshotter.registry.transport import open_location, parse_location

    location = parse_location(arguments.image)
    async with open_location(location, config) as source:
        found = await EncryptedManifest.fetch(source, location.reference, config.limits)
    layers = [
        {
            "digest": layer.digest,
            "media_type": layer.media_type,
            "recipients": [entry._asdict() for entry in recipients.listed(layer.annotations, config.limits)],
        }
        for layer in found.layers.values()
    ]
    if arguments.json:
        print(json.dumps({"reference": str(location), "manifest": found.digest, "layers": layers}))
        return 0
    rows: list[tuple[object, ...]] = []
    for described in layers:
        entries: Any = described["recipients"]
        rows += [
            (
                str(described["digest"])[:19],
                entry["number"],
                entry["scheme"],
                entry["cipher"],
                entry["recipient"] or "-",
            )
            for entry in entries
        ]
    table.show(("LAYER", "NUMBER", "SCHEME", "CIPHER", "RECIPIENT"), rows)
    return 0


async def _change(arguments: argparse.Namespace, config: "Config") -> int:
    from snapshotter.build.rewrap import EncryptedManifest, check_target
    from snapshotter.build.sign import load_signing_key, sign
    from snapshotter.cli.progress import Progress
    from snapshotter.registry.transport import open_location, parse_location

    location = parse_location(arguments.image)
    check_target(location.reference)
    keys = [load_signing_key(path) for path in arguments.sign_key]
    name = image.repository_name(arguments) or location.reference.name
    if keys and not name:
        raise InvalidArgument("--sign-key: a signature names the image; give --repository HOST/REPO")
    async with open_location(location, config) as store:
        found = await EncryptedManifest.fetch(store, location.reference, config.limits)
        content = await _changed(found, arguments, config)
        digest = await found.publish(store, content)
        if keys:
            await sign(store, location.reference, digest, name, keys, config.limits)
    progress = Progress()
    progress.note(f"manifest {found.digest} is now {digest}: pins and signatures of the old one do not cover it")
    if arguments.action == "remove":
        progress.note(_NOT_REVOKED)
    print(f"{arguments.image.rpartition('@sha256:')[0] or arguments.image}@{digest}")
    return 0


async def _changed(found: "EncryptedManifest", arguments: argparse.Namespace, config: "Config") -> bytes:
    from snapshotter.build.options import load_recipient
    from snapshotter.cli.opened import key_provider

    if arguments.action == "add":
        wanted = [load_recipient(text, config.keys.ocicrypt_config) for text in arguments.recipient]
        return await found.add(key_provider(arguments.key, config), wanted, config.limits)
    keks = [image.resource(text, "--recipient") for text in arguments.recipient]
    return found.remove(arguments.number, keks, config.limits)
