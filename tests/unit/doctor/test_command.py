"""`doctor` as a person and as a script meet it; and containerd's own word on the files that we tell people to merge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotter.cli.doctor import client, command, image
from snapshotter.cli.doctor.check import Node
from snapshotter.cli.doctor.machine import ThisMachine
from snapshotter.cli.main import main
from snapshotter.config import Config, Registry
from tests.clients import CLIENTS

CHECKOUT = Path(__file__).parents[3]
DEPLOY = CHECKOUT / "deploy" / "containerd"
ABOUT_FILES = {check.id: check for check in client.CHECKS if check.run not in (client.socket, client.loaded)}


@pytest.fixture(autouse=True)
def _logging_stays_as_tests_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapshotter.log.configure", lambda *_: None)


def doctor(*flags: str | Path) -> int:
    return main(["doctor", *map(str, flags)])


def test_json_names_every_check_and_the_exit_code_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.toml"
    flags = (
        "--config",
        config,
        "--root",
        tmp_path,
        "--containerd-config",
        tmp_path / "none",
        "--containerd",
        "no.sock",
    )
    config.write_text("[cache]\nqouta = 1\n")
    assert doctor(*flags, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [check["id"] for check in found["checks"]] == [check.id for check in command.checks()]
    assert all(set(check) == {"id", "status", "found", "advice"} for check in found["checks"])
    assert {check["id"] for check in found["checks"] if check["status"] == "fail"} >= {"config"}
    assert doctor(*flags) == 1
    text = capsys.readouterr().out
    assert "FAIL  config " in text
    assert "qouta" in text
    assert "docs/troubleshooting.md" in text


@pytest.mark.root
def test_a_sound_configuration_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--root", tmp_path / "root", "--containerd-config", tmp_path / "none", "--containerd", tmp_path / "none")
    code = doctor(*flags, "--json")
    found = json.loads(capsys.readouterr().out)
    failed = [check for check in found["checks"] if check["status"] == "fail"]
    assert (code, failed) == (0, [])


def test_a_registry_that_cannot_be_reached() -> None:
    settings = Config(registry=Registry(retries=0))
    node = Node(ThisMachine(), settings, image="docker://127.0.0.1:9/team/app:1")
    found = {check.id: command.result(node, check) for check in image.CHECKS}
    assert found["image-manifest"].status == "fail"
    assert found["image-manifest"].advice.startswith("the registry, DNS")
    assert {result.status for name, result in found.items() if name != "image-manifest"} == {"skip"}


@pytest.mark.root
def test_anybody_may_run_it() -> None:
    """Without root there are skips, not tracebacks. Modules are loaded first: the checkout may be closed to others."""
    code = (
        "import os, sys; from snapshotter.cli.doctor import command; from snapshotter.cli.main import main; "
        "command.checks(); os.setuid(65534); sys.exit(main(['doctor', '--json']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, timeout=60)
    assert "Traceback" not in result.stderr, result.stderr
    found = {check["id"]: check["status"] for check in json.loads(result.stdout)["checks"]}
    assert found["privileges"] == "warn"
    assert found["root-directory"] == "skip"


@pytest.mark.real
@pytest.mark.parametrize(
    ("release", "name", "worse"),
    [
        ("debian", "containerd-1.toml", set()),
        ("containerd-1.7", "containerd-1.toml", set()),
        ("containerd-2.4", "containerd-1.toml", {"containerd-unpack", "containerd-transfer"}),
        ("containerd-2.4", "containerd-2.toml", set()),
        ("debian", "containerd-2.toml", {"containerd-tables", "containerd-annotations", "containerd-snapshotter"}),
    ],
)
def test_the_files_in_deploy_satisfy_containerd(
    release: str, name: str, worse: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every containerd's own `config dump`, which migrates old files and knows all defaults."""
    if release != "debian":
        assert CLIENTS[release].built, "python3 -m tests.clients builds it"
        monkeypatch.setenv("PATH", f"{CLIENTS[release].home}:{os.environ['PATH']}")
    node = Node(ThisMachine(), Config(), containerd_path=DEPLOY / name)
    found = {name: command.result(node, check) for name, check in ABOUT_FILES.items()}
    assert node.containerd.dumped
    bad = {name for name, result in found.items() if result.status in ("warn", "fail")}
    assert bad - {"containerd-restart"} == worse, found


@pytest.mark.real
def test_what_2x_forgets_of_an_old_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file, without the table of runtimes: containerd's dump shows that the keys are gone."""
    assert CLIENTS["containerd-2.4"].built, "python3 -m tests.clients builds it"
    monkeypatch.setenv("PATH", f"{CLIENTS['containerd-2.4'].home}:{os.environ['PATH']}")
    path = tmp_path / "config.toml"
    path.write_text((DEPLOY / "containerd-1.toml").read_text().partition("  # Not needed by 1.x")[0])
    node = Node(ThisMachine(), Config(), containerd_path=path)
    assert command.result(node, ABOUT_FILES["containerd-migration"]).status == "fail"
    assert command.result(node, ABOUT_FILES["containerd-annotations"]).status == "fail"
    assert command.result(node, ABOUT_FILES["containerd-snapshotter"]).found == "pods use overlayfs"
