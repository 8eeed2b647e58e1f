"""Reading the monitor address as Prometheus does, strictly: text format 0.0.4."""

import http.client
import re
import socket
from dataclasses import dataclass, field

_SAMPLE = re.compile(
    r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\\\|\\n|\\")*"(?:,(?!\})|(?=\})))*)\})? ([0-9.e+-]+|\+Inf|NaN)'
)
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\\\|\\n|\\")*)"')
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}

Labels = frozenset[tuple[str, str]]


@dataclass
class Metric:
    kind: str
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)  # by suffix and labels

    def value(self, **labels: str) -> float:
        """Sum of the samples that have these labels."""
        return sum(value for (suffix, own), value in self.samples.items() if not suffix and labels.items() <= set(own))

    def count(self, **labels: str) -> float:
        """Observations of a histogram."""
        return sum(v for (suffix, own), v in self.samples.items() if suffix == "_count" and labels.items() <= set(own))


def parse(text: str) -> dict[str, Metric]:
    """Raises AssertionError for whatever the format does not allow."""
    found: dict[str, Metric] = {}
    name, explained = "", ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            explained = line.split(" ", 3)[2]
            assert len(line.split(" ", 3)[3]) > 3
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == explained, "HELP and TYPE belong together"
            assert name not in found, f"{name} twice"
            assert (kind == "counter") == name.endswith("_total"), name
            found[name] = Metric(kind)
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, line
            suffix = match[1].removeprefix(name)
            assert match[1].startswith(name), line
            assert suffix in _SUFFIXES[found[name].kind], line
            labels = frozenset(_LABEL.findall(match[2] or ""))
            assert (suffix, labels) not in found[name].samples, f"{line} twice"
            found[name].samples[suffix, labels] = float(match[3])
    return found


def get(address: str, path: str, timeout: float = 20) -> tuple[int, str]:
    """Status and body of a GET from "host:port" or "unix:/path"."""
    if address.startswith("unix:"):
        connection = http.client.HTTPConnection("localhost", timeout=timeout)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(timeout)
        connection.sock.connect(address.removeprefix("unix:"))
    else:
        connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def scrape(address: str) -> dict[str, Metric]:
    status, text = get(address, "/metrics")
    assert status == 200, text
    return parse(text)
