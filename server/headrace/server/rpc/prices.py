"""Prices as messages."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from headrace.backends.components import ListedPrice
from headrace.v1 import accounting_pb2


def price_message(entry: ListedPrice, *, provider: str, served: bool) -> accounting_pb2.ModelPrice:
    """``None`` ("as other input") stays unset."""
    price = entry.price
    message = accounting_pb2.ModelPrice(
        price_id=price.id,
        provider=provider,
        model=entry.model,
        currency=price.currency,
        input_nanos=price.input_nanos,
        output_nanos=price.output_nanos,
        cache_read_input_nanos=price.cache_read_input_nanos,
        cache_write_input_nanos=price.cache_write_input_nanos,
        source=entry.source,
        served=served,
    )
    if entry.effective_from is not None:
        beginning = Timestamp()
        beginning.FromDatetime(entry.effective_from)
        message.effective_from.CopyFrom(beginning)
    return message
