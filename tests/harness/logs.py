"""What was logged, for tests that look for what must not be: messages, fields and tracebacks."""

import logging
from collections.abc import Iterable


def everything(records: Iterable[logging.LogRecord]) -> str:
    formatter = logging.Formatter()
    return "\n".join(f"{formatter.format(record)} {vars(record)}" for record in records)
