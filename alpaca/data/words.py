"""What counts as a word, in any script: the tokens that similarity compares, word counts, words found in a text.

For ASCII text all of it is what the 2023 code did, with `rouge_score`'s tokens. In other text a word is a run of
letters, digits and the marks that combine with them, and where a script writes without spaces (Chinese, Japanese,
Thai …) a single character with its marks. Equal words have equal tokens however they are encoded: Unicode's NFKC, case
folded.
"""

import functools
import re
import unicodedata

import regex

TOKENIZATION = "unicode"  # what a run records of these rules; "ascii" are those of 2023 for all texts
_NOT_A_TOKEN = re.compile(r"[^a-z0-9]+")  # rouge_score's own
_WITHOUT_SPACES = (
    r"[[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Tham}\p{Tai_Le}"
    r"\p{New_Tai_Lue}\p{Tai_Viet}\p{Javanese}\p{Balinese}]&&[\p{L}\p{N}]]"
)
_IN_A_WORD = rf"[[\p{{L}}\p{{N}}\p{{M}}]--{_WITHOUT_SPACES}]"
_TOKEN = regex.compile(rf"(?V1){_WITHOUT_SPACES}\p{{M}}*|{_IN_A_WORD}+")
_CHARACTER = regex.compile(rf"(?V1){_WITHOUT_SPACES}")
_INVISIBLE = regex.compile(r"(?V1)[\p{Cf}--\u200b]+")  # joiners, soft hyphens, directions; a zero-width space divides


def split_tokens(text: str, tokenization: str = TOKENIZATION) -> list[str]:
    """ "Name two colours." → name, two, colours · "用Python写" → 用, python, 写. "ascii" knows [a-z0-9] only."""
    if text.isascii() or tokenization == "ascii":
        return _NOT_A_TOKEN.sub(" ", text.lower()).split()
    return _TOKEN.findall(_folded(text))


def count_words(text: str, tokenization: str = TOKENIZATION) -> int:
    """Words between white space, as in 2023; characters count one each where they belong to a script without spaces."""
    pieces = text.split()
    if tokenization == "ascii" or text.isascii() or not _CHARACTER.search(text):
        return len(pieces)
    return sum(len(split_tokens(piece)) if _CHARACTER.search(piece) else 1 for piece in pieces)


def begins_with_letter_or_digit(text: str) -> bool:
    """In any script; the marks that open a Spanish sentence stand before its first letter."""
    return text.lstrip("¿¡")[:1].isalnum()


def find_words(words: tuple[str, ...], text: str, tokenization: str = TOKENIZATION) -> re.Match | None:
    """The first place where one of the words stands in the text as a whole word, whatever the case."""
    if tokenization == "ascii" or (text.isascii() and all(map(str.isascii, words))):
        return _ascii_pattern(words).search(text)
    return _unicode_pattern(words).search(_folded(text))


def _folded(text: str) -> str:
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text).casefold())


@functools.lru_cache
def _ascii_pattern(words: tuple[str, ...]) -> re.Pattern:
    return re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)


@functools.lru_cache
def _unicode_pattern(words: tuple[str, ...]) -> regex.Pattern:
    """`\\b` would tear words at their combining marks, and sees no border between two Chinese words."""
    patterns = []
    for word in map(_folded, words):
        before = "" if _CHARACTER.match(word) else rf"(?<![{_IN_A_WORD}_])"
        after = r"(?!\p{M})" if _CHARACTER.search(word[-1:]) else rf"(?![{_IN_A_WORD}_])"
        patterns.append(before + regex.escape(word) + after)
    return regex.compile("(?V1)" + "|".join(patterns))
