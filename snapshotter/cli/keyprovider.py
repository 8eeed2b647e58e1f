"""`keyprovider`: layer keys wrapped and unwrapped for tools that speak the ocicrypt key provider protocol."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.cli import image
from snapshotter.errors import ConfigError, InvalidArgument

if TYPE_CHECKING:
    from snapshotter.config import Config
    from snapshotter.keyprovider.answers import Answers

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """\
Wrap and unwrap layer keys for tools that use ocicrypt (skopeo, ctr-enc), as their key provider "attestation-agent".
They are wrapped under a KEK given here, and unwrapped with one given here or else by [keys.cdh] or [keys.kbs] of
--config. Serves gRPC until SIGTERM; the first line of the output is its address. With --exec it answers one request,
from stdin to stdout. Everybody who can connect gets layer keys: of a loopback address every process of this machine,
of a Unix socket its owner."""


def register(commands: "Commands") -> None:
    command = commands.add_parser(
        "keyprovider",
        help="wrap and unwrap layer keys for skopeo and other tools",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--listen", metavar="HOST:PORT", help="loopback address, or unix:/path (default: 127.0.0.1:50000)")
    add("--exec", action="store_true", help='answer one request from stdin on stdout: a "cmd" of an ocicrypt.conf')
    add(
        "--kek",
        action="append",
        default=[],
        metavar="URI=FILE",
        help="a KEK to wrap and unwrap with, as kbs:///repository/type/tag=FILE of 32 bytes; may be repeated",
    )
    add("--allow-paths", action="store_true", help="let clients name files of KEKs, which this process then reads")
    add("--config", type=Path, metavar="FILE", help="configuration file; [keys.kbs], [keys.cdh] and [limits] are used")
    command.set_defaults(run=run_keyprovider)


def run_keyprovider(arguments: argparse.Namespace) -> int:
    import asyncio

    from snapshotter import log, memory
    from snapshotter.config import listen_address

    if arguments.exec and arguments.listen:
        raise InvalidArgument("keyprovider: give either --listen or --exec")
    memory.set_undumpable()
    config = image.load_config(arguments)
    answers = _answers(arguments, config)
    if arguments.exec:
        return asyncio.run(_once(answers))
    text = arguments.listen or "127.0.0.1:50000"
    try:
        address = listen_address(text)
    except ConfigError:
        raise InvalidArgument(f"--listen {text[:100]!r}: write HOST:PORT or unix:/path") from None
    log.configure("info", "console")
    asyncio.run(_serve(answers, address))
    return 0


def _answers(arguments: argparse.Namespace, config: "Config") -> "Answers":
    import msgspec

    from snapshotter.build.options import load_kek
    from snapshotter.keyprovider.answers import Answers
    from snapshotter.keys import configured

    broker = None
    if configured.has_broker(config.keys):
        # Not the file keys, which open no such packet, nor ocicrypt_config, which may lead back here.
        broker = configured.provider(msgspec.structs.replace(config.keys, files=(), ocicrypt_config=""))
    keks = [load_kek(text) for text in arguments.kek]
    if len({kek.uri for kek in keks}) != len(keks):
        raise InvalidArgument("--kek: a resource appears twice")
    return Answers(keks, broker, config.limits, allow_paths=arguments.allow_paths)


async def _once(answers: "Answers") -> int:
    from snapshotter.keyprovider.answers import REQUEST_BYTES

    reply = await answers.answer(sys.stdin.buffer.read(REQUEST_BYTES + 1))
    sys.stdout.buffer.write(reply)
    return 0


async def _serve(answers: "Answers", address: tuple[str, int] | str) -> None:
    import asyncio
    import signal

    from snapshotter.keyprovider.server import KeyProviderServer

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = KeyProviderServer(answers)
    print(await server.start(address), flush=True)
    await stop.wait()
    await server.stop()
