"""The server's log: lines of JSON, without the texts of requests."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

LOG = "runner.server"
"""The name of the logger."""


def say(level: int, **values: Any) -> None:
    """Write one line."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **values}
    logging.getLogger(LOG).log(level, "%s", json.dumps(line, ensure_ascii=True))
