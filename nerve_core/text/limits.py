"""What a model cannot make of a vocabulary: names longer than its tokenizer takes, and names that it reads alike."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SHOWN = 5  # sentences of a kind


@dataclass(frozen=True)
class Doubt:
    """One thing that a model cannot make of a vocabulary, as a sentence with what to do. grave: masks will be wrong."""

    text: str
    grave: bool = False


class TokenLimit:
    """Which names a CLIP tokenizer cuts off. Safe to use from several threads at once."""

    def __init__(self, tokenizer: Tokenizer, templates: Sequence[str], length: int) -> None:
        """tokenizer: is copied. templates: each with one "{}". length: most tokens of a text, its ends included."""
        self._tokenizer = copy.deepcopy(tokenizer)  # what is set on the model's own changes between calls
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ends = len(self._tokenizer.encode("").ids)
        before = [len(self._ids(template.partition("{}")[0])) for template in templates]
        self.length = length
        self.least, self.most = (max(0, length - ends - count) for count in (max(before), min(before)))
        """Tokens of a name that fit behind the longest and the shortest beginning of a template."""

    def doubts(self, vocabulary: Vocabulary) -> tuple[Doubt, ...]:
        """What is to be said of a vocabulary's words, the gravest first."""
        tokens = {word: self._ids(word) for word in vocabulary.words}
        read_as: dict[tuple[int, ...], str] = {}
        classes = {word: label for label, group in enumerate(vocabulary.synonyms) for word in group}
        alike = []
        for word, ids in tokens.items():
            first = read_as.setdefault(tuple(ids[: self.most]), word)
            if classes[first] != classes[word]:
                alike.append(
                    f"{first!r} and {word!r} are one and the same to the model, and every pixel of either goes to the "
                    f"first: make them differ within their first {self.least} tokens"
                )
        cut = [word for word, ids in tokens.items() if len(ids) > self.least]
        said = [self._cut(word, len(tokens[word])) for word in cut[:_SHOWN]]
        return (
            *(Doubt(text, grave=True) for text in _with_count(alike[:_SHOWN], len(alike))),
            *map(Doubt, _with_count(said, len(cut))),
        )

    def _cut(self, word: str, count: int) -> str:
        starts = [start for start, _ in self._tokenizer.encode(word, add_special_tokens=False).offsets]
        lost = word[starts[self.least] :]
        return (
            f"{_ends_of(word)} has {count} tokens, and {self.least} fit into the model's {self.length} beside the "
            f"prompts' words: {_ends_of(lost)} is not read; use a shorter name"
        )

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _with_count(sentences: list[str], count: int) -> list[str]:
    """The first sentences of `count`, and how many there are beside them."""
    more = count - len(sentences)
    return [*sentences, f"the same holds for {more} more names"] if more else sentences


def _ends_of(text: str) -> str:
    """A name in quotes, without its middle where it is long."""
    return repr(text if len(text) <= 60 else f"{text[:30]}...{text[-24:]}")
