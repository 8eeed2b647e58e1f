"""Policy and keys that a node gets from its key broker and from its initdata: what runs, what is logged, what ends."""

import base64
import hashlib
import itertools
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from snapshotter.crypto.secret import SecretBytes
from snapshotter.keys.packet import ANNOTATION, Packet
from tests.e2e.conftest import Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.e2e.test_recipients import recipients
from tests.e2e.test_signatures import refusal
from tests.harness import serve
from tests.harness.broker import NAME, Broker
from tests.harness.kbs import put
from tests.harness.machine import Work
from tests.harness.process import Process

pytestmark = [pytest.mark.root, pytest.mark.real]

POLICY, SIGNER = "default/policy/node", "default/signer/author"


def keys_asked_for(guest: Node) -> int:
    shown = serve.program(guest.work, "audit", "--root", guest.daemon.root, "--json")
    assert shown.returncode == 0, shown.stderr
    return len(shown.stdout.splitlines())


def test_a_trust_policy_and_its_keys_from_the_broker(node: NodeMaker, images: Images, work: Work) -> None:
    broker = Broker(work, "--allow-sample")
    private, public = serve.key_pair(work.path, "author")
    put(broker.directory, SIGNER, public.read_bytes())
    signing: list[str | Path] = ["--recipient", broker.recipient, "--sign-key", private]
    signed, other = (images.sealed(seed, *signing, label="kbs-signed") for seed in (1, 3))
    unsigned = images.sealed(2, "--recipient", broker.recipient, label="kbs-unsigned")
    scope = f"{images.registry.address}/{images.repository}"

    def state(*requirements: Any) -> None:
        document = {"default": [{"type": "reject"}], "transports": {"docker": {scope: requirements}}}
        put(broker.directory, POLICY, json.dumps(document).encode())

    identity = {"type": "matchRepository"}
    state({"type": "sigstoreSigned", "keyPath": f"kbs:///{SIGNER}", "signedIdentity": identity})
    guest = node(mode="confidential", keys=broker.keys(cache_seconds=0), policy={"file": f"kbs:///{POLICY}"})
    assert "reason=unauthentic-image" in refusal(guest, unsigned)
    assert keys_asked_for(guest) == 0, "policy is decided first"
    guest.containerd.cri.pull(signed.by_tag)
    assert guest.shell(signed.by_tag, READ_ALL) == expected()
    asked = keys_asked_for(guest)
    state({"type": "reject"})
    assert "rejected by the trust policy" in refusal(guest, other)
    put(broker.directory, POLICY, b'{"default": [')
    assert "reason=config" in refusal(guest, other)
    (broker.directory / POLICY).unlink()
    assert "reason=no-key" in refusal(guest, other)
    put(broker.directory, POLICY, b" " * (2 << 20))
    assert "reason=" in refusal(guest, other)
    broker.process.stop()
    assert "reason=unavailable" in refusal(guest, other)
    assert keys_asked_for(guest) == asked, "without its policy nobody is asked for a layer key"
    assert guest.shell(signed.by_tag, READ_ALL) == expected(), "what was admitted runs on"


def write_initdata(path: Path, policy: str) -> str:
    """Its SHA-384."""
    path.write_text(
        f"version = \"0.1.0\"\nalgorithm = \"sha384\"\n[data]\n\"coco-snapshotter.toml\" = '''\n{policy}'''\n"
    )
    return hashlib.sha384(path.read_bytes()).hexdigest()


def test_pins_of_the_initdata_that_is_attested(node: NodeMaker, images: Images, work: Work) -> None:
    init_data = work.path / "initdata.toml"
    recipient = f"kbs:///{NAME}={work.path}/kek"
    (work.path / "kek").write_bytes(bytes(range(32)))
    pinned, other = (images.sealed(seed, "--recipient", recipient, label="initdata") for seed in (1, 2))
    digest = write_initdata(init_data, f'[policy]\npins = ["{pinned.by_digest}"]\n')
    broker = Broker(work, "--allow-sample", "--expect", f"init_data={digest}")
    put(broker.directory, NAME, bytes(range(32)))
    policy = {"initdata": str(init_data)}
    guest = node(mode="confidential", keys=broker.keys(), policy=policy)
    with pytest.raises(Exception, match="not one of the pins of its repository"):
        guest.pull(other)
    guest.containerd.cri.pull(pinned.by_tag)
    assert guest.shell(pinned.by_tag, READ_ALL) == expected()
    # A host that gives the machine another policy gets nothing from the broker.
    write_initdata(init_data, f'[policy]\npins = ["{other.by_digest}"]\n')
    cheated = node(name="cheated", mode="confidential", keys=broker.keys(), policy=policy)
    with pytest.raises(Exception, match="reason=no-key"):
        cheated.pull(other)
    for text, said in (("[policy]\nnonsense = 1\n", "nonsense"), ("[keys]\n", "holds [policy] and nothing else")):
        write_initdata(init_data, text)
        result = serve.program(work, "serve", "--check", "--config", cheated.daemon.config)
        assert (result.returncode, said in result.stderr) == (2, True), result.stderr


