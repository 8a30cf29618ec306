"""The one timestamp format of everything that is written."""

import time


def utc_now() -> str:
    """The present moment in UTC, to the second: ``2026-01-01T00:00:00Z``."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
