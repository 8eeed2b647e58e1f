"""containerd's own suite for snapshotters, of two releases, through its proxy client against a running `serve`.

Each case is a test here, with what the Go program said about it. `go/` holds the programs' sources.
"""

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.clients import CLIENTS
from tests.conformance.client import Client
from tests.harness.machine import Work
from tests.harness.serve import Serve

pytestmark = pytest.mark.root

CASES = (
    "Basic", "StatActive", "StatComitted", "TransitivityTest", "PreareViewFailingtest", "Update", "Remove", "Walk",
    "LayerFileupdate", "RemoveDirectoryInLowerLayer", "Chown", "DirectoryPermissionOnCommit",
    "RemoveIntermediateSnapshot", "DeletedFilesInChildSnapshot", "MoveFileFromLowerLayer", "ViewReadonly", "StatInWalk",
    "CloseTwice", "RootPermission", "Rename", "128LayersMount",
)  # fmt: skip
_EVENT = re.compile(r"\s*(?:=== (?:RUN|PAUSE|CONT|NAME)\s+|--- (PASS|FAIL|SKIP): )TestSuite/(\S+)")
_SECONDS = 100


class Suite(NamedTuple):
    """One run: each case's outcome, and the lines about it."""

    name: str
    outcomes: dict[str, str]
    said: dict[str, list[str]]
    status: int
    end: str


@pytest.fixture(scope="module")
def served() -> Iterator[Serve]:
    with Work("go-suite") as work:
        yield Serve(work, settings={"log": {"level": "info"}})


@pytest.fixture(scope="module", params=["conformance-1.7", "conformance-2.4"])
def suite(request: pytest.FixtureRequest, served: Serve) -> Iterator[Suite]:
    client = CLIENTS[request.param]
    if not client.built:
        pytest.skip(f"{client.name} was not built (tests/setup.sh builds it)")
    with Work("go") as work:  # what the program leaves mounted is an error
        told = {"SNAPSHOTTER_ADDRESS": str(served.address), "SNAPSHOTTER_NAME": client.name, "TMPDIR": str(work.path)}
        result = subprocess.run(
            [client.program(), "-test.v"], env=work.environment | told, cwd=work.path, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=_SECONDS,
            check=False,
        )  # fmt: skip
        yield _read(client.name, result)


def _read(name: str, result: "subprocess.CompletedProcess[str]") -> Suite:
    outcomes: dict[str, str] = {}
    said = defaultdict(list)
    case = ""
    for line in result.stdout.splitlines():
        if event := _EVENT.match(line):
            case = event[2]
            if event[1]:
                outcomes[case] = event[1]
        said[case].append(line)
    return Suite(name, outcomes, said, result.returncode, result.stdout[-3000:])


@pytest.mark.parametrize("case", CASES)
def test_case(suite: Suite, case: str) -> None:
    assert suite.outcomes.get(case, "missing") == "PASS", "\n".join(suite.said[case]) or suite.end


def test_no_case_is_left_out_and_what_they_leave_can_be_collected(suite: Suite, served: Serve) -> None:
    assert suite.status == 0, suite.end
    assert set(suite.outcomes) == set(CASES)
    for number in range(1, len(CASES) + 1):
        collector = Client(served.address, f"{suite.name}-{number}", namespace="")
        parents = {info.name: info.parent for info in collector.walk()}
        while parents:
            for name in parents.keys() - set(parents.values()):
                collector.remove(name)
                del parents[name]
        collector.cleanup()
        collector.close()
    assert list(served.root.glob("snapshots/*")) == []
