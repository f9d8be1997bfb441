"""Images in, the networks' results for some of them in when they are ready; the mask of the newest image out."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from ..text.vocabulary import UNLABELLED
from .fade import Fade
from .flow import TEXTURE, Flow, SmallImage, explained, grid_size, unchanged, unexplained_share
from .move import Mover, paired

STILL = 0.5
"""Pixels of the displacements' grid: what moved by no more, and looks the same without any motion, stands still."""


class Seen(Enum):
    """What became of an image; the values are for people to read."""

    FOLLOWED = "followed from the image before"
    FIRST = "the first image"
    REPEATED = "it has the stamp of the image before, and was left out"
    CUT = "the flow does not explain it: another scene, or a turn too fast"
    SIZE = "it has another size than the image before"
    BACK = "its stamp is older than that of the image before"
    GAP = "the image before is too long ago"

    @property
    def ends(self) -> bool:
        """Whether what was known ended with it: no mask is carried until the next keyframe."""
        return self not in (Seen.FOLLOWED, Seen.REPEATED)


class Taken(Enum):
    """What became of a result of the networks; the values are for people to read."""

    KEYFRAME = "masks are carried from it"
    UNKNOWN = "its image was not seen, or came before a cut"
    LATE = "its image is older than the limit or the images that are remembered"
    OLDER = "there is a newer keyframe already"


@dataclass(frozen=True)
class CarrySettings:
    """How masks are carried. Raises ValueError.

    limit: seconds after which a keyframe says nothing any more. longest_gap: seconds between two images, at most, that
    are followed. size: longer side in pixels of the images on which motion is looked for, 64 to 640. history: images
    that a result may lag behind, at most, 1 or more. cut: share of the textured pixels that the flow may leave
    unexplained before an image counts as another scene, above 0 to 1. fade: of the confidence.
    """

    limit: float = 2.0
    longest_gap: float = 0.5
    size: int = 320
    history: int = 64
    cut: float = 0.4
    fade: Fade = field(default_factory=Fade)

    def __post_init__(self) -> None:
        for name, seconds in (("limit", self.limit), ("longest_gap", self.longest_gap)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name} is {seconds}; it must be finite and above 0 s")
        for name, number, least, most in (("size", self.size, 64, 640), ("history", self.history, 1, 1000)):
            if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
                raise ValueError(f"{name} is {number!r}; accepted: a whole number from {least} to {most}")
        if not 0 < self.cut <= 1:
            raise ValueError(f"cut is {self.cut}; accepted: above 0 to 1")


@dataclass(frozen=True)
class Carried:
    """The mask of the newest image.

    labels: uint8 [H, W], 255 where nothing is known. confidence: uint8 [H, W], the probability of the label, linear in
    0..255, faded by the keyframe's age; 0 where labels are 255. coverage: the share of pixels that are known, 0..1.
    stamp: of the image, in nanoseconds. keyframe: stamp of the image that the networks saw, in nanoseconds, and age:
    seconds from there to the image; None where nothing is carried. reason: why nothing is carried; "" where it is.
    The arrays may be the keyframe's own: they must not be written to.
    """

    labels: np.ndarray
    confidence: np.ndarray
    coverage: float
    stamp: int
    keyframe: int | None
    age: float | None
    reason: str


@dataclass
class _Image:
    """One image of the history. back: the displacement to the image before; None for the first."""

    stamp: int
    small: SmallImage
    back: np.ndarray | None


@dataclass
class _Keyframe:
    """What is carried, and from where: the displacement from the newest image, and where it stays in the view and both
    images look alike (`known`, uint8 [h, w], 255 or 0)."""

    image: _Image
    labels: np.ndarray
    confidence: np.ndarray
    both: np.ndarray
    displacement: np.ndarray
    known: np.ndarray


