"""Names -> queries -> text embeddings: the vocabulary part, worked out once per vocabulary and never per frame."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizerFast

from .vocabulary import Vocabulary

SAME_MEANING = 0.9
"""A negative whose text cosine with a name is above this is left out: it would compete with what was asked for."""
_TEXT_BATCH = 256
_log = logging.getLogger(__name__)


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
