"""What every test relies on: tiers, capabilities, logs under watch, and a machine that is left as it was found.

Under CI=true nothing may be skipped: a skip is a failure. Elsewhere a test that lacks root, a kernel feature, a program
or the reference fixtures is skipped with the reason.
"""

import logging
import os
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

from tests.harness import debian, machine

ROOT = Path(__file__).parents[1]
CI = os.environ.get("CI") == "true"
TIERS = ("unit", "property", "tamper", "conformance", "kill", "e2e")
_PROGRAMS = ("containerd", "ctr", "runc", "docker-registry", "skopeo", "busybox", "openssl")
_SESSION = "COCO_TEST_SESSION"


settings.register_profile("default", deadline=None)  # a busy machine is no failure
settings.register_profile("soak", deadline=None, max_examples=5000 * int(os.environ.get("COCO_SOAK", "1")))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# capabilities and markers


def missing_for_root() -> str:
    """Why this process cannot mount what the product mounts; empty when it can."""
    if os.geteuid() != 0:
        return "needs root"
    filesystems = Path("/proc/filesystems").read_text().split()
    absent = [name for name in ("erofs", "overlay", "fuse") if name not in filesystems]
    if absent:
        return f"the kernel has no {', '.join(absent)}"
    return "" if os.path.exists("/dev/fuse") else "no /dev/fuse"


def missing_for_real() -> str:
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (tests/setup.sh installs them)" if absent else missing_for_root()


def reference_fixtures() -> Path | None:
    """Images made by other tools: $COCO_FIXTURES, or the directory beside the checkout."""
    named = os.environ.get("COCO_FIXTURES")
    path = Path(named) if named else ROOT.parent / "shared" / "fixtures"
    return path if path.is_dir() else None


def pytest_report_header() -> list[str]:
    kernel = os.uname().release
    return [
        f"coco: CI={CI} uid={os.geteuid()} kernel={kernel} cpus={os.cpu_count()}",
        f"coco: root tiers: {missing_for_root() or 'yes'}; real tiers: {missing_for_real() or 'yes'}; "
        f"reference fixtures: {'yes' if reference_fixtures() else 'no'}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the cheap tiers first."""
    items.sort(key=lambda item: TIERS.index(tier) if (tier := _tier(item.path)) in TIERS else -1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, reason in (("root", missing_for_root), ("real", missing_for_real)):
        if item.get_closest_marker(marker) and (why := reason()):
            pytest.skip(why)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped, which CI=true forbids: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself as a whole."""
    report = yield
    if CI and report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid}: skipped, which CI=true forbids: {report.longrepr}"
    return report


# tiers in the summary


def _tier(path: Path) -> str:
    try:
        return path.relative_to(ROOT / "tests").parts[0]
    except ValueError:
        return ""


class _Tiers:
    """Counts outcomes and seconds per tier."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tier = _tier(ROOT / report.nodeid.partition("::")[0])
        self.seconds[tier] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[tier][report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("tiers")
        for tier, outcomes in self.outcomes.items():
            counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
            terminalreporter.write_line(f"{tier:12} {counts:40} {self.seconds[tier]:7.1f} s")


# a clean machine


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Tiers(), "coco-tiers")
    os.environ[_SESSION] = f"{os.getpid()}-{time.time_ns()}"  # inherited by whatever a test starts
    for run in machine.Work.abandoned():
        print(f"coco: removing what a killed run left in {run.path}")
        run.remove()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A test that leaves a process or a mount behind makes the session fail, whichever test it was."""
    marker = f"{_SESSION}={os.environ[_SESSION]}"
    left = [pid for pid in machine.processes_with(marker, marker) if machine.parent(pid) != os.getpid()]
    found = [f"process {pid} {machine.command_line(pid)}" for pid in left]
    machine.kill_all(left)
    if factory := getattr(session.config, "_tmp_path_factory", None):
        base = str(factory.getbasetemp())
        targets = [mount.target for mount in machine.mounts() if mount.target.startswith(base)]
        found += [f"mount {target}" for target in targets]
        for target in reversed(targets):
            machine.unmount(target) or machine.unmount(target, detach=True)
    if found:
        print("\ncoco: left behind by this session: " + "; ".join(found))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# logs


@pytest.fixture(scope="session", autouse=True)
def _structlog_into_logging() -> None:
    """Events become stdlib records, so that caplog sees them."""
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.stdlib.render_to_log_kwargs],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


@pytest.fixture(autouse=True)
def _no_undeclared_warnings(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A WARNING or worse that a test does not declare with `allow_warnings` is a failure."""
    yield
    if request.node.get_closest_marker("allow_warnings"):
        return
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    loud = [f"{r.levelname} {r.name}: {r.getMessage()}" for r in records if r.levelno >= logging.WARNING]
    if loud:
        pytest.fail("undeclared log records:\n" + "\n".join(loud), pytrace=False)


# fixtures


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Reference images made by other tools. Skips where they are not present, which CI=true turns into a failure."""
    path = reference_fixtures()
    if path is None:
        pytest.skip("no reference fixtures: set COCO_FIXTURES")
    return path


@pytest.fixture(scope="session")
def nydus_image() -> str:
    """The stock tool that must accept plain images and refuse sealed ones: on the path, or where setup.sh builds it."""
    found = shutil.which("nydus-image", path=f"{os.environ.get('PATH', '')}:{debian.cache_directory() / 'bin'}")
    if found is None:
        pytest.skip("no nydus-image (tests/setup.sh builds it where there is a Rust toolchain)")
    return found


@pytest.fixture
def work(request: pytest.FixtureRequest) -> Iterator[machine.Work]:
    """A directory for daemons and mounts; whatever is left in it when the test ends is an error and is removed."""
    label = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:20].strip("-")
    with machine.Work(label) as run:
        yield run