class Carrier:
    """Follows a camera's images and carries the newest keyframe's mask along with them.

    Every image goes to `see`, every result of the networks to `keyframe`, in any order between them; `mask` is then the
    newest image's. One thread at a time: whoever runs the networks hands results over to the thread that carries.
    Memory, at most: `history` images of 0.3 MB each with the default size (20 MB) and the keyframe's mask twice.
    """

    def __init__(self, settings: CarrySettings | None = None) -> None:
        self.settings = CarrySettings() if settings is None else settings
        self._size: tuple[int, int] | None = None
        self._history: deque[_Image] = deque()
        self._key: _Keyframe | None = None
        self._reason = "no image yet"

    @property
    def nbytes(self) -> int:
        """Bytes of the images and masks that are remembered."""
        total = sum(one.small.nbytes + (0 if one.back is None else one.back.nbytes) for one in self._history)
        if self._key is not None:
            key = self._key
            arrays = (key.labels, key.confidence, key.both, key.displacement, key.known)
            total += sum(array.nbytes for array in arrays) + key.image.small.nbytes
        return total

    def forget(self, reason: str) -> None:
        """Carry nothing until the next keyframe, of an image that is still to come. reason: for `Carried.reason`."""
        self._history.clear()
        self._key = None
        self._reason = reason

    def see(self, image: np.ndarray, stamp: int) -> Seen:
        """Take the next image: uint8 [H, W, 3], RGB, not kept; stamp in nanoseconds. Raises ValueError."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"an image must be a uint8 array [rows, columns, 3], none of them 0; got {image.dtype} "
                f"{list(image.shape)}"
            )
        size = image.shape[:2]
        before = self._history[-1] if self._history else None
        if before is not None and size == self._size and stamp == before.stamp:
            return Seen.REPEATED
        if size != self._size:
            found = Seen.FIRST if self._size is None else Seen.SIZE
            self._resize(size)
            return self._restart(found, _Image(stamp, SmallImage(image, self._flow.grid), None))
        newest = _Image(stamp, SmallImage(image, self._flow.grid), None)
        if before is None:
            self._history.append(newest)
            return Seen.FIRST
        if stamp < before.stamp:
            return self._restart(Seen.BACK, newest)
        if stamp - before.stamp > self.settings.longest_gap * 1e9:
            return self._restart(Seen.GAP, newest)
        back = self._flow.between(newest.small, before.small)
        difference = self._flow.compare(newest.small, before.small, back)
        if unexplained_share(*difference, self._flow.inside(back)) > self.settings.cut:
            return self._restart(Seen.CUT, newest)
        newest.back = back
        self._history.append(newest)
        self._trim()
        if self._key is not None:
            key = self._key
            key.displacement = self._flow.compose(back, key.displacement)
            self._anchor(key)
        return Seen.FOLLOWED

    def keyframe(self, stamp: int, labels: np.ndarray, confidence: np.ndarray) -> Taken:
        """Take what the networks found in the image of `stamp`: uint8 [H, W] both, as of a Segmentation.

        The arrays are kept and must not be changed afterwards. Raises ValueError for other types or sizes than the
        image's.
        """
        place = next((place for place, one in enumerate(self._history) if one.stamp == stamp), None)
        if place is None:
            if self._history and stamp < self._history[0].stamp and self._history[0].back is not None:
                return Taken.LATE
            return Taken.UNKNOWN
        for name, array in (("labels", labels), ("confidence", confidence)):
            if array.dtype != np.uint8 or array.shape != self._size:
                raise ValueError(
                    f"{name} must be uint8 {list(self._size or ())} as the image; got {array.dtype} {list(array.shape)}"
                )
        if self._key is not None and stamp < self._key.image.stamp:
            return Taken.OLDER
        image, later = self._history[place], list(self._history)[place + 1 :]
        rows, columns = self._flow.grid
        displacement, known = np.zeros((rows, columns, 2), np.float32), np.full((rows, columns), 255, np.uint8)
        key = _Keyframe(image, labels, confidence, paired(labels, confidence), displacement, known)
        for one in later:
            assert one.back is not None
            key.displacement = self._flow.compose(one.back, key.displacement)
        if later:
            self._anchor(key)
        self._key, self._reason = key, ""
        return Taken.KEYFRAME

    def mask(self) -> Carried:
        """The newest image's mask. Raises RuntimeError where no image was seen."""
        if not self._history or self._size is None:
            raise RuntimeError(f"there is no image to give a mask for ({self._reason}); call see first")
        newest, key = self._history[-1], self._key
        if key is None:
            return self._unknown(newest.stamp, self._reason)
        age = (newest.stamp - key.image.stamp) * 1e-9
        if key.image is newest:
            coverage = float((key.labels != UNLABELLED).mean())
            return Carried(key.labels, key.confidence, coverage, newest.stamp, newest.stamp, age, "")
        fade = self.settings.fade.table(age)
        labels, confidence, coverage = self._mover(key.both, key.displacement, key.known, fade)
        return Carried(labels, confidence, coverage, newest.stamp, key.image.stamp, age, "")

    def _anchor(self, key: _Keyframe) -> None:
        """Correct the displacement to a keyframe by looking at both images, so that errors of single steps do not add
        up; known stays only what looks alike in both."""
        newest, flow = self._history[-1].small, self._flow
        displacement = key.displacement
        difference, contrast = flow.compare(newest, key.image.small, displacement)
        direct = flow.between(newest, key.image.small, displacement)
        its_difference, its_contrast = flow.compare(newest, key.image.small, direct)
        better = its_difference <= difference
        displacement = np.where(better[..., None], direct, displacement)
        alike = explained(np.where(better, its_difference, difference), np.where(better, its_contrast, contrast))
        near, textured = np.abs(displacement).max(-1) <= STILL, contrast > TEXTURE
        if np.count_nonzero(near & textured) < np.count_nonzero(textured) / 2:
            still = near & unchanged(newest, key.image.small)
        else:  # the camera stands still: where nothing has a texture, motion is the noise's
            still = unchanged(newest, key.image.small)
        displacement[still] = 0
        key.displacement = displacement
        key.known = ((alike | still) & flow.inside(displacement)).astype(np.uint8) * 255

    def _resize(self, size: tuple[int, int]) -> None:
        """Prepare for images of another size."""
        self._size = size
        grid = grid_size(size, self.settings.size)
        self._flow, self._mover = Flow(grid), Mover(size, grid)

    def _restart(self, found: Seen, first: _Image) -> Seen:
        self.forget("no keyframe yet" if found is Seen.FIRST else found.value)
        self._history.append(first)
        return found

    def _trim(self) -> None:
        """Forget what is too old."""
        newest = self._history[-1].stamp
        oldest = newest - round(self.settings.limit * 1e9)
        while len(self._history) > self.settings.history or self._history[0].stamp < oldest:
            self._history.popleft()
        if self._key is not None and self._key.image.stamp < oldest:
            self._key, self._reason = None, f"the keyframe is older than {self.settings.limit:g} s"

    def _unknown(self, stamp: int, reason: str) -> Carried:
        assert self._size is not None
        labels = np.full(self._size, UNLABELLED, np.uint8)
        return Carried(labels, np.zeros_like(labels), 0.0, stamp, None, None, reason)
