"""Structured logs on stderr: structlog events through stdlib handlers, JSON for journald, plain lines for a terminal.

`structlog.get_logger(__name__)` anywhere; this module only decides how events look. Secrets never get here:
`SecretBytes` prints its length and errors carry no key material.
"""

import logging
import sys
from typing import Literal

import structlog


def configure(level: str = "info", style: Literal["json", "console"] = "json", *, process: str = "") -> None:
    """Route every event of this process to stderr in the given style."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(sort_keys=False)
        if style == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )

    def name_process(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Not a context variable: threads start without those."""
        return {**event, "process": process} if process else event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        name_process,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("grpc", "asyncio", "aiohttp"):  # at debug they say more than all of us
        logging.getLogger(chatty).setLevel(max(root.level, logging.INFO))
