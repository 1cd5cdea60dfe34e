"""Normalises short answers for comparison."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import groupby

_NO_SPACES = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u3100-\u312f"  # hiragana, bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Scripts without spaces between words. A run of katakana is a word already."""
_SUPERSCRIPT = re.compile(r"(?<=\d)[⁰¹²³⁴-⁹⁺⁻]+")
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe0e\ufe0f\ufeff]"
)
_THOUSANDS = re.compile(
    r"(?<![\d.,'’])\d{1,3}(?:(?:,\d{3})+|(?:['’\u00a0\u202f\u2009]\d{3})+)(?!\d)"
)
_SIGNS = {0x2212: "-", 0x2044: "/"}  # the minus sign, the stroke of a fraction
_ALPHANUMERIC = re.compile(r"[^\W_]")


def normalise(text: str) -> str:
    """Reduce a text to its words, digits and the signs that matter, for comparison.

    Compatible characters are one (NFKC), case and thousands separators do not count. Kept are the
    sign and the decimals of a number, the ``+`` and ``#`` behind a word (C++ is not C#), currency,
    percent and comparison signs. Where a script has no spaces, each character is a word.
    """
    return " ".join(words(text))


def words(text: str) -> list[str]:
    """Split a text into the words of ``normalise``."""
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda found: f"^{found[0]}", text)
        text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).translate(_SIGNS)
        text = re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text)
    text = re.sub(r"(?<=\d) ?per ?cent\b", "%", text.casefold())
    text = re.sub(r"(?<![\w.])\.(?=\d)", "0.", text)
    return [found[0] for found in _word_pattern(text.isascii()).finditer(text)]


def weigh(word: str) -> float:
    """Return how much a word says: a character of a script without spaces is a part of a word, and
    a sign alone is none."""
    if not _ALPHANUMERIC.search(word):
        return 0.0
    return 0.25 if _is_character(word) else 1.0


def has_word(text: str) -> bool:
    """Decide whether a text has a letter or a digit, without which it cannot be compared."""
    return bool(_ALPHANUMERIC.search(text))


@cache
def _word_pattern(ascii_only: bool) -> re.Pattern[str]:
    """Return the pattern of a word.

    Args:
        ascii_only: For a text without other characters, which needs no tables of them.
    """
    marks = "" if ascii_only else _marks()
    space_free = "" if ascii_only else _NO_SPACES
    letter = rf"(?:[^\W{space_free}]|[{marks}])" if marks else r"\w"
    sign = r"(?:(?<![\w)\]-])-(?=\d))?"
    fraction = r"(?<![\d/])\d{1,3}/\d{1,3}(?![\d/])"
    grade = rf"(?<!\w)[a-z]-(?![\w-]|{letter})"
    word = rf"{sign}{letter}+(?:(?<=\d)[.^](?=\d){letter}+)*(?:[+#♯♭]+(?!\w))?"
    alone = rf"|[{_NO_SPACES}][{marks}]*" if marks else ""
    # ASCII has but one sign of a currency; the others are of Unicode's category Sc.
    return re.compile(rf"{grade}|{fraction}|{word}{alone}|[%‰<>≤≥≠±$¢£¤¥\u20a0-\u20cf]")


@cache
def _is_character(word: str) -> bool:
    return bool(re.match(rf"[{_NO_SPACES}]", word))


@cache
def _marks() -> str:
    """Return the marks that belong to the letter before them (Unicode's category M), as ranges.

    Python's ``\\w`` leaves them out, and with them the vowels of Hindi, Tamil or Thai.
    """
    codes = [c for c in range(0x300, 0x1F000) if unicodedata.category(chr(c))[0] == "M"]
    runs = [
        [c for _, c in run] for _, run in groupby(enumerate(codes), lambda pair: pair[1] - pair[0])
    ]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)
