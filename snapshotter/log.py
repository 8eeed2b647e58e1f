"""Structured logs on stderr: structlog events through stdlib handlers, JSON for journald, plain lines for a terminal.

`structlog.get_logger(__name__)` anywhere; this module only decides how events look. Secrets never get here:
`SecretBytes` prints its length and errors carry no key material.

What is done for one call of containerd carries that call's id as `request`, in this process and in blobd.
"""

import logging
import re
import sys
from typing import Literal

import structlog

_ID = re.compile(r"[0-9A-Za-z._-]{1,64}")


def bind_request(request: object) -> None:
    """Give every event of the running task, and of what it starts, this id. What is no id takes away the last one."""
    if isinstance(request, str) and _ID.fullmatch(request):
        structlog.contextvars.bind_contextvars(request=request)
    else:
        structlog.contextvars.unbind_contextvars("request")


def bound_request() -> str | None:
    """The id that `bind_request` gave to the running task."""
    request: str | None = structlog.contextvars.get_contextvars().get("request")
    return request


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
        wrapper_class=structlog.make_filtering_bound_logger(level),  # what is not logged costs nothing
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
