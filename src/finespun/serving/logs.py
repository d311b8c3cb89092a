"""A log of one JSON object a line. Prompts and texts are in it only where a person asked for that."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime


class JsonLines(logging.Formatter):
    """One JSON object a record. Of an exception its kind and where it happened; what it says, which may quote a
    prompt, only `with_texts`."""

    def __init__(self, with_texts: bool) -> None:
        super().__init__()
        self._with_texts = with_texts

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "event": record.getMessage().strip()}
        line |= getattr(record, "fields", {})
        if record.exc_info and (error := record.exc_info[1]) is not None:
            line["exception"] = type(error).__name__
            line["traceback"] = "".join(traceback.format_tb(error.__traceback__))
            if self._with_texts:
                line["message"] = str(error)
        return json.dumps(line)


def log_to_stderr(with_texts: bool) -> None:
    """Sends what finespun's server and uvicorn log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(with_texts))
    for name, level in (("finespun.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
