"""What mkdocs.yml cannot say."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)")
_log = logging.getLogger("mkdocs.hooks.links")


def on_config(config: Any) -> None:
    """Puts every decision into the navigation."""
    docs = Path(config.docs_dir)
    config.nav.append({"Decisions": [str(path.relative_to(docs)) for path in sorted(docs.glob("adr/*.md"))]})


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Turns links to files of the repository into their paths: such a link works where the repository is read, and the
    files are not part of the site. One that is not there is a warning, and so an error.
    """
    docs = Path(config.docs_dir).resolve()
    folder = (docs / page.file.src_path).parent

    def replace(link: re.Match[str]) -> str:
        label, target = link.groups()
        file = (folder / target.partition("#")[0]).resolve()
        if file.is_relative_to(docs):
            return link[0]
        if not file.exists():
            _log.warning("%s links to %s, which is not there", page.file.src_path, target)
        path = f"`{file.relative_to(docs.parent)}{'/' if file.is_dir() else ''}`"
        return path if path.strip("`/") in label else f"{label} ({path})"

    return _LINK.sub(replace, markdown)
