"""The command line: what a person sees, and the exit codes scripts rely on."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotter import __version__, control
from snapshotter.cli import main as cli
from snapshotter.errors import DigestMismatch

CHECKOUT = Path(__file__).parents[3]


def run(*arguments: str | Path, cwd: Path = CHECKOUT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "snapshotter", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "COLUMNS": "100"},
        timeout=60,
    )


def test_help_names_every_command_and_the_exit_codes() -> None:
    text = run("--help").stdout
    for word in ("serve", "status", "version", "exit codes"):
        assert word in text


@pytest.mark.parametrize("command", ["serve", "status", "version"])
def test_each_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) > 4


def test_version() -> None:
    assert run("version").stdout == f"coco-snapshotter {__version__}\n"


def test_version_and_help_load_nothing_heavy() -> None:
    code = "import sys; from snapshotter.cli.main import main; main(['version']); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert not {"grpc", "aiohttp", "cryptography", "msgspec"} & set(result.stdout.split())


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["serve", "--nonsense"], ["serve", "--conf", "x"], ["check", "--plat", "x", "y"]]
)
def test_wrong_arguments(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "usage:" in result.stderr


@pytest.mark.root
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[cache]\nqouta = 1\n", "qouta"),
        ("[cache]\nquota = '10 potatoes'\n", "$.cache.quota"),
        ("mode = 'closed'\n", "$.mode"),
        ("[cache]\nmin_free = -1\n", "$.cache.min_free"),
        ("[fetch]\nparallel = 0\n", "$.fetch.parallel"),
        ("[fetch]\nparallel = -1\n", "$.fetch.parallel"),
        ("[registry]\nretries = -1\n", "$.registry.retries"),
        ("[registry]\ntotal_timeout_seconds = nan\n", "$.registry.total_timeout_seconds"),
        ("[keys.kbs]\ntimeout_seconds = inf\n", "$.keys.kbs.timeout_seconds"),
        ("[registry]\nca_file = '/no/such.pem'\n", "/no/such.pem"),
        ("root = 'relative'\n", "absolute path"),
        ("mode = [\n", "config.toml"),
        ("[policy]\npins = ['host/repo:tag']\n", "policy.pins"),
        ("[keys]\nfiles = ['/nonexistent.pem']\n", "/nonexistent.pem"),
        ("[policy]\nfile = 'kbs:///a/b/c'\n", "policy.file: a kbs:/// resource needs keys.kbs.url"),
        ("[policy]\nfile = 'kbs:///a/b'\n[keys.cdh]\naddress = 'unix:///cdh'\n", "kbs:///a/b: resource: not kbs:///"),
        ("[policy]\nfile = '/policy.json'\nlookaside = 'ftp://x'\n", "policy.lookaside"),
        ("[policy]\ninitdata = '/no/initdata.toml'\n", "/no/initdata.toml: cannot be read"),
    ],
)
def test_serve_says_what_is_wrong_with_the_configuration(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    result = run("serve", "--config", tmp_path / "config.toml")
    assert result.returncode == 2
    assert result.stderr.startswith("coco-snapshotter: error: ")
    assert said in result.stderr
    assert "reason=" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.root
def test_confidential_serve_refuses_an_ordinary_disk(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("mode = 'confidential'\ntrusted_devices = ['/dev/null']\n")
    flags = ["--root", "/var/lib/coco-test", "--cache", tmp_path / "c", "--address", tmp_path / "s"]
    result = run("serve", "--config", tmp_path / "config.toml", *flags)
    assert result.returncode == 2
    assert "reason=untrusted-root" in result.stderr
    assert "put root on a tmpfs" in result.stderr
    assert not Path("/var/lib/coco-test").exists()


@pytest.mark.root
def test_serve_check_says_whether_it_could_serve_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f"root = '{tmp_path}/root'\n")
    result = run("serve", "--check", "--config", tmp_path / "config.toml")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not (tmp_path / "root").exists()
    (tmp_path / "root").mkdir(mode=0o755)
    with contextlib.closing(sqlite3.connect(tmp_path / "root" / "metadata.db")) as db:
        db.execute("PRAGMA user_version = 77")
    before = (tmp_path / "root" / "metadata.db").read_bytes()
    for flags in (["--check"], []):
        result = run("serve", *flags, "--config", tmp_path / "config.toml")
        assert result.returncode == 5
        assert "metadata.db has version 77" in result.stderr
        assert [path.name for path in (tmp_path / "root").iterdir()] == ["metadata.db"]
        assert (tmp_path / "root" / "metadata.db").read_bytes() == before


def test_status_of_a_node_that_does_not_run(tmp_path: Path) -> None:
    result = run("status", "--root", tmp_path)
    assert result.returncode == 10
    assert "no answer from keeper" in result.stderr


def test_status_document_has_exactly_the_promised_keys(tmp_path: Path) -> None:
    result = run("status", "--root", "here", "--json", cwd=tmp_path)
    assert result.returncode == 10
    document = json.loads(result.stdout)
    promised = ("version", "mode", "root", "cache_dir", "address", "pids", "images", "cache", "counters", "versions")
    assert tuple(document) == promised
    assert document["root"] == str(tmp_path / "here")
    assert tuple(document["pids"]) == ("keeper", "snapshotd", "blobd")
    assert set(document["cache"]) == {"bytes", "entries"}


def test_status_of_a_silent_process_names_it(tmp_path: Path) -> None:
    with control.listen(tmp_path / "keeper.sock") as listener:
        listener.shutdown(2)
        assert "keeper (Connection refused)" in run("status", "--root", tmp_path).stderr


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (
            DigestMismatch("blob x: not itself"),
            20,
            "coco-snapshotter: error: blob x: not itself [reason=digest-mismatch]",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, text: str
) -> None:
    def fail(_: object) -> int:
        raise raised

    monkeypatch.setattr("snapshotter.cli.node.run_version", fail)
    assert cli.main(["version"]) == code
    assert capsys.readouterr().err.strip() == text
