"""Commands about images, on any machine and without root: `convert`, `inspect`, `check`."""

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.errors import InvalidArgument, MalformedImage

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapshotter.build.convert import Summary
    from snapshotter.build.options import Options
    from snapshotter.config import Config
    from snapshotter.crypto.secret import SecretBytes
    from snapshotter.keys.resource import ResourceUri

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

LOCATION = "docker://host[:port]/repository[:tag|@digest] or oci:DIR[:tag]"
_CONVERT = f"""\
Read the image SRC and write it to DST in the lazy format: sealed for the holders of keys (--recipient), or as a plain
Nydus image that everybody can read (--plain). SRC and DST are {LOCATION}.
The last line of the output is DST@sha256:… of the new manifest."""


def register(commands: "Commands") -> None:
    _register_convert(commands)
    inspect = commands.add_parser(
        "inspect",
        help="show what an image is made of",
        description="Show manifest, layers and, with a key, what is inside. Chunks are named by their ids; digests and "
        "keys of chunks are never shown.",
    )
    inspect.add_argument("image", metavar="REF", help=LOCATION)
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.add_argument("--tree", action="store_true", help="list the files")
    _common(inspect, keys=True)
    inspect.set_defaults(run=run_inspect)
    check = commands.add_parser(
        "check",
        help="verify every byte of an image",
        description="Read the whole image and verify it as a node would: digests, key, authentication, tables and "
        "every chunk. Exits with 0 only if all of it is right.",
    )
    check.add_argument("image", metavar="REF", help=LOCATION)
    _common(check, keys=True)
    check.set_defaults(run=run_check)


def _register_convert(commands: "Commands") -> None:
    convert = commands.add_parser(
        "convert",
        help="make an image lazy, and sealed",
        description=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = convert.add_argument
    add("source", metavar="SRC", help="image to read")
    add("target", metavar="DST", help="image to write")
    add(
        "--recipient",
        action="append",
        default=[],
        metavar="WHO",
        help="who can read it: jwe:PUB.pem, the holder of that private key; pkcs7:CERT.pem, the same by a certificate "
        "(RSA); kbs:///repository/type/tag=FILE, whoever gets that key from the key broker, FILE being the same 32 "
        "bytes; provider:NAME[:TEXT], whom a key provider of [keys] ocicrypt_config wraps for; may be repeated",
    )
    add("--plain", action="store_true", help="make a plain Nydus image, not confidential")
    add(
        "--domain",
        choices=("image", "tenant", "public"),
        default="image",
        help="where equal chunks may look equal: in this image (default), among images converted with the same "
        "--convergence-secret, or everywhere (only for content that is public anyway)",
    )
    add(
        "--convergence-secret",
        metavar="FILE",
        help="for --domain tenant: a file of 32 bytes or 64 hex digits, or kbs:///repository/type/tag: 32 bytes that "
        "the configured key broker ([keys.kbs] or [keys.cdh]) releases; another tag for each epoch",
    )
    add("--chunk-size", default="256KiB", metavar="N", help="power of two, 4KiB to 8MiB (default: 256KiB)")
    add("--codec", default="zstd:3", metavar="CODEC", help="zstd:1 … zstd:19, lz4 or none (default: zstd:3)")
    add(
        "--hide-config",
        choices=("all", "none"),
        default="none",
        help="all: leave command, environment and user out of the readable config of a sealed image",
    )
    add("--trace", type=Path, metavar="FILE", help="paths in order of first use, one a line: they are stored in front")
    add("--repository", metavar="HOST/REPO", default="", help="where the image will be pulled from, if not DST")
    add_sign_key(add)
    _common(convert)
    convert.set_defaults(run=run_convert)


def add_sign_key(add: "Callable[..., object]") -> None:
    add(
        "--sign-key",
        action="append",
        default=[],
        type=Path,
        metavar="PRIV.pem",
        help="sign the result with this private key, as cosign does; may be repeated",
    )


def _common(command: argparse.ArgumentParser, *, keys: bool = False) -> None:
    if keys:
        command.add_argument(
            "--key", action="append", default=[], type=Path, metavar="PRIV.pem", help="private key; may be repeated"
        )
    command.add_argument(
        "--platform",
        metavar="P",
        default=this_platform(),
        help="os/architecture[/variant] to take from an index (default: this machine's)",
    )
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration file; [registry], [keys] and [limits] are used"
    )


def load_config(arguments: argparse.Namespace) -> "Config":
    """The file given, else all defaults: these commands do not depend on the machine's configuration."""
    from snapshotter import config, log

    loaded = config.load(arguments.config)
    log.configure("warning", "console")
    return loaded


def run_convert(arguments: argparse.Namespace) -> int:
    config = load_config(arguments)
    options = _options(arguments, config)
    asyncio.run(_convert(arguments, config, options))
    return 0


