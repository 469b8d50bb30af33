"""Times on the command line: UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}
_PERIOD = re.compile(r"(\d{1,5})([hdw])")


def shown_time(nanos: int) -> str:
    """Nanoseconds since the epoch, as ISO 8601 without parts of a second."""
    return datetime.fromtimestamp(nanos // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def point_in_time(text: str, now: int) -> int:
    """A period from ``now`` on, such as ``"90d"``, or a day, such as ``"2027-01-31"`` (its begin), in nanoseconds since
    the epoch. Raises ValueError.
    """
    if period := _PERIOD.fullmatch(text):
        return now + int(timedelta(**{_UNITS[period[2]]: int(period[1])}).total_seconds()) * 10**9
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()) * 10**9
    except ValueError:
        message = f"must be a period such as 12h, 90d or 4w, or a day such as 2027-01-31, got {text!r}"
        raise ValueError(message) from None
