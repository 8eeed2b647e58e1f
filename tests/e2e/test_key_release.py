"""Keys from a key broker, from the command line of the converter to a pull on a node."""

import hashlib
import json
import secrets
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Images, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.e2e.test_refusals import refused
from tests.harness import serve, tiny
from tests.harness.broker import NAME, Broker
from tests.harness.kbs import put
from tests.harness.machine import Work
from tests.unit.keys.test_sealed import NAME as SECRET
from tests.unit.keys.test_sealed import SIGNER, jwk
from tests.unit.keys.test_sealed import sealed as seal_secret


def check(work: Work, image: str, keys: Mapping[str, Any]) -> tuple[int, str]:
    """`check` of every byte of an image by a node's configuration."""
    path = work.directory("node") / "config.toml"
    path.write_text(serve.toml({"keys": keys}))
    result = serve.program(work, "check", image, "--config", path)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def sealed(work: Work) -> "tuple[Broker, str]":
    """A broker that wants the right initdata, and an image whose key it holds."""
    init_data = work.path / "init.toml"
    init_data.write_text('version = "0.1.0"\nalgorithm = "sha384"\n\n[data]\n"aa.toml" = "a = 1"\n')
    digest = hashlib.sha384(init_data.read_bytes()).hexdigest()
    broker = Broker(work, "--allow-sample", "--expect", f"init_data={digest}")
    source = tiny.layout(work.path / "source").path
    serve.convert(work, f"oci:{source}:tiny", f"oci:{work.path}/out:sealed", "--recipient", broker.recipient)
    return broker, f"oci:{work.path}/out:sealed"


def test_the_right_evidence_opens_and_the_wrong_one_does_not(work: Work, sealed: tuple[Broker, str]) -> None:
    broker, image = sealed
    right = broker.keys(init_data=str(work.path / "init.toml"))
    outputs = []
    for keys, code in ((right, 0), (right | {"kbs": right["kbs"] | {"tee_key": "RSA"}}, 0), (broker.keys(), 11)):
        status, output = check(work, image, keys)
        assert status == code, output
        outputs.append(output)
    assert "PolicyDeny" in output
    assert "reason=no-key" in output
    for secret in broker.secrets:
        assert secret not in "".join(outputs) + broker.process.output() + broker.process.errors()


def test_what_keeps_a_key_from_being_released(work: Work, sealed: tuple[Broker, str]) -> None:
    broker, image = sealed
    right = broker.keys(init_data=str(work.path / "init.toml"))
    other = Broker(work, "--allow-sample", label="other")  # same name, another key
    closed = Broker(work, label="closed")
    code, output = check(work, image, other.keys())
    assert (code, "does not open the layer key" in output) == (11, True), output
    assert check(work, image, closed.keys())[0] == 11
    agent = {"files": [], "kbs": {"url": broker.url, "agent_socket": str(work.path / "absent")}}
    assert check(work, image, agent)[0] == 10  # no agent, no evidence: it is not made up
    broker.process.stop()
    code, output = check(work, image, right | {"kbs": right["kbs"] | {"retries": 1}})
    assert (code, "Connect call failed" in output or "auth" in output) == (10, True), output


def test_one_image_for_a_key_file_and_a_broker(work: Work, sealed: tuple[Broker, str]) -> None:
    broker, _ = sealed
    private, public = serve.key_pair(work.path)
    image = f"oci:{work.path}/out:both"
    recipients = ["--recipient", f"jwe:{public}", "--recipient", broker.recipient]
    serve.convert(work, f"oci:{work.path}/source:tiny", image, *recipients)
    assert check(work, image, {"files": [str(private)]})[0] == 0
    assert check(work, image, broker.keys(init_data=str(work.path / "init.toml")))[0] == 0
    shown = serve.program(work, "inspect", image, "--json")
    layers = json.loads(shown.stdout)["layers"]
    assert layers[-1]["keys"] == ["jwe", "provider.attestation-agent"]