def test_the_log_names_the_rule_that_admitted_an_image(node: NodeMaker, images: Images, work: Work) -> None:
    """Signatures: test_signatures.py."""
    broker = Broker(work, "--allow-sample")
    image = images.sealed(1, "--recipient", broker.recipient, label="rules")
    scope = f"{images.registry.address}/{images.repository}"
    by_kek = {"name": scope, "secret_kek": True, "recipients": [f"kbs:///{NAME}"]}
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("open", image.by_tag, {"mode": "open"}),
        ("reference-digest", image.by_digest, {"mode": "confidential"}),
        ("pin", image.by_tag, {"mode": "confidential", "policy": {"pins": [image.by_digest]}}),
        ("secret-kek", image.by_tag, {"mode": "confidential", "policy": {"repositories": [by_kek]}}),
    ]
    for rule, reference, settings in cases:
        guest = node(name=rule, keys=broker.keys(), **settings)
        guest.containerd.cri.pull(reference)
        [admitted] = [event for event in guest.daemon.events() if event["event"] == "image admitted"]
        assert (admitted["image"], admitted["manifest"], admitted["rule"]) == (reference, image.digest, rule)
        assert guest.daemon.terminate() == 0
        guest.containerd.process.stop()


def spellings(secret: bytes) -> list[bytes]:
    encoded = (base64.b64encode(secret), base64.urlsafe_b64encode(secret).rstrip(b"="))
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), *encoded]


def holders(directories: list[Path], needles: list[bytes]) -> set[Path]:
    found = set()
    for top, _, names in itertools.chain.from_iterable(map(os.walk, directories)):
        for path in (Path(top, name) for name in names):
            with suppress(FileNotFoundError):  # of a snapshot that is collected meanwhile
                if path.is_file() and any(needle in path.read_bytes() for needle in needles):
                    found.add(path)
    return found


def test_keys_are_in_no_file_of_a_node(node: NodeMaker, images: Images, work: Work) -> None:
    broker = Broker(work, "--allow-sample")
    image = images.sealed(1, "--recipient", broker.recipient, label="nowhere")
    guest = node(mode="confidential", keys=broker.keys())
    assert guest.shell(guest.pull(image), READ_ALL) == expected()
    kek = broker.key.read_bytes()
    annotation = image.manifest["layers"][-1]["annotations"][ANNOTATION]
    with Packet.parse(base64.b64decode(annotation)).open(SecretBytes(kek)) as options:
        layer_key = base64.b64decode(json.loads(options.expose())["symkey"])
    everywhere = [guest.daemon.root, guest.daemon.cache, guest.containerd.home, guest.daemon.config.parent]
    assert holders(everywhere, [annotation.encode()]), "a search that finds what is there: the wrapped key"
    assert not holders(everywhere, spellings(kek) + spellings(layer_key))
    told = guest.daemon.log() + json.dumps(guest.containerd.ctr("snapshots", "--snapshotter", "coco", "ls"))
    assert not [text for text in spellings(kek)[1:] + spellings(layer_key)[1:] if text.decode() in told]


def test_a_kek_is_rotated_as_the_runbook_says(node: NodeMaker, images: Images, work: Work) -> None:
    broker = Broker(work, "--allow-sample")
    image = images.sealed(1, "--recipient", broker.recipient, label="rotated")
    new = put(broker.directory, "default/image-kek/app-2", bytes(range(32)))
    config = work.path / "operator.toml"
    config.write_text(serve.toml({"keys": broker.keys()}))
    added: list[str | Path] = ["--recipient", f"kbs:///default/image-kek/app-2={new}", "--config", config]
    both = recipients(work, "add", image, *added)
    changed = recipients(work, "remove", both, "--recipient", f"kbs:///{NAME}")
    guest = node(mode="confidential", keys=broker.keys())
    container = guest.containerd.start(guest.pull(image), "/bin/sleep", "1000")
    container.wait_running()
    try:
        broker.key.unlink()
        later = node(name="later", mode="confidential", keys=broker.keys())
        assert later.shell(later.pull(changed), READ_ALL) == expected()
        fresh = node(name="fresh", mode="confidential", keys=broker.keys())
        with pytest.raises(Exception, match="reason=no-key"):
            fresh.pull(image)
        assert container.exec("/bin/sh", "-c", READ_ALL).stdout == expected(), "what is attached stays readable"
    finally:
        container.kill()


@pytest.mark.parametrize("way", ["UnWrapKey", "GetResource", "REST"])
def test_a_key_of_a_confidential_data_hub(node: NodeMaker, images: Images, work: Work, way: str) -> None:
    key, socket = work.path / "kek", work.path / "cdh.sock"
    key.write_bytes(bytes(range(32)))
    image = images.sealed(1, "--recipient", f"kbs:///{NAME}={key}", label=f"cdh-{way.lower()}")
    command: list[str | Path] = [sys.executable, "-m", "tests.harness.cdh", socket, NAME, key]
    hub = Process(work, "cdh", command, environment={"PYTHONPATH": str(Path(__file__).parents[2])})
    hub.wait_until(lambda: "\n" in hub.output(), "it listens")
    address = hub.output().strip() if way == "REST" else f"unix://{socket}"
    cdh = {"address": address, "unwrap": "cdh" if way == "UnWrapKey" else "here"}
    guest = node(mode="confidential", keys={"files": [], "cdh": cdh})
    assert guest.shell(guest.pull(image), READ_ALL) == expected()
    *_, entry = map(json.loads, serve.program(work, "audit", "--root", guest.daemon.root, "--json").stdout.splitlines())
    assert (entry["by"], entry["outcome"], entry["image"]) == ("cdh", "released", image.by_digest)