def _options(arguments: argparse.Namespace, config: "Config") -> "Options":
    from snapshotter.build import trace
    from snapshotter.build.chunker import Codec
    from snapshotter.build.options import Options, load_recipient
    from snapshotter.config import Size

    try:
        chunk_size = Size.parse(arguments.chunk_size)
    except ValueError as error:
        raise InvalidArgument(f"--chunk-size: {error}") from error
    epoch = _source_date_epoch()
    return Options(
        recipients=tuple(load_recipient(text, config.keys.ocicrypt_config) for text in arguments.recipient),
        plain=arguments.plain,
        domain=arguments.domain,
        secret=_secret(arguments, config),
        chunk_size=chunk_size,
        codec=Codec.parse(arguments.codec),
        platform=arguments.platform,
        hide_config=arguments.hide_config,
        trace=tuple(trace.load(arguments.trace)) if arguments.trace else (),
        repository=repository_name(arguments),
        created=int(time.time()) if epoch is None else epoch,
        directory_mtime_ns=(epoch or 0) * 1_000_000_000,
    )


def repository_name(arguments: argparse.Namespace) -> str:
    """`--repository`, "" if not given. Raises InvalidArgument, BadReference."""
    from snapshotter.registry.reference import Reference

    if not arguments.repository:
        return ""
    repository = Reference.parse(arguments.repository)
    if repository.tag or repository.digest:
        raise InvalidArgument(f"--repository {arguments.repository!r}: write HOST/REPO, without tag and digest")
    return str(repository)


def _secret(arguments: argparse.Namespace, config: "Config") -> "SecretBytes":
    """S of the domain: random, public, from a file, or released by a key broker."""
    from snapshotter.build.options import convergence_secret
    from snapshotter.keys import configured

    text: str | None = arguments.convergence_secret
    if arguments.domain != "tenant" or text is None or not text.startswith("kbs:"):
        return convergence_secret(arguments.domain, Path(text) if text is not None else None, os.urandom(32))
    uri = resource(text, "--convergence-secret")

    async def released() -> "SecretBytes":
        return await configured.resources(config.keys).get(uri)

    secret = asyncio.run(released())
    if len(secret) != 32:
        raise InvalidArgument(f"--convergence-secret {uri}: {len(secret)} bytes instead of 32")
    return secret


def resource(text: str, option: str) -> "ResourceUri":
    """Raises InvalidArgument naming the option."""
    from snapshotter.keys.resource import ResourceUri

    try:
        return ResourceUri.parse(text)
    except MalformedImage as error:
        raise InvalidArgument(f"{option} {text[:80]!r}: {error}") from None


def _source_date_epoch() -> int | None:
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return None
    if not text.isdecimal():
        raise InvalidArgument(f"SOURCE_DATE_EPOCH: {text[:40]!r} is not a number of seconds")
    return int(text)


def this_platform() -> str:
    """The one images are chosen for on this machine."""
    machine = os.uname().machine
    return f"linux/{ {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(machine, machine) }"


async def _convert(arguments: argparse.Namespace, config: "Config", options: "Options") -> None:
    from snapshotter.build.convert import Converter
    from snapshotter.build.sign import load_signing_key, sign
    from snapshotter.cli.progress import Progress
    from snapshotter.registry.transport import open_location, parse_location

    source, target = parse_location(arguments.source), parse_location(arguments.target)
    keys = [load_signing_key(path) for path in arguments.sign_key]
    name = options.repository or target.reference.name
    if keys and not name:
        raise InvalidArgument("--sign-key: a signature names the image; give --repository HOST/REPO")
    progress = Progress()
    if options.domain == "public" and not options.plain:
        progress.note("domain public: everybody who has a file can tell that this image contains it")
    async with open_location(source, config) as reading, open_location(target, config) as writing:
        converter = Converter(reading, source.reference, writing, target.reference, options, config.limits, progress)
        summary = await converter.run()
        if keys:
            await sign(writing, target.reference, summary.manifest, name, keys, config.limits)
    progress.note(_summary(summary))
    print(f"{arguments.target}@{summary.manifest}")


def _summary(done: "Summary") -> str:
    from snapshotter.cli.progress import size

    rate = size(done.content_bytes / max(done.seconds, 0.001))
    return (
        f"{done.entries} entries, {size(done.content_bytes)} of files in {done.chunks} chunks\n"
        f"deduplicated {_ratio(done.content_bytes, done.chunk_bytes)}, "
        f"compressed {_ratio(done.chunk_bytes, done.stored_bytes)} to {size(done.stored_bytes)} "
        f"+ {size(done.bootstrap_bytes)} of metadata\n"
        f"{done.uploaded} objects written, {done.present} were there; {done.seconds:.1f} s, {rate}/s"
    )


def _ratio(before: int, after: int) -> str:
    return f"{before / after:.2f}:1" if after else "1:1"


def run_inspect(arguments: argparse.Namespace) -> int:
    from snapshotter.cli import inspection

    return asyncio.run(inspection.run(arguments, load_config(arguments)))


def run_check(arguments: argparse.Namespace) -> int:
    from snapshotter.cli import verification

    return asyncio.run(verification.run(arguments, load_config(arguments)))
