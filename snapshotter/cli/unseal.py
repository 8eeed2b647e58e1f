"""`unseal`: the secret behind a sealed secret, for what starts on this node."""

import argparse
import sys
from typing import TYPE_CHECKING

from snapshotter.cli import node
from snapshotter.errors import InvalidArgument

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def register(commands: "Commands") -> None:
    command = commands.add_parser(
        "unseal",
        help="open a sealed secret",
        description="Read a sealed secret (sealed.….….…, type vault) from standard input, verify who signed it, and "
        "write the secret to standard output. Key and secret come from the key broker of the configuration ([keys.kbs] "
        "or [keys.cdh]), after attestation. Write it to memory (/run), never to a disk.",
    )
    node.add_flags(command)
    command.set_defaults(run=run_unseal)


def run_unseal(arguments: argparse.Namespace) -> int:
    import asyncio

    from snapshotter import log
    from snapshotter.crypto.secret import SecretBytes
    from snapshotter.keys import configured, sealed

    _, config = node.load_config(arguments)
    log.configure("warning", "console")
    given = sys.stdin.buffer.read(sealed.TEXT_BYTES + 1)
    if not given.isascii():
        raise InvalidArgument("unseal: standard input is no sealed secret")
    text = given.decode()

    async def opened() -> SecretBytes:
        return await sealed.unseal(text, configured.resources(config.keys))

    with asyncio.run(opened()) as secret:
        sys.stdout.buffer.write(secret.expose())
    return 0
