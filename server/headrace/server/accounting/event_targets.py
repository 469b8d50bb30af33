"""Where usage events go: what ``Settings.usage_events`` may say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class FileTarget:
    """A file that events are appended to, one on each line."""

    path: Path


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """An endpoint that events are sent to, in batches."""

    url: str

    @property
    def is_private(self) -> bool:
        """Whether nobody on the way can read what is sent."""
        parts = urlsplit(self.url)
        return parts.scheme == "https" or parts.hostname in {"localhost", "127.0.0.1", "::1"}


Target = FileTarget | HttpTarget


def parse_target(setting: str) -> Target:
    """A path, or an http(s) URL. Raises ValueError."""
    if "://" not in setting:
        if not setting or setting.endswith("/") or Path(setting).expanduser().is_dir():
            raise ValueError("must be a file or an http(s) URL")
        return FileTarget(Path(setting).expanduser())
    parts = urlsplit(setting)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be a file or an http(s) URL, such as https://billing.internal/events")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must have no credentials in the URL; HEADRACE_USAGE_EVENTS_TOKEN is for a bearer token")
    if parts.fragment:
        raise ValueError("must have no fragment (#) in the URL")
    return HttpTarget(setting)
