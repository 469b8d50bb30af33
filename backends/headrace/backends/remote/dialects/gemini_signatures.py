"""Signatures of calls of functions, in the calls' ids.

A conversation has no other place for them, and models since Gemini 3 want them back
(https://ai.google.dev/gemini-api/docs/thought-signatures).
"""

from __future__ import annotations

import hashlib
import re

from headrace.backends.remote.dialects.chat import stand_in

NO_SIGNATURE = "skip_thought_signature_validator"
"""For calls that another model made: see the documentation's "FAQs"."""
_MADE_ID = "headrace-"
"""The beginning of ids of calls to which the provider gave none."""
_SEPARATOR = "~"
_SIGNATURE = re.compile(r"[A-Za-z0-9+/=_-]+")
"""Base64; what stands behind an id of another provider is none."""


def made_id(request_id: str, choice: int, index: int) -> str:
    """The id of a call that has none: the same for the same call of the same request."""
    return f"{_MADE_ID}{hashlib.sha256(request_id.encode()).hexdigest()[:16]}-{choice}-{index}"


def signed_id(call_id: str, signature: str | None) -> str:
    return f"{call_id}{_SEPARATOR}{signature}" if signature else call_id


def read_id(call_id: str) -> tuple[dict[str, str], str]:
    """The id as a part has it, if that has one, and the signature; empty: there is none."""
    own_id, _, signature = call_id.partition(_SEPARATOR)
    if signature and not _SIGNATURE.fullmatch(signature):
        own_id, signature = stand_in(call_id), ""
    return {} if own_id.startswith(_MADE_ID) else {"id": own_id}, signature
