"""Segments images and publishes the masks, and answers questions, all on the worker's thread.

What the executor's thread reads of it (stage, operator, doubts, segmenter) is replaced, never changed. An image is
segmented with one snapshot of vocabulary and labels from start to end, whatever is asked for meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from rclpy.clock import Clock
from rclpy.impl.rcutils_logger import RcutilsLogger
from sensor_msgs.msg import CompressedImage, Image

from nerve_core import Vocabulary
from nerve_ros.depth import Match
from nerve_ros.health import Health
from nerve_ros.images import ImageError, ValueRange, to_rgb
from nerve_ros.labels import Labels
from nerve_ros.log_burst import LogBurst
from nerve_ros.outputs import Outputs
from nerve_ros.parameters import NodeConfig
from nerve_ros.services import located, not_located, settle
from nerve_ros.srv import Locate

if TYPE_CHECKING:
    from nerve_core import Segmentation, Segmenter
    from nerve_core.segmenter import EncodedImage
    from nerve_core.settings import Settings
    from nerve_core.text.encoder import QueryEmbeddings

THROTTLE = 5.0
"""Seconds between two log lines about images that cannot be used."""

DOUBTS_LOGGED = 20
"""Vocabularies whose doubts are logged within THROTTLE seconds, at most."""

OUT_OF_MEMORY_LIMIT = 3
"""Images in a row that found no memory, after which the parameter on_out_of_memory says what to do."""


@dataclass(frozen=True)
class Frame:
    """An image message, when it came in (seconds of the steady clock), and the depth image that goes with it."""

    message: Image | CompressedImage
    arrived: float
    match: Match | None = None


@dataclass
class Request:
    """A vocabulary that was accepted, the class ids of its names, and whether a LabelInfo with them was published."""

    config: NodeConfig
    vocabulary: Vocabulary
    labels: Labels
    shown: bool = False


@dataclass(frozen=True)
class Snapshot:
    """Everything an image needs of one vocabulary. doubts: what the model cannot make of it, "" for nothing."""

    request: Request
    embeddings: QueryEmbeddings
    id_table: np.ndarray
    doubts: str = ""


@dataclass(frozen=True)
class Question:
    """Where one thing is: a vocabulary of a single name, when it was asked (steady clock), and who waits for it."""

    vocabulary: Vocabulary
    want_mask: bool
    asked: float
    answer: Future[Locate.Response]


@dataclass(frozen=True)
class Model:
    """A loaded model pair, and the settings that it came with."""

    segmenter: Segmenter
    settings: Settings


@dataclass
class Seen:
    """The newest image that could be read, and what was computed of it so far."""

    frame: Frame
    image: np.ndarray
    snapshot: Snapshot
    encoded: EncodedImage | None = None
    segmentation: Segmentation | None = None


class Pipeline:
    """A loaded model pair and the image it saw last.

    config(): the parameters now. publishing(): whether the node is active and the process is not about to end.
    too_often_out_of_memory(): called once OUT_OF_MEMORY_LIMIT images in a row found no memory.
    """

    def __init__(
        self,
        *,
        log: RcutilsLogger,
        clock: Clock,
        health: Health,
        config: Callable[[], NodeConfig],
        publishing: Callable[[], bool],
        too_often_out_of_memory: Callable[[], None],
    ) -> None:
        self._log, self._clock, self._health = log, clock, health
        self._config, self._publishing = config, publishing
        self._too_often_out_of_memory = too_often_out_of_memory
        self._model: Model | None = None
        self.outputs: Outputs | None = None
        self.stage = self.operator = self.doubts = ""
        self._doubts_logged = LogBurst(DOUBTS_LOGGED, THROTTLE)
        self._applied: NodeConfig | None = None
        self._seen: Seen | None = None
        self._unseen = ""
        self._out_of_memory_in_a_row = 0
        self._labels_pending = True
        self._value_range = ValueRange()

    @property
    def segmenter(self) -> Segmenter | None:
        """None while no model pair is loaded."""
        model = self._model
        return None if model is None else model.segmenter

    @property
    def _loaded(self) -> Model:
        if self._model is None:
            raise RuntimeError("no model pair is loaded")
        return self._model

    # Loading.

    def load(self, config: NodeConfig, device: str) -> str:
        """Load the model pair that `config` names on `device`; returns its description, one line for a log.

        Raises ModelError, ValueError or RuntimeError.
        """
        from nerve_core import Segmenter
        from nerve_core.models.loading import quiet_libraries

        quiet_libraries()
        self.stage = f"loading model pair '{config.model}'"
        segmenter = Segmenter.from_pretrained(
            config.model,
            device=device,
            dtype=None if config.precision == "auto" else config.precision,
            preset=config.preset,
            revision=config.revision or None,
            cache_dir=config.cache_dir or None,
            offline=True if config.offline else None,
            settings=config.load_settings(),
            compile=config.compile,
        )
        self._model = Model(segmenter, segmenter.settings)
        self._out_of_memory_in_a_row = 0
        self.stage = "embedding the vocabulary"
        return segmenter.description

    def warm_up(self) -> None:
        """Run one image through the models, so that the first real one is not slow."""
        self.stage = "warming up"
        self._loaded.segmenter.warm_up()

    def unload(self) -> None:
        """Give the models' memory back."""
        self.forget("the model is not loaded")
        if self._model is not None:
            self._model.segmenter.close()
        self._model = self._applied = None
        self.doubts = ""
        self._value_range = ValueRange()

    def forget(self, reason: str) -> None:
        """Forget the image that was seen last; `reason` is why none can be searched until another comes."""
        self._seen, self._unseen = None, reason

    # Vocabularies.

    def prepare(self, request: Request) -> Generator[None, None, Snapshot]:
        """The snapshot of `request`, in steps between which images can be worked on."""
        segmenter = self._loaded.segmenter
        embeddings = yield from segmenter.embed_steps(request.vocabulary)
        doubts = segmenter.doubts(request.vocabulary)
        for doubt in doubts if doubts and self._doubts_logged.allows() else ():
            if doubt.grave:
                self._log.error(doubt.text)
            else:
                self._log.warning(doubt.text)
        return Snapshot(request, embeddings, request.labels.id_table(), "; ".join(doubt.text for doubt in doubts))

    def doubts_about(self, vocabulary: Vocabulary) -> tuple[str, ...]:
        """What the model pair that is loaded cannot make of a vocabulary, in sentences. Called on any thread."""
        segmenter = self.segmenter
        return () if segmenter is None else tuple(doubt.text for doubt in segmenter.doubts(vocabulary))

    def publish_labels(self, snapshot: Snapshot | None) -> None:
        """Publish the LabelInfo of `snapshot` if it differs from the last, and create the topics that it needs."""
        if self.outputs is None or snapshot is None:
            return
        # It goes out before any image does: where it fails, the next image tries it again.
        self._labels_pending = True
        self.doubts = snapshot.doubts
        config = self._config()
        self._apply(config)
        request = snapshot.request
        request.shown |= self.outputs.label_info(
            request.labels,
            request.config.background_name,
            self._loaded.segmenter.settings.readout.threshold,
            self._clock.now().to_msg(),
        )
        self.outputs.confidence_topics(request.labels, config.dense_names())
        self._labels_pending = False

    def _apply(self, config: NodeConfig) -> bool:
        """Have the segmenter go by the settings of `config` that may change between images; whether any changed."""
        if config is self._applied:
            return False
        model = self._loaded
        settings = model.settings.replaced(config.frame_settings())
        different = settings != model.segmenter.settings or (
            self._applied is not None and config.confidence_classes != self._applied.confidence_classes
        )
        model.segmenter.settings, self._applied = settings, config
        return different

    # Images.

    def process(self, frame: Frame, snapshot: Snapshot) -> None:
        """Segment the image of `frame` and publish what there is to say of it; only look at it while disabled."""
        from nerve_core import OutOfMemory

        # Whatever goes wrong from here on, an older image is not the newest.
        self.forget("the newest image could not be segmented; the log and the diagnostics say why")
        try:
            self._process(frame, snapshot)
        except OutOfMemory as error:
            self._health.dropped()
            self.forget(str(error))
            self._out_of_memory(error)
        except Exception:
            self._health.dropped()
            raise

    def _process(self, frame: Frame, snapshot: Snapshot) -> None:
        config, header = self._config(), frame.message.header
        stamp = header.stamp.sec + 1e-9 * header.stamp.nanosec
        age = self._clock.now().nanoseconds * 1e-9 - stamp
        if config.max_image_age and age > config.max_image_age:
            self._health.dropped()
            reason = f"its stamp is {age:.2f} s old, max_image_age is {config.max_image_age:g} s"
            if not stamp:
                reason = (
                    f"it has no stamp, so that its age is not known, and max_image_age is {config.max_image_age:g} s; "
                    "have the camera stamp its images, or set max_image_age to 0.0"
                )
            self.forget(f"the newest image {'is too old' if stamp else 'cannot be used'}: {reason}")
            self._log.warning(f"image dropped: {reason}", throttle_duration_sec=THROTTLE)
            return
        if self._apply(config) or self._labels_pending:
            self.publish_labels(snapshot)
        started = time.perf_counter()
        try:
            image = to_rgb(frame.message, self._value_range)
        except ImageError as error:
            self.forget(f"the newest image cannot be read: {error}")
            self._health.rejected(error.kind, str(error))
            self._log.error(f"image dropped: {error}", throttle_duration_sec=THROTTLE)
            return
        converted = time.perf_counter()
        if news := self._value_range.news():
            self._log.warning(news)
        seen = Seen(frame, image, snapshot)
        if not config.enabled:
            self._health.dropped()
            self._seen = seen
            return
        if self.outputs is None:
            raise RuntimeError("the node is not configured")
        wanted = self.outputs.wanted_maps(snapshot.request.labels)
        segmentation = self._segment(seen, wanted)
        computed = time.perf_counter()
        self._out_of_memory_in_a_row = 0
        self._seen = seen
        if not self._publishing():
            self._health.dropped()
            return
        self.outputs.image(
            header, segmentation, snapshot.request.labels, snapshot.id_table, image, config.overlay_alpha, wanted
        )
        published = time.perf_counter()
        self._health.segmented(
            stamp=stamp,
            now=self._clock.now().nanoseconds * 1e-9,
            latency=time.monotonic() - frame.arrived,
            stages_ms={
                **segmentation.timings,
                "convert": 1e3 * (converted - started),
                "infer": 1e3 * (computed - converted),
                "publish": 1e3 * (published - computed),
            },
        )

    def _segment(self, seen: Seen, maps: tuple[int, ...] = ()) -> Segmentation:
        from nerve_core.segmenter import unlabelled

        height, width = seen.image.shape[:2]
        if not seen.snapshot.embeddings.names:
            seen.segmentation = unlabelled((height, width))
            return seen.segmentation
        encoded = self._encode(seen)
        seen.segmentation = self._loaded.segmenter.segment(encoded, seen.snapshot.embeddings, maps=maps)
        self.operator = seen.segmentation.operator
        return seen.segmentation

    def _encode(self, seen: Seen) -> EncodedImage:
        if seen.encoded is None:
            seen.encoded = self._loaded.segmenter.encode(seen.image)
        return seen.encoded

    def _out_of_memory(self, error: Exception) -> None:
        self._health.failed(f"{error}: image dropped")
        self._out_of_memory_in_a_row += 1
        self._log.error(f"{error}: image dropped ({self._out_of_memory_in_a_row} in a row)")
        if self._out_of_memory_in_a_row == OUT_OF_MEMORY_LIMIT:
            self._too_often_out_of_memory()

    # Questions.

    def answer(self, question: Question) -> None:
        """Say where the question's name is in the newest image; the published vocabulary is not touched."""
        if question.answer.done():
            return
        try:
            response = self._search(question.vocabulary, question.want_mask)
        except Exception as error:
            self._health.failed(f"locate: {error}")
            response = not_located(f"the search failed: {error}")
            self._log.error(f"locate failed: {error!r}", throttle_duration_sec=THROTTLE)
        if settle(question.answer, response):
            self._health.located(time.monotonic() - question.asked)

    def _search(self, wanted: Vocabulary, want_mask: bool) -> Locate.Response:
        seen = self._seen
        if seen is None:
            return not_located(self._unseen)
        serving = seen.snapshot.request.vocabulary
        label = label_of(wanted, serving)
        if label is not None:
            segmentation = self._segment(seen) if seen.segmentation is None else seen.segmentation
        else:
            # The names of the vocabulary compete with it for the pixels, as if it were one of them.
            from nerve_core.text.encoder import exhaust

            competing, label = extended(serving, wanted)
            encoded = self._encode(seen)
            embeddings = exhaust(self._loaded.segmenter.embed_steps(competing))
            segmentation = self._loaded.segmenter.segment(encoded, embeddings, follow=False)
        mask = np.asarray(cv2.compare(segmentation.labels, np.array([label], np.uint8), cv2.CMP_EQ))
        found, header = segmentation.class_confidence[label - 1], seen.frame.message.header
        response = located(header, found, mask, seen.frame.match, want_mask=want_mask)
        response.message = "; ".join([*filter(None, [response.message]), *self.doubts_about(wanted)])
        return response


def label_of(wanted: Vocabulary, serving: Vocabulary) -> int | None:
    """The label of the class of `serving` that the single name of `wanted` is a word of; None where it is of none."""
    key = wanted.names[0].casefold()
    for label, words in enumerate(serving.synonyms, 1):
        if key in (word.casefold() for word in words):
            return label
    return None


def extended(serving: Vocabulary, wanted: Vocabulary) -> tuple[Vocabulary, int]:
    """`serving` with the single name of `wanted`, which is none of its words, as one class more; and its label.

    Only that class where `serving` is full, or has the name as a word of its background.
    """
    given: dict[str, Any] = {"negatives": serving.negatives, "background_name": wanted.background_name}
    try:
        made = Vocabulary([*serving.entries, *wanted.entries], **given)
    except ValueError:
        made = serving
    if len(made) <= len(serving):
        made = Vocabulary(wanted.entries, **given)
    return made, len(made)
