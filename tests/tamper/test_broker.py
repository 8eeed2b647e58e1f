"""A key broker that fails in any way, or somebody between: the pull is refused, nothing stays, and once it is well the
same node pulls the same image."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from snapshotter.cli.main import main
from snapshotter.config import Kbs
from snapshotter.keys.attesters import SampleAttester
from snapshotter.keys.kbs import KbsClient
from tests.harness.kbs import Between, kbs_dev, put, times
from tests.tamper.attacker import REPOSITORY, Node, Registry, World, refused

KEK, NAME = b"canary-canary-canary-canary-can!", "default/image-kek/app"
STEPS = ("auth", "attest", "resource")


@pytest.fixture(scope="module")
def sealed(made: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that only the broker's KEK opens, in a layout."""
    out = tmp_path_factory.mktemp("broker")
    (out / "kek").write_bytes(KEK)
    source, recipient = f"oci:{made.layout.parent}/source-1:tiny", f"kbs:///{NAME}={out}/kek"
    command = ["convert", source, f"oci:{out}/images:app", "--repository", REPOSITORY, "--recipient", recipient]
    assert main(command) == 0
    return out / "images"


@pytest.fixture
def registry(sealed: Path, tmp_path: Path) -> Registry:
    shutil.copytree(sealed, tmp_path / "registry")
    return Registry(tmp_path / "registry")


@pytest.fixture
async def between(tmp_path: Path) -> AsyncIterator[Between]:
    put(tmp_path / "resources", NAME, KEK)
    server = await kbs_dev(tmp_path / "resources")
    async with Between(server.url) as made:
        yield made
    await server.stop()


def client(between: Between) -> KbsClient:
    return KbsClient(Kbs(url=between.url, timeout_seconds=1, retries=1), SampleAttester())


def hang(between: Between, step: str) -> None:
    async def before(request: web.Request) -> web.StreamResponse | None:
        return await between.hang(request) if step in request.path else None

    between.before = before


def answer(status: int) -> Any:
    def fault(between: Between, step: str) -> None:
        between.before = times(99, status, path=step)

    return fault


def cut(between: Between, step: str) -> None:
    between.after = lambda seen, body: body[:-3] if seen.startswith(step) else body


FAULTS = {
    "hangs": (hang, "unavailable"),
    "401": (answer(401), "no-key"),
    "403": (answer(403), "no-key"),
    "500": (answer(500), "unavailable"),
    "is cut short": (cut, "no-key"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_broker_that_fails(registry: Registry, between: Between, tmp_path: Path, step: str, fault: str) -> None:
    broker = client(between)
    node = Node(registry, None, tmp_path, "confidential", broker=broker)
    break_it, reason = FAULTS[fault]
    break_it(between, step)
    error = await refused(node, registry, registry.digest("app"), reason)
    assert "canary" not in str(error)
    assert len(broker._cache) == 0, "no key is kept"
    between.before = between.after = None
    assert (await node.prepare(registry, registry.digest("app"))).kind == "data"
    assert len(broker._cache) == 1


@pytest.mark.parametrize("step", STEPS)
async def test_a_broker_that_is_restarted_in_the_middle(tmp_path: Path, registry: Registry, step: str) -> None:
    put(tmp_path / "resources", NAME, KEK)
    server = await kbs_dev(tmp_path / "resources")
    async with Between(server.url) as between:

        async def before(request: web.Request) -> None:
            nonlocal server
            if step in request.path:
                between.before = None
                await server.stop()
                server = await kbs_dev(tmp_path / "resources")  # other sessions, another signer of tokens
                between.upstream = server.url

        between.before = before
        node = Node(registry, None, tmp_path, "confidential", broker=client(between))
        assert (await node.prepare(registry, registry.digest("app"))).kind == "data"
        assert between.requests.count("auth") == (1 if step == "auth" else 2)
    await server.stop()
    for path in (*node.cache.rglob("*"), *(tmp_path / "registry").rglob("*")):
        assert not path.is_file() or KEK not in path.read_bytes(), f"the key is in {path}"
