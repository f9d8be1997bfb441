"""The vocabulary: names to look for, their synonyms and negatives, and the rules for them. No tensors in here."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from .parsing import MAX_ENTRIES, VocabularyError, split_names

BACKGROUND = 0
UNLABELLED = 255
"""What a pixel is labelled where nothing was asked for."""
MAX_NAMES = 254
"""Labels are bytes, and two of them are taken."""
MAX_CHARACTERS = 128
MAX_WORDS = 1024
"""Names, synonyms and negatives together: each is a query of its own, and costs time and memory in every image."""
SYNONYM_SEPARATOR = "|"
BACKGROUND_NAME = "background"
"""What label 0 is called, where nobody calls it something else."""


@dataclass(frozen=True)
class Vocabulary:
    """What to look for.

    names: 0 to 254 entries; one may carry synonyms ("mug|cup|coffee mug"): the first is the class's name, all are
    queries. Names are put into Unicode form NFC and stripped. Label k of a mask is names[k - 1]; 0 is the background.
    negatives: what a pixel may be instead, as words; None takes the model pair's own list, () takes none.
    background_name: what label 0 is called. An entry of that name (compared without case) is no class, since no two
    labels may have one name: its words compete for pixels as negatives do, and such pixels are 0.
    After construction `names` holds the classes' names alone, `synonyms` all words of each class (the name first),
    `background` the words of the entry that names the background, and `dropped` the duplicates that were left out
    (compared without case; the first wins).
    Raises VocabularyError for more than 254 names, more than 1024 words in all, an empty word, one of over 128
    characters or with control characters, and for the background's name as a synonym of another.
    """

    names: tuple[str, ...]
    negatives: tuple[str, ...] | None = None
    background_name: str = BACKGROUND_NAME
    synonyms: tuple[tuple[str, ...], ...] = field(init=False)
    background: tuple[str, ...] = field(init=False)
    dropped: tuple[str, ...] = field(init=False)

    def __init__(
        self,
        names: Sequence[str] = (),
        *,
        negatives: Sequence[str] | None = None,
        background_name: str = BACKGROUND_NAME,
    ) -> None:
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
        label_0 = _key(background_name)
        classes: list[tuple[str, ...]] = []
        background: list[str] = []
        dropped: list[str] = []
        seen: set[str] = set()
        for entry in names:
            given = [_clean(part) for part in _as_text(entry).split(SYNONYM_SEPARATOR)]
            keys = [word.casefold() for word in given]
            if label_0 in keys[1:] and keys[0] != label_0:
                raise VocabularyError(
                    f"{given[keys.index(label_0)]!r} is the name of label 0, the background, and cannot be a synonym "
                    f"of {given[0]!r}; leave it out, or ask for {given[0]!r} among the negatives"
                )
            words = []
            for word, key in zip(given, keys, strict=True):
                if key in seen:
                    dropped.append(word)
                else:
                    seen.add(key)
                    words.append(word)
            if keys[0] == label_0:
                background += words
            elif words:
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
        object.__setattr__(self, "background", tuple(background))
        object.__setattr__(self, "background_name", background_name)
        object.__setattr__(self, "dropped", tuple(dropped))
        object.__setattr__(
            self,
            "negatives",
            None if negatives is None else tuple(_clean(_as_text(word)) for word in negatives),
        )

    @classmethod
    def parse(
        cls, text: str, *, negatives: Sequence[str] | None = None, background_name: str = BACKGROUND_NAME
    ) -> Vocabulary:
        """The vocabulary of one text, as `parsing.split_names` reads it: "ball, mug|cup", or a list; "" is empty."""
        return cls(split_names(text), negatives=negatives, background_name=background_name)

    @classmethod
    def of(cls, given: Vocabulary | Sequence[str] | str) -> Vocabulary:
        """A vocabulary as it is, one of a sequence of names, or one of a text (see `parse`). Raises TypeError for
        anything else, and VocabularyError."""
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls.parse(given)
        names = given if isinstance(given, Sequence) and not isinstance(given, bytes | bytearray) else None
        if names is None or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"a vocabulary must be a Vocabulary, a list of names or one text; got {_type_in_words(given)}. Write "
                '["ball", "mug|cup"], or "ball, mug|cup"'
            )
        return cls(names)

    @property
    def words(self) -> tuple[str, ...]:
        """All words of all classes, in their order."""
        return tuple(word for group in self.synonyms for word in group)

    @property
    def entries(self) -> tuple[str, ...]:
        """The names with their synonyms, that of the background last, as the constructor takes them."""
        words = (*self.synonyms, self.background) if self.background else self.synonyms
        return tuple(SYNONYM_SEPARATOR.join(group) for group in words)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was not taken as it was given, a sentence for each kind."""
        said = []
        if self.dropped:
            said.append(f"named more than once, the first counts: {listed(self.dropped)}")
        if self.background:
            said.append(
                f"{self.background[0]!r} is the name of label 0 and no class of its own: pixels that "
                f"{listed(self.background)} {'win' if len(self.background) > 1 else 'wins'} are 0"
            )
        return tuple(said)

    def __len__(self) -> int:
        return len(self.names)


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names as a sentence shows them: in quotes, no more than `most`, and the number of the others."""
    rest = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + rest


def _type_in_words(given: object) -> str:
    """What a value is, and of a sequence what its first item that is no text is."""
    kind = type(given).__name__
    if isinstance(given, list | tuple):
        wrong = next((item for item in given if not isinstance(item, str)), None)
        return f"a {kind} with {type(wrong).__name__} in it"
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _key(name: str) -> str:
    """A name as it is compared."""
    return unicodedata.normalize("NFC", name.strip()).casefold()


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
