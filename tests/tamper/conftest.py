"""Images that were made honestly, and a copy of their registry for each test to be dishonest with."""

import shutil
from pathlib import Path

import pytest

from snapshotter.cli.main import main
from tests.harness import tiny
from tests.tamper.attacker import REPOSITORY, Keys, Registry, World


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("trust")
    keys, stranger = Keys.make(directory, "ours"), Keys.make(directory, "theirs")
    for seed in (1, 2):
        tiny.layout(directory / f"source-{seed}", seed=seed, config={"Entrypoint": ["/bin/cat", "/data/small"]})
    out = directory / "images"
    recipient = f"jwe:{keys.public}"
    convert = [
        ("app", 1, ["--recipient", recipient]),
        ("evil", 2, ["--recipient", recipient]),  # sealed to our public key, by somebody else
        ("foreign", 1, ["--recipient", f"jwe:{stranger.public}"]),
        ("plain", 1, ["--plain"]),
    ]
    for tag, seed, options in convert:
        assert (
            main(
                [
                    "convert",
                    f"oci:{directory}/source-{seed}:tiny",
                    f"oci:{out}:{tag}",
                    "--repository",
                    REPOSITORY,
                    *options,
                ]
            )
            == 0
        )
    shutil.copytree(directory / "source-1", out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("index.json"))
    return World(keys, stranger, out)


@pytest.fixture
def registry(made: World, tmp_path: Path) -> Registry:
    shutil.copytree(made.layout, tmp_path / "registry")
    return Registry(tmp_path / "registry")
