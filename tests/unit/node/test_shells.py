"""Completion and manual, made from the parsers: in the real bash and man, and the same as what is committed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotter.cli import manual, tree
from snapshotter.cli.main import main, parser

CHECKOUT = Path(__file__).parents[3]
PAGE = CHECKOUT / "deploy" / "man" / "coco-snapshotter.1"
COMMANDS = {command.name: command for command in tree.commands(parser())}


def complete(script: str, *words: str, cwd: Path) -> set[str]:
    """What bash offers when tab is pressed behind the last word."""
    line = f"COMP_WORDS=({' '.join(f'{word!r}' for word in words)}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
    line += '_coco_snapshotter; printf "%s\\n" "${COMPREPLY[@]}"'
    result = subprocess.run(
        ["bash", "--norc", "-euc", f"{script}\n{line}"], capture_output=True, text=True, cwd=cwd, timeout=30
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return set(result.stdout.split())


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", "bash"]) == 0
    return capsys.readouterr().out


def test_bash_completes_commands_options_choices_and_files(script: str, tmp_path: Path) -> None:
    (tmp_path / "node.toml").touch()
    (tmp_path / "here").mkdir()
    program = "coco-snapshotter"
    assert complete(script, program, "", cwd=tmp_path) == {*COMMANDS, "--help", "--version"}
    assert complete(script, program, "s", cwd=tmp_path) == {"serve", "status"}
    assert complete(script, program, "prune", "--o", cwd=tmp_path) == {"--older"}
    assert complete(script, program, "convert", "--domain", "t", cwd=tmp_path) == {"tenant"}
    assert complete(script, program, "completion", "", cwd=tmp_path) == {"bash", "zsh", "fish"}
    assert complete(script, program, "status", "--config", "n", cwd=tmp_path) == {"node.toml"}
    assert complete(script, program, "serve", "--root", "", cwd=tmp_path) == {"here"}
    assert complete(script, program, "status", "--json", "--c", cwd=tmp_path) == {"--config"}
    assert complete(script, program, "inspect", "docker://x", "--t", cwd=tmp_path) == {"--tree"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_option_is_in_every_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", shell])
    text = capsys.readouterr().out
    for command in COMMANDS.values():
        assert command.name in text
        for option in command.switches:
            for flag in option.flags:
                assert (flag if shell != "fish" else flag.lstrip("-")) in text
    if found := shutil.which(shell):
        result = subprocess.run([found, "-n", "/dev/stdin"], input=text, capture_output=True, text=True, timeout=30)
        assert (result.returncode, result.stderr) == (0, "")


def test_the_committed_manual_is_what_is_made() -> None:
    command = [sys.executable, "-m", "snapshotter.cli.manual"]
    made = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    assert PAGE.read_text() == made.stdout, "python -m snapshotter.cli.manual >deploy/man/coco-snapshotter.1"


def test_groff_shows_the_manual_without_complaint() -> None:
    page = manual.page()
    shown = subprocess.run(
        ["groff", "-man", "-Tutf8", "-k", "-ww", "-rLL=100n", "-P-c", "-P-b", "-P-u"],
        input=page, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (shown.returncode, shown.stderr) == (0, "")
    text = " ".join(shown.stdout.split())
    for command in COMMANDS.values():
        assert f" {command.name} " in text
        for option in command.switches:
            assert option.flags[-1] in text or option.flags == ("-h", "--help")
    for words in ("EXIT STATUS", "130 interrupted", "/etc/coco-snapshotter/config.toml", "docs/troubleshooting.md"):
        assert words in text
