"""Which fields of a message its sender has set.

What a model does not declare is refused by its path, so the paths come from a walk over the descriptors: a field that
is added to the proto later is refused until a model declares it, and so is one that only the sender's version of the
proto knows (``"sampling.#15"``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor, OneofDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from headrace.backends.errors import InvalidArgument

MAX_ENTRIES = 4096
"""Entries of a list of messages or of a map."""
MAX_MESSAGES = 16_384
"""Submessages in all: the walk takes some 10 µs for each."""


def set_fields(message: Message, *, exclude: Collection[str] = ()) -> frozenset[str]:
    """Paths of the fields that are set in ``message``, such as ``"chat.messages.content.text"``, less those of its own
    fields named in ``exclude``.

    Submessages are descended; maps, lists of scalars and the well-known types are leaves. An explicitly set zero counts
    as set. So does an empty submessage where its being there says something: as an entry of a list, as the choice of a
    oneof, or where it lacks a choice of its own; an empty ``sampling {}`` says nothing.

    Raises InvalidArgument for an enum number that the proto does not have, and for too many entries.
    """
    walk = _Walk()
    walk.descend(message, "", "", exclude)
    return frozenset(walk.paths)


def unknown_fields(message: Message) -> Sequence[Any]:
    """What was on the wire and is not in the proto, each with ``field_number``, ``wire_type`` and ``data``."""
    # The stubs do not know that it is a sequence.
    return cast(Sequence[Any], UnknownFieldSet(message))


class _Walk:
    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.num_messages = 0

    def descend(self, message: Message, path: str, exact: str, exclude: Collection[str] = ()) -> bool:
        """Adds what is set in ``message``; returns whether anything is. ``path`` and ``exact`` are prefixes of field
        names, the latter with the indices of list entries for errors.
        """
        self.num_messages += 1
        if self.num_messages > MAX_MESSAGES:
            raise InvalidArgument(exact.rstrip("."), f"the request has more than {MAX_MESSAGES} parts")
        fields = message.ListFields()
        unknown = unknown_fields(message)
        if unknown:
            self.paths.update(f"{path}#{entry.field_number}" for entry in unknown)
        for field, value in fields:
            if field.name not in exclude:
                self._add(field, value, path + field.name, exact + field.name)
        return bool(fields or unknown)

    def _add(self, field: FieldDescriptor, value: Any, path: str, exact: str) -> None:
        if field.message_type is None:
            if field.enum_type is not None and value not in field.enum_type.values_by_number:
                raise InvalidArgument(exact, f"has no value {value}")
            self.paths.add(path)
        elif isinstance(value, Message):
            if _is_leaf(field.message_type) or (
                not self.descend(value, f"{path}.", f"{exact}.")
                and (_is_choice(field.containing_oneof) or any(map(_is_choice, field.message_type.oneofs)))
            ):
                self.paths.add(path)
        else:
            self._add_entries(field.message_type, value, path, exact)

    def _add_entries(self, entry_type: Descriptor, entries: Any, path: str, exact: str) -> None:
        if len(entries) > MAX_ENTRIES:
            raise InvalidArgument(exact, f"must have at most {MAX_ENTRIES} entries, got {len(entries)}")
        if _is_leaf(entry_type):
            self.paths.add(path)
            return
        for i, entry in enumerate(entries):
            if not self.descend(entry, f"{path}.", f"{exact}[{i}]."):
                self.paths.add(path)


def _is_leaf(message_type: Descriptor) -> bool:
    return message_type.full_name.startswith("google.protobuf.") or (
        message_type.has_options and message_type.GetOptions().map_entry
    )


def _is_choice(oneof: OneofDescriptor | None) -> bool:
    # The compiler makes a oneof "_name" for every optional field.
    return oneof is not None and not oneof.name.startswith("_")
