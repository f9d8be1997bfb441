"""The vocabulary: names to look for, their synonyms and negatives, and the rules for them. No tensors in here."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

BACKGROUND = 0
UNLABELLED = 255
"""What a pixel is labelled where nothing was asked for."""
MAX_NAMES = 254
"""Labels are bytes, and two of them are taken."""
MAX_CHARACTERS = 128
MAX_WORDS = 1024
"""Names, synonyms and negatives together: each is a query of its own, and costs time and memory in every image."""
MAX_ENTRIES = 4 * MAX_WORDS
"""Words as they are given, duplicates included: of more than these none is looked at."""
SYNONYM_SEPARATOR = "|"


class VocabularyError(ValueError):
    """A set of names that cannot be used; the message says which rule it breaks and what is accepted."""


@dataclass(frozen=True)
class Vocabulary:
    """What to look for.

    names: 0 to 254 entries; one may carry synonyms ("mug|cup|coffee mug"): the first is the class's name, all are
    queries. Names are put into Unicode form NFC and stripped. Label k of a mask is names[k - 1]; 0 is the background.
    negatives: what a pixel may be instead, as words; None takes the model pair's own list, () takes none.
    After construction `names` holds the classes' names alone, `synonyms` all words of each class (the name first), and
    `dropped` the duplicates that were left out (compared without case; the first wins).
    Raises VocabularyError for more than 254 names, more than 1024 words in all, an empty word, one of over 128
    characters or with control characters.
    """

    names: tuple[str, ...]
    negatives: tuple[str, ...] | None = None
    synonyms: tuple[tuple[str, ...], ...] = field(init=False)
    dropped: tuple[str, ...] = field(init=False)

    def __init__(self, names: Sequence[str] = (), *, negatives: Sequence[str] | None = None) -> None:
        if isinstance(names, str):
            raise VocabularyError(
                f"names must be a sequence of strings, not one string; use Vocabulary.parse({names!r})"
            )
        if isinstance(negatives, str):
            raise VocabularyError(f"negatives must be a sequence of strings, not one string; got {negatives!r}")
        # Before anything is split or looked at letter by letter: a message may hold ten million, all the same.
        if len(names) + sum(_as_text(entry).count(SYNONYM_SEPARATOR) for entry in names) > MAX_ENTRIES:
            raise VocabularyError(
                f"{len(names)} names with their synonyms are too many: at most {MAX_NAMES} names, {MAX_WORDS} words, "
                f"and {MAX_ENTRIES} words where some are named again"
            )
        classes: list[tuple[str, ...]] = []
        dropped: list[str] = []
        seen: set[str] = set()
        for entry in names:
            words = []
            for word in (_clean(part) for part in _as_text(entry).split(SYNONYM_SEPARATOR)):
                if word.casefold() in seen:
                    dropped.append(word)
                else:
                    seen.add(word.casefold())
                    words.append(word)
            if words:
                classes.append(tuple(words))
        if len(classes) > MAX_NAMES:
            raise VocabularyError(
                f"{len(classes)} names are too many: at most {MAX_NAMES}, since a mask has one byte a pixel"
            )
        if len(seen) + len(negatives or ()) > MAX_WORDS:
            raise VocabularyError(
                f"{len(seen) + len(negatives or ())} names, synonyms and negatives are too many: at most {MAX_WORDS}"
            )
        object.__setattr__(self, "names", tuple(words[0] for words in classes))
        object.__setattr__(self, "synonyms", tuple(classes))
        object.__setattr__(self, "dropped", tuple(dropped))
        object.__setattr__(
            self,
            "negatives",
            None if negatives is None else tuple(_clean(_as_text(word)) for word in negatives),
        )

    @classmethod
    def parse(cls, text: str, *, negatives: Sequence[str] | None = None) -> Vocabulary:
        """The vocabulary a person types: names separated by commas or line breaks ("ball, mug|cup"); "" is empty."""
        if text.count(",") + text.count("\n") > MAX_ENTRIES:
            raise VocabularyError(f"the text has too many names: at most {MAX_ENTRIES} commas and line breaks")
        return cls([part for part in re.split(r"[,\n]", text) if part.strip()], negatives=negatives)

    def __len__(self) -> int:
        return len(self.names)


def _as_text(word: object) -> str:
    if not isinstance(word, str):
        raise VocabularyError(f"a name must be text; got {word!r}")
    return word


def _clean(word: str) -> str:
    """A word in NFC without outer blanks, or VocabularyError."""
    word = word.strip()
    if len(word) > 4 * MAX_CHARACTERS:  # before anything looks at every letter; NFC makes no four of them one
        raise _too_long(word)
    # what is not printable is shown escaped, so that a message never carries it on
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in word):
        raise VocabularyError(f"name {word[:24]!r} has control characters: only printable text is accepted")
    word = unicodedata.normalize("NFC", word.strip())
    if not word:
        raise VocabularyError("an empty name is not accepted: every name and synonym needs at least one letter")
    if len(word) > MAX_CHARACTERS:
        raise _too_long(word)
    return word


def _too_long(word: str) -> VocabularyError:
    return VocabularyError(
        f"name {word[:24] + '...'!r} has {len(word)} characters: at most {MAX_CHARACTERS} are accepted"
    )
