"""One cell of a laboratory's table: what the typed text means as a number, a bound, a word or nothing.

Knows: blanks such as ``n/a``, decimal commas, thousands separators, typographic minus signs and spaces, powers of ten,
bounds such as ``<1e-10``, and units written behind the number. Refuses to know: columns, fields and files.
Nothing is guessed: text that is not plainly a number is a problem with a reason code.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Real
from typing import Any

# what people type for "no value"; compared without case, except where a chemical symbol could look the same ("Na")
BLANKS = frozenset(
    ("", "-", "--", "---", "–", "—", "?", "na", "n/a", "#n/a", "n.a.", "n.a", "nan", "none", "null", "nil", "missing",
     "not measured", "n.m.", "n.d.", "nd", "tbd", "<na>", "nat")
)  # fmt: skip
SYMBOL_BLANKS = frozenset(("", "-", "--", "---", "–", "—", "?", "n/a", "N/A", "#N/A", "None", "null", "<NA>"))

_SPACES = re.compile(r"[\s\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]+")
_INVISIBLE = re.compile(r"[\u200b-\u200f\u2060\ufeff\u00ad]")
_MINUS = str.maketrans({"−": "-", "‐": "-", "‑": "-", "‒": "-", "–": "-", "﹣": "-", "－": "-"})
_BOUND = re.compile(r"^(<=|>=|≤|≥|⩽|⩾|<|>)\s*")
_LEFT = frozenset(("<", "<=", "≤", "⩽"))
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eEdD][-+]?\d+)?")
_TIMES_TEN = re.compile(r"\s*[x×*·⋅]\s*10\s*(?:\^|\*\*)?\s*([-+]?\d+)(?!\.?\d)")
_PURE_TEN = re.compile(r"^10\s*(?:\^|\*\*)\s*([-+]?\d+)$")
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPER_RUN = re.compile(r"(?<=10)[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")


@dataclass(frozen=True)
class Number:
    """A cell read as a number.

    Attributes:
        value: the number, NaN when blank or unreadable.
        bound: "left" for "less than", "right" for "more than", "" for a plain value.
        unit: the unit written behind the number, "" when there is none.
        problem: reason code when the text is no number, else "".
    """

    value: float = math.nan
    bound: str = ""
    unit: str = ""
    problem: str = ""


def text_of(cell: Any) -> str:
    """Returns a raw cell as clean text: one kind of space, nothing invisible, whole floats without a decimal point."""
    if cell is None:
        return ""
    if type(cell).__name__ in ("bool", "bool_"):
        return "true" if cell else "false"
    if isinstance(cell, Real):
        number = float(cell)
        if math.isnan(number):
            return ""
        return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
    return _SPACES.sub(" ", _INVISIBLE.sub("", str(cell))).strip()


def plain_formula(text: str) -> str:
    """Returns a formula without typography: subscript digits become digits, full-width letters plain letters."""
    return unicodedata.normalize("NFKC", text)


def is_blank(text: str, extra: Collection[str] = (), *, symbols: bool = False) -> bool:
    """Returns whether clean ``text`` means "no value"; ``symbols`` keeps words that are chemical symbols (Na, Nd)."""
    if text in extra:
        return True
    return text in SYMBOL_BLANKS if symbols else text.casefold() in BLANKS


def read_number(
    text: str,
    *,
    decimal: str = ".",
    thousands: str = "",
    missing: Collection[str] = (),
    is_unit: Callable[[str], bool] = lambda _: False,
) -> Number:
    """Reads clean text as a number.

    Args:
        text: as :func:`text_of` returns it.
        decimal: the decimal mark, "." or ",".
        thousands: the thousands separator, "" for none.
        missing: words that mean "no value" here, besides the usual ones.
        is_unit: says whether the text behind the number is a unit.

    >>> read_number("< 1,5 × 10−10", decimal=",")
    Number(value=1.5e-10, bound='left', unit='', problem='')
    """
    if is_blank(text, missing):
        return Number()
    bound = ""
    if match := _BOUND.match(text):
        bound = "left" if match[1] in _LEFT else "right"
        text = text[match.end() :]
    body = _SUPER_RUN.sub(lambda m: "^" + m[0].translate(_SUPERSCRIPT), text).translate(_MINUS)
    body = _PURE_TEN.sub(r"1e\1", body)
    body = _TIMES_TEN.sub(r"e\1", body, count=1)
    digits, rest = _leading(body, decimal, thousands)
    if digits is None:
        return Number(problem="not_a_number")
    value = float(digits)
    if not math.isfinite(value):
        return Number(problem="not_a_number")
    if not rest:
        return Number(value, bound)
    return Number(value, bound, rest) if is_unit(rest) else Number(problem="not_a_number")


def _leading(body: str, decimal: str, thousands: str) -> tuple[str | None, str]:
    """Returns (the number at the start of ``body`` as Python writes it, what follows), or (None, "")."""
    grouped = rf"[-+]?\d{{1,3}}(?:{re.escape(thousands)}\d{{3}})+(?=\D|$)" if thousands else ""
    if grouped and (match := re.match(grouped, body)):
        body = match[0].replace(thousands, "") + body[match.end() :]
    if decimal != ".":
        if re.match(r"[-+]?\d*\.\d", body):  # a point where the file promises commas
            return None, ""
        body = re.sub(rf"^([-+]?\d*){re.escape(decimal)}(?=\d)", r"\1.", body)
    match = _NUMBER.match(body)
    if match is None:
        return None, ""
    rest = body[match.end() :]
    if rest and (rest[0].isdigit() or rest[0] in ",.;:/±+-_("):  # 1,234  1.2.3  1-2  1±0.1  1.2(3): more than one number
        return None, ""
    return re.sub("[dD]", "e", match[0]), rest.strip()
