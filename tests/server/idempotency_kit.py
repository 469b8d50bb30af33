"""What tests of idempotency keys share: calls, a model, and the middleware."""

from __future__ import annotations

import itertools
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from headrace.backends.api import DeterminismClass
from headrace.backends.requests import GenerateRequest, TextInput
from headrace.backends.types import Call, Events, Principal, Prompt
from headrace.backends.usage import Cost
from headrace.server.accounting.ledger import Ledger
from headrace.server.middleware.idempotency import Idempotency
from tests.server.letters_kit import Letters

_numbers = itertools.count()
COST = Cost(currency="USD", charge_nanos=42, price_id="book", estimated=False)
FOREVER = 3600.0


def call(text: str = "prompt", key: str | None = "order-1", *, tenant: str = "acme", **request: Any) -> Call:
    return Call(
        request=GenerateRequest(input=TextInput(text), idempotency_key=key, **request),
        request_id=f"call-{next(_numbers)}",
        arrived=time.monotonic(),
        principal=Principal(tenant),
    )


@dataclass(eq=False)
class Model(Letters):
    """With all that stands between it and the middleware: the call has its model, its prompt and its cost."""

    determinism: DeterminismClass = DeterminismClass.STRICT

    async def run(self, made: Call) -> Events:
        made.model, made.prompt = self, Prompt("prompt", (1, 2))
        try:
            async with aclosing(super().run(made)) as events:
                async for event in events:
                    yield event
        finally:
            made.meter.cost = COST


def idempotency(ledger: Ledger | None, **options: Any) -> Idempotency:
    options = {"clock": time.time_ns, "hours": 24.0, "max_bytes": 10**6, "linger": FOREVER} | options
    return Idempotency(ledger, **options)
