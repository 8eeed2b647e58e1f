"""Keys: can those that are configured be used? What they are is never shown."""

import stat
from pathlib import Path
from urllib.parse import urlsplit

from snapshotter.cli.doctor.check import Check, Checks, Node, Result, Skipped, fail, ok, warn
from snapshotter.errors import ConfigError
from snapshotter.keys import configured


def providers(node: Node) -> Result:
    """Files are there and parse, options fit together."""
    keys = node.config.keys
    if not configured.any_configured(keys):
        found = "no keys are configured"
        if node.config.mode == "confidential":
            return warn(f"{found}: sealed images are refused", '[keys] files = ["/run/keys/node.pem"], or [keys.kbs]')
        return ok(found)
    try:
        configured.provider(keys)
    except ConfigError as error:
        if isinstance(error.__cause__, PermissionError):
            raise Skipped("only root may read the keys") from None
        return fail(str(error), error.hint or f"[keys] in {node.config_path or 'the configuration'}")
    sources = [f"{len(keys.files)} files"] if keys.files else []
    sources += ["ocicrypt providers"] if keys.ocicrypt_config else []
    sources += ["CDH"] if keys.cdh.address else []
    sources += ["KBS"] if keys.kbs.url else []
    return ok(", ".join(sources))


def secrecy(node: Node) -> Result:
    """Nobody but root may read key files."""
    files = node.config.keys.files
    if not files:
        raise Skipped("no key files")
    for name in files:
        try:
            status = node.machine.status(name)
        except FileNotFoundError:
            raise Skipped("keys says what is missing") from None
        if status.st_uid != 0 or status.st_mode & 0o077:
            return fail(
                f"{name} has owner {status.st_uid} and mode {stat.S_IMODE(status.st_mode):04o}",
                f"chown root {name}; chmod 600 {name}",
            )
    return ok("only root can read them")


def services(node: Node) -> Result:
    """Whoever releases keys can be reached. Whether they release one is for `image-key` to say."""
    kbs, cdh = node.config.keys.kbs, node.config.keys.cdh
    wanted = [("keys.kbs.url", kbs.url), ("keys.cdh.address", cdh.address)]
    if kbs.url and not kbs.insecure_sample_attester:
        evidence = ("keys.kbs.agent_socket", f"unix://{kbs.agent_socket}")
        wanted.append(evidence if kbs.attester == "agent" else ("keys.kbs.rest_url", kbs.rest_url))
    wanted = [(option, address) for option, address in wanted if address]
    if not wanted:
        raise Skipped("no key service is configured")
    for option, address in wanted:
        try:
            _connect(node, address)
        except PermissionError:
            raise Skipped(f"only root may talk to {address}") from None
        except OSError as error:
            why = error.strerror or str(error)
            return fail(f"{option} = {address!r}: {why}", f"start that service, or correct {option}; firewall, DNS")
    return ok(", ".join(address for _, address in wanted))


def _connect(node: Node, address: str) -> None:
    if address.startswith("unix://"):
        node.machine.peer(Path(address.removeprefix("unix://")))
        return
    url = urlsplit(address)
    node.machine.connect(url.hostname or "", url.port or (443 if url.scheme == "https" else 80))


CHECKS: Checks = (Check("keys", providers), Check("keys-secrecy", secrecy), Check("keys-services", services))
