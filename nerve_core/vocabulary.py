"""Names -> queries -> text embeddings: the vocabulary part, worked out once per vocabulary and never per frame."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizerFast

MAX_NAMES = 254
"""Class ids are bytes: 0 is the background and 255 is unlabelled."""
MAX_CHARACTERS = 128
SYNONYM_SEPARATOR = "|"
SAME_MEANING = 0.9
"""A negative whose text cosine with a name is above this is left out: it would compete with what was asked for."""
_TEXT_BATCH = 256
_log = logging.getLogger(__name__)


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
    Raises VocabularyError for more than 254 names, an empty word, one of over 128 characters or with control
    characters.
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
        return cls([part for part in re.split(r"[,\n]", text) if part.strip()], negatives=negatives)

    def __len__(self) -> int:
        return len(self.names)


def _as_text(word: object) -> str:
    if not isinstance(word, str):
        raise VocabularyError(f"a name must be text; got {word!r}")
    return word


def _clean(word: str) -> str:
    """A word in NFC without outer blanks, or VocabularyError."""
    # what is not printable is shown escaped, so that a message never carries it on
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in word.strip()):
        raise VocabularyError(f"name {word!r} has control characters: only printable text is accepted")
    word = unicodedata.normalize("NFC", word.strip())
    if not word:
        raise VocabularyError("an empty name is not accepted: every name and synonym needs at least one letter")
    if len(word) > MAX_CHARACTERS:
        raise VocabularyError(
            f"name {word[:24] + '...'!r} has {len(word)} characters: at most {MAX_CHARACTERS} are accepted"
        )
    return word


@dataclass(frozen=True)
class QueryEmbeddings:
    """A vocabulary as the frame part needs it.

    embeddings: float [queries, D], unit rows: the names' words, then the negatives.
    classes: int64 [queries], the label of each query; 0 for a negative.
    """

    vocabulary: Vocabulary
    embeddings: Tensor
    classes: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names; label k is names[k - 1]."""
        return self.vocabulary.names


class TextEncoder:
    """Words -> unit vectors through a set of templates, each word embedded once and remembered in memory and on
    disk."""

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: CLIPTokenizerFast,
        templates: Sequence[str],
        *,
        identity: str,
        cache: Path | None = None,
    ) -> None:
        """templates: each with one "{}". identity: what tells these weights from any others. cache: folder, or None."""
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong or not templates:
            raise ValueError(f"every template needs exactly one {{}}; got {wrong or 'none'}")
        self._clip, self._tokenizer, self.templates = clip, tokenizer, tuple(templates)
        self._identity = hashlib.sha256(json.dumps([identity, *templates]).encode()).hexdigest()
        self._folder = None if cache is None else cache / "text" / self._identity[:32]
        self._size = clip.config.projection_dim
        self._length = min(tokenizer.model_max_length, clip.config.text_config.max_position_embeddings)
        self._known: dict[str, Tensor] = {}

    def __call__(self, words: Sequence[str]) -> Tensor:
        """Unit embeddings float32 [words, D] on the model's device."""
        missing = [word for word in dict.fromkeys(words) if word not in self._known and not self._recall(word)]
        if missing:
            for word, vector in zip(missing, self._embed(missing), strict=True):
                self._known[word] = vector
                self._remember(word, vector)
        return torch.stack([self._known[word] for word in words])

    @torch.inference_mode()
    def _embed(self, words: Sequence[str]) -> Tensor:
        """Mean over the templates of unit vectors, made unit again: float32 [words, D]."""
        texts = [template.replace("{}", word) for word in words for template in self.templates]
        vectors = []
        for start in range(0, len(texts), _TEXT_BATCH):
            tokens = self._tokenizer(
                texts[start : start + _TEXT_BATCH],
                padding=True,
                truncation=True,
                max_length=self._length,
                return_tensors="pt",
            )
            tokens = tokens.to(self._clip.device)
            pooled = self._clip.text_model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            ).pooler_output
            vectors.append(F.normalize(self._clip.text_projection(pooled).float(), dim=-1))
        means = torch.cat(vectors).unflatten(0, (len(words), len(self.templates))).mean(1)
        return F.normalize(means, dim=-1)

    def _path(self, word: str) -> Path:
        assert self._folder is not None
        return self._folder / (hashlib.sha256(word.encode()).hexdigest()[:32] + ".safetensors")

    def _recall(self, word: str) -> bool:
        if self._folder is None or not self._path(word).is_file():
            return False
        try:
            stored = safetensors.torch.load_file(self._path(word))["embedding"]
        except (OSError, safetensors.SafetensorError, KeyError):
            return False  # a damaged entry is worked out again and overwritten
        if stored.shape != (self._size,) or stored.dtype != torch.float32:
            return False
        self._known[word] = stored.to(self._clip.device)
        return True

    def _remember(self, word: str, vector: Tensor) -> None:
        """Write a word's embedding; another process that writes the same at once does no harm."""
        if self._folder is None:
            return
        partial = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=self._folder, suffix=".partial")
            os.close(handle)
            safetensors.torch.save_file({"embedding": vector.cpu().contiguous()}, partial)
            os.replace(partial, self._path(word))
        except (OSError, safetensors.SafetensorError) as error:
            _log.warning(f"text embeddings are not kept in {self._folder}: {error}; name another cache folder")
            if partial is not None:
                Path(partial).unlink(missing_ok=True)
            self._folder = None  # said once


def embed_vocabulary(
    vocabulary: Vocabulary,
    encoder: TextEncoder,
    default_negatives: Iterable[str],
    *,
    mean_negative: bool = True,
) -> QueryEmbeddings:
    """Names, synonyms and negatives as queries.

    A negative that is one of the names' words, or whose cosine with one is above `SAME_MEANING`, is left out. With
    three or more names and `mean_negative`, the mean of their embeddings is one more negative.
    """
    words = [word for group in vocabulary.synonyms for word in group]
    labels = [label for label, group in enumerate(vocabulary.synonyms, 1) for _ in group]
    if not words:
        return QueryEmbeddings(
            vocabulary, torch.zeros(0, encoder._clip.config.projection_dim), torch.zeros(0, dtype=torch.int64)
        )
    named = encoder(words)
    asked = {word.casefold() for word in words}
    wanted = vocabulary.negatives if vocabulary.negatives is not None else tuple(default_negatives)
    negatives = list({word.casefold(): word for word in wanted if word.casefold() not in asked}.values())
    parts = [named]
    if negatives:
        against = encoder(negatives)
        parts.append(against[(against @ named.T).amax(1) <= SAME_MEANING])
    if mean_negative and len(vocabulary) >= 3:
        parts.append(F.normalize(named.mean(0, keepdim=True), dim=-1))
    embeddings = torch.cat(parts)
    classes = torch.zeros(len(embeddings), dtype=torch.int64, device=embeddings.device)
    classes[: len(labels)] = torch.tensor(labels, device=embeddings.device)
    return QueryEmbeddings(vocabulary, embeddings, classes)
