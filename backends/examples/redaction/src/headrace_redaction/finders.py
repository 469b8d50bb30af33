"""Finds personal data by its form: where it stands in a text.

Checksums keep order numbers from being taken for cards (Luhn, ISO/IEC 7812-1) or accounts (ISO 13616, modulo 97).
Telephone numbers have none, so those are judged by how they are written. Names and postal addresses have no form, and
are not found.

A pattern with a part of no fixed length begins only where no such character stands before, so that a text is scanned
once, however long a run of them is.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]


class Kind(enum.StrEnum):
    """What can be taken out."""

    EMAIL = "email"
    IBAN = "iban"
    CARD = "card"
    PHONE = "phone"


_EMAIL = re.compile(
    r"(?<![\w.%+-])[\w.%+-]{1,255}"
    r"@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?!\w)"
)


def find_emails(text: str) -> Iterator[Span]:
    return (match.span() for match in _EMAIL.finditer(text))


_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]){11,30}", re.ASCII)
_IBAN_LENGTHS = {
    **dict.fromkeys(["NO"], 15),
    **dict.fromkeys(["BE"], 16),
    **dict.fromkeys(["DK", "FI", "FK", "FO", "GL", "NL", "SD"], 18),
    **dict.fromkeys(["MK", "SI"], 19),
    **dict.fromkeys(["AT", "BA", "EE", "KZ", "LT", "LU", "MN", "XK"], 20),
    **dict.fromkeys(["CH", "HR", "LI", "LV"], 21),
    **dict.fromkeys(["BG", "BH", "CR", "DE", "GB", "GE", "IE", "ME", "RS", "VA"], 22),
    **dict.fromkeys(["AE", "GI", "IL", "IQ", "OM", "SO", "TL"], 23),
    **dict.fromkeys(["AD", "CZ", "ES", "MD", "PK", "RO", "SA", "SE", "SK", "TN", "VG"], 24),
    **dict.fromkeys(["LY", "PT", "ST"], 25),
    **dict.fromkeys(["IS", "TR"], 26),
    **dict.fromkeys(["BI", "DJ", "FR", "GR", "IT", "MC", "MR", "SM"], 27),
    **dict.fromkeys(["AL", "AZ", "BY", "CY", "DO", "GT", "HN", "HU", "LB", "NI", "PL", "SV"], 28),
    **dict.fromkeys(["BR", "EG", "PS", "QA", "UA"], 29),
    **dict.fromkeys(["JO", "KW", "MU", "YE"], 30),
    **dict.fromkeys(["MT", "SC"], 31),
    **dict.fromkeys(["LC"], 32),
    **dict.fromkeys(["RU"], 33),
}
"""Characters without spaces, by country: words after an account number look like more of it."""


def find_ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match[0][:2].upper())
        end = length and _end_of(match[0], length)
        if end and _is_iban(match[0][:end]):
            yield match.start(), match.start() + end


def _end_of(found: str, length: int) -> int | None:
    """Where the first ``length`` characters that are no spaces end, if the number may end there."""
    places = [i for i, character in enumerate(found) if character != " "]
    if len(places) < length:
        return None
    end = places[length - 1] + 1
    return end if end == len(found) or found[end] == " " else None


def _is_iban(found: str) -> bool:
    compact = found.replace(" ", "").upper()
    return int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1


_DIGITS = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,}(?!\w)", re.ASCII)
_CARD_LENGTHS = {"2": {16}, "3": {14, 15, 16}, "4": {13, 16, 19}, "5": {*range(13, 20)}, "6": {*range(13, 20)}}
"""Digits, by the first: what the networks issue."""


def find_cards(text: str) -> Iterator[Span]:
    for run in _DIGITS.finditer(text):
        # Other numbers can stand beside a card's, such as its expiry: each row of whole groups is tried.
        groups = [(run.start() + group.start(), run.start() + group.end()) for group in re.finditer(r"\d+", run[0])]
        first = 0
        while first < len(groups):
            last = _last_of_card(text, groups, first)
            if last is None:
                first += 1
            else:
                yield groups[first][0], groups[last][1]
                first = last + 1


def _last_of_card(text: str, groups: Sequence[Span], first: int) -> int | None:
    """Of the groups of digits, the last of a card's number that begins with ``first``."""
    digits, found = "", None
    lengths = _CARD_LENGTHS.get(text[groups[first][0]], set())
    for i in range(first, len(groups)):
        digits += text[slice(*groups[i])]
        if len(digits) > max(lengths, default=0):
            break
        if len(digits) in lengths and _passes_luhn(digits):
            found = i
    return found


_DOUBLED = str.maketrans("0123456789", "0246813579")
"""Twice a digit, and the digits of that summed."""


def _passes_luhn(digits: str) -> bool:
    return sum(map(int, digits[::-2] + digits[-2::-2].translate(_DOUBLED))) % 10 == 0


_DATE = r"\d{1,2}([./-])\d{1,2}\1\d{4}(?!\d)"
_PHONES = (
    # International: 15 digits at most (E.164).
    re.compile(r"(?<![\w+])(?:\+|00)(?:[ ./()-]{0,3}\d){8,15}(?!-?\w)", re.ASCII),
    # National with a trunk prefix, as in most of Europe.
    re.compile(rf"(?<![\w.+/-])(?!{_DATE})\(?0\d(?:[ ./()-]{{0,3}}\d){{7,10}}(?!-?\w)", re.ASCII),
    # National in North America.
    re.compile(r"(?<![\w.+/-])(?:1[ .-]?)?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}(?!-?\w)", re.ASCII),
)


def find_phones(text: str) -> Iterator[Span]:
    end = 0
    for start, stop in sorted(match.span() for pattern in _PHONES for match in pattern.finditer(text)):
        if start >= end:
            yield start, stop
            end = stop


FINDERS: Mapping[Kind, Finder] = {
    Kind.EMAIL: find_emails,
    Kind.IBAN: find_ibans,
    Kind.CARD: find_cards,
    Kind.PHONE: find_phones,
}
"""In the order they run: what one has replaced, the next does not see."""


def canonical(kind: Kind, found: str) -> str:
    """The same datum written with other spaces, signs or capitals is the same."""
    if kind is Kind.EMAIL:
        return found.lower()
    return "".join(filter(str.isalnum, found)).upper()
