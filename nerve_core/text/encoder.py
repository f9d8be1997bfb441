"""Names, synonyms and negatives -> query embeddings by CLIP's text model: once per vocabulary, never per frame."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer

from ..errors import not_finite
from .cache import EmbeddingCache, space_of
from .limits import TokenLimit
from .vocabulary import Vocabulary

SAME_MEANING = 0.9
"""A negative whose text cosine with a name is above this is left out: it would compete with what was asked for."""
_TOKENS_PER_STEP = {"cpu": 256, "cuda": 4096}  # padding included: some 20 and 340 templates of a short name
_WORDS_KEPT = 4096
Result = TypeVar("Result")


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
        tokenizer: CLIPTokenizer,
        templates: Sequence[str],
        *,
        identity: str,
        cache: EmbeddingCache | None = None,
    ) -> None:
        """templates: each with one "{}". identity: of these weights at their precision, and of no others."""
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong or not templates:
            raise ValueError(f"every template needs exactly one {{}}; got {wrong or 'none'}")
        self._clip, self._tokenizer, self.templates = clip, tokenizer, tuple(templates)
        self._cache, self._space = cache, space_of("words", identity, *templates)
        self.size, positions = _sizes_of(clip.config)
        self._length = min(tokenizer.model_max_length, positions)
        self.limit = TokenLimit(tokenizer.backend_tokenizer, templates, self._length)
        self._tokens_per_step = _TOKENS_PER_STEP[clip.device.type]
        self._known: OrderedDict[str, np.ndarray] = OrderedDict()  # last used last

    def __call__(self, words: Sequence[str]) -> Tensor:
        """Unit embeddings float32 [words, D] on the model's device."""
        return exhaust(self.steps(words))

    def steps(self, words: Sequence[str]) -> Generator[None, None, Tensor]:
        """As the call, a little at a time: yields before each pass through the text model.

        A word is remembered as soon as its last template is through, whether the generator goes on or not.
        """
        found = self._recalled(dict.fromkeys(words))
        missing = sorted((word for word in dict.fromkeys(words) if word not in found), key=len)
        for group in self._groups(missing):
            texts = [text for tokens in group.values() for text in tokens]
            vectors = torch.empty(len(texts), self.size)
            for batch in self._batches(texts):
                yield
                vectors[batch] = self._embed([texts[k] for k in batch])
            means = F.normalize(vectors.unflatten(0, (len(group), -1)).mean(1), dim=-1)
            found |= self._remembered(dict(zip(group, means.numpy(), strict=True)))
        stacked = np.array([found[word] for word in words], np.float32).reshape(len(words), self.size)
        return torch.from_numpy(stacked).to(self._clip.device)

    def close(self) -> None:
        """Record in the cache which words were used: it keeps those longest."""
        if self._cache is not None:
            self._cache.close()

    def _groups(self, words: Iterable[str]) -> Iterator[dict[str, list[list[int]]]]:
        """The token ids of each word's templates: as many words as a step takes, at least one."""
        group: dict[str, list[list[int]]] = {}
        count = longest = 0
        for word in words:
            texts = [template.replace("{}", word) for template in self.templates]
            tokens = self._tokenizer(texts, truncation=True, max_length=self._length)["input_ids"]
            count, longest = count + len(tokens), max(longest, *map(len, tokens))
            if group and count * longest > self._tokens_per_step:
                yield group
                group, count, longest = {}, len(tokens), max(map(len, tokens))
            group[word] = tokens
        if group:
            yield group

    def _batches(self, texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Numbers of texts that are passed through the model together: of like length, as many as a step takes."""
        batch: list[int] = []
        for k in sorted(range(len(texts)), key=lambda k: len(texts[k])):
            if batch and (len(batch) + 1) * len(texts[k]) > self._tokens_per_step:
                yield batch
                batch = []
            batch.append(k)
        yield batch

    @torch.no_grad()
    def _embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Unit vectors of texts given as token ids: float32 [texts, D], on the host as the caches are.

        No mask: attention is causal and the first end of text is what is pooled, so nothing sees what pads.
        """
        rows = pad_sequence(
            [torch.tensor(text) for text in texts], batch_first=True, padding_value=self._tokenizer.eos_token_id
        )
        pooled = self._clip.text_model(input_ids=rows.to(self._clip.device)).pooler_output
        vectors = F.normalize(self._clip.text_projection(pooled).float(), dim=-1).cpu()
        if not vectors.isfinite().all():
            raise not_finite("the text model's", str(self._clip.dtype).removeprefix("torch."))
        return vectors

    def _recalled(self, words: Iterable[str]) -> dict[str, np.ndarray]:
        """Those words that are known, from memory or else from disk."""
        known = {word: self._known[word] for word in words if word in self._known}
        others = [word for word in words if word not in known]
        stored = self._cache.get(self._space, others) if self._cache is not None and others else {}
        return self._kept(known | {word: vector for word, vector in stored.items() if vector.shape == (self.size,)})

    def _remembered(self, vectors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Keep new words in memory and on disk."""
        if self._cache is not None:
            self._cache.put(self._space, vectors)
        return self._kept(vectors)

    def _kept(self, vectors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Keep words in memory, where those used last push out others."""
        for word, vector in vectors.items():
            self._known[word] = vector
            self._known.move_to_end(word)
        while len(self._known) > _WORDS_KEPT:
            self._known.popitem(last=False)
        return vectors


def _sizes_of(config: CLIPConfig) -> tuple[int, int]:
    """D of the embeddings, and the most tokens of a text. Raises ValueError for a configuration that lacks either."""
    text, size = config.text_config, config.projection_dim
    if not isinstance(text, CLIPTextConfig) or size is None:
        raise ValueError("CLIP's configuration must have a text_config and a projection_dim")
    return size, text.max_position_embeddings


def vocabulary_steps(
    vocabulary: Vocabulary,
    encoder: TextEncoder,
    default_negatives: Iterable[str],
    *,
    mean_negative: bool = True,
) -> Generator[None, None, QueryEmbeddings]:
    """Names, synonyms and negatives as queries, a little at a time: yields where the caller may do something else, see
    `TextEncoder.steps`.

    The words of the background are negatives beside the others. A negative that is one of the names' words, or whose
    cosine with one is above `SAME_MEANING`, is left out. With three or more names and `mean_negative`, the mean of
    their embeddings is one more negative.
    """
    words = vocabulary.words
    labels = [label for label, group in enumerate(vocabulary.synonyms, 1) for _ in group]
    if not words:
        return QueryEmbeddings(vocabulary, torch.zeros(0, encoder.size), torch.zeros(0, dtype=torch.int64))
    asked = {word.casefold() for word in words}
    wanted = [*(default_negatives if vocabulary.negatives is None else vocabulary.negatives), *vocabulary.background]
    negatives = list({word.casefold(): word for word in wanted if word.casefold() not in asked}.values())
    vectors = yield from encoder.steps([*words, *negatives])
    named, against = vectors[: len(words)], vectors[len(words) :]
    parts = [named, against[(against @ named.T).amax(1) <= SAME_MEANING]]
    if mean_negative and len(vocabulary) >= 3:
        parts.append(F.normalize(named.mean(0, keepdim=True), dim=-1))
    embeddings = torch.cat(parts)
    classes = torch.zeros(len(embeddings), dtype=torch.int64)
    classes[: len(labels)] = torch.tensor(labels)
    return QueryEmbeddings(vocabulary, embeddings, classes.to(embeddings.device))


def exhaust(steps: Generator[None, None, Result]) -> Result:
    """What a generator returns in the end, in one go."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value