def test_a_convergence_secret_that_the_broker_releases(work: Work, sealed: tuple[Broker, str]) -> None:
    """Equal chunks stay equal for whoever gets the secret of the epoch, and for nobody else."""
    broker, _ = sealed
    keys = broker.keys(init_data=str(work.path / "init.toml"))
    secret = put(broker.directory, "tenant/convergence/epoch-1", secrets.token_bytes(32))
    put(broker.directory, "tenant/convergence/short", b"short")
    path = work.directory("converter") / "config.toml"
    path.write_text(serve.toml({"keys": keys}))

    def data(tag: str, source: str, *options: str | Path) -> list[str]:
        image = f"oci:{work.path}/out:{tag}"
        recipient = ["--recipient", broker.recipient, "--domain", "tenant"]
        serve.convert(work, f"oci:{work.path}/source:tiny", image, *recipient, "--convergence-secret", source, *options)
        layers = json.loads(serve.program(work, "inspect", image, "--json").stdout)["layers"]
        return [layer["digest"] for layer in layers if layer["role"] == "data"]

    released = data("a", "kbs:///tenant/convergence/epoch-1", "--config", path)
    assert released == data("b", str(secret))
    put(broker.directory, "tenant/convergence/epoch-2", secrets.token_bytes(32))
    assert released != data("c", "kbs:///tenant/convergence/epoch-2", "--config", path)
    configured: tuple[str | Path, ...] = ("--config", path)
    for name, options, word in (
        ("short", configured, "5 bytes instead of 32"),
        ("absent", configured, "PluginInternalError"),
        ("epoch-1", (), "keys.kbs.url"),
        ("a/b", (), "not kbs:///"),
    ):
        with pytest.raises(RuntimeError, match=word):
            data("d", f"kbs:///tenant/convergence/{name}", *options)


def test_a_sealed_secret_that_the_broker_releases(work: Work, sealed: tuple[Broker, str]) -> None:
    broker, _ = sealed
    put(broker.directory, SIGNER.removeprefix("kbs:///"), jwk())
    put(broker.directory, SECRET.removeprefix("kbs:///"), b"canary of a secret")
    path = work.directory("unseal") / "config.toml"
    path.write_text(serve.toml({"keys": broker.keys(init_data=str(work.path / "init.toml"))}))
    command = [*serve.PROGRAM, "unseal", "--config", str(path)]
    for given, code in ((seal_secret().encode(), 0), (seal_secret()[:-1].encode() + b"!", 11), (b"\xff\xfe", 2)):
        result = subprocess.run(
            command, input=given, capture_output=True, check=False, env=work.environment,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert result.returncode == code, result.stderr
        assert result.stdout == (b"" if code else b"canary of a secret")
        assert b"canary" not in result.stderr


def test_recipients_that_are_none(work: Work) -> None:
    source = tiny.layout(work.path / "source").path
    (work.path / "short").write_bytes(bytes(31))
    for recipient in (f"kbs:///a/b/c={work.path}/short", f"kbs:///a/b={work.path}/short", "kbs:///a/b/c=/absent"):
        result = serve.program(
            work, "convert", f"oci:{source}:tiny", f"oci:{work.path}/out:x", "--recipient", recipient
        )
        assert result.returncode == 2, result.stderr
        assert recipient.partition("=")[0] in result.stderr
    assert not (work.path / "out").exists()


@pytest.mark.root
@pytest.mark.real
@pytest.mark.parametrize("allowed", [True, False], ids=["right", "wrong"])
def test_a_node_pulls_with_a_key_of_the_broker(work: Work, node: NodeMaker, images: Images, allowed: bool) -> None:
    broker = Broker(work, *(["--allow-sample"] if allowed else []))
    image = images.sealed(1, "--recipient", broker.recipient, label=f"kbs-{allowed}".lower())
    guest = node(mode="confidential", keys=broker.keys())
    if allowed:
        assert guest.shell(guest.pull(image), READ_ALL) == expected()
    else:
        assert refused(guest, image) == "no-key"
    shown = serve.program(work, "audit", "--root", guest.daemon.root, "--json")
    assert shown.returncode == 0, shown.stderr
    entry = json.loads(shown.stdout.splitlines()[-1])
    outcome = "released" if allowed else "no-key"
    assert {"namespace": "k8s.io", "image": image.by_digest, "by": "kbs", "outcome": outcome}.items() <= entry.items()
    assert entry["kek"].split()[-1] == f"kbs:///{NAME}"  # of a refusal: everybody the layer is wrapped for
    for secret in broker.secrets:
        assert secret not in guest.daemon.log()
