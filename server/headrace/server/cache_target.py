"""Where answers are stored: what ``Settings.response_cache`` may say."""

from __future__ import annotations

from urllib.parse import urlsplit

MEMORY = "memory"


def shown(setting: str) -> str:
    """Without its password."""
    if setting == MEMORY:
        return setting
    parts = urlsplit(setting)
    if parts.password is None:
        return setting
    user, host = parts.username or "", parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{user}:***@{host}").geturl()


def check_target(setting: str) -> None:
    """Raises ValueError unless it is ``memory`` or the URL of a Redis."""
    problem = "must be memory, none, or the URL of a Redis, such as redis://cache.internal:6379/0 (rediss:// with TLS)"
    if setting == MEMORY:
        return
    try:
        parts = urlsplit(setting)
        port, database = parts.port, parts.path.strip("/")
    except ValueError:
        raise ValueError(problem) from None
    # The library takes options from the query that are the server's own to set.
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise ValueError(problem)
    if database and not database.isdecimal():
        raise ValueError("must have the number of a database as its path, such as redis://cache.internal:6379/0")
