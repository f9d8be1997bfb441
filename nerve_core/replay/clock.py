"""When each image of a camera was taken, on one clock from the first to the last, whatever its stamps do."""

from __future__ import annotations

BACK = 10**9
"""Nanoseconds by which a clock may go back between two images without being said to jump: messages overtake."""
AHEAD = 24 * 3600 * 10**9
"""Nanoseconds by which it may go ahead; more is a simulation's clock beside the world's, or a time that was unset."""


class CameraClock:
    """The times of one camera's images, in nanoseconds.

    The first image decides: where it has a stamp, times are the stamps, else the log times. An image without stamp
    among stamped ones is placed by its log time's distance from the image before. Where the clock goes back by more
    than BACK or ahead by more than AHEAD no time passes, so that the times on both sides remain readable.
    """

    def __init__(self) -> None:
        self._by_stamp: bool | None = None
        self._reading = self._moment = self._log = 0
        self._images = self._unstamped = self._jumps = 0
        self._first_jump = (0, 0)  # by how much, at which image

    def moment(self, stamp: int, log: int) -> int:
        """When the next image was taken. stamp: of its header, 0 where there is none; log: its log time."""
        self._images += 1
        if self._by_stamp is None:
            self._by_stamp = stamp != 0
            self._reading = self._moment = stamp or log
            self._log = log
            return self._moment
        if not self._by_stamp:
            reading = log
        elif stamp:
            reading = stamp
        else:
            self._unstamped += 1
            passed = log - self._log
            reading = self._reading + (passed if -BACK <= passed <= AHEAD else 0)
        step = reading - self._reading
        if not -BACK <= step <= AHEAD:
            self._jumps += 1
            if self._jumps == 1:
                self._first_jump = step, self._images
            step = 0
        self._reading, self._log = reading, log
        self._moment += step
        return self._moment

    def notes(self, topic: str) -> tuple[str, ...]:
        """What is to be known of the times of `topic`; nothing where every image has a stamp and none jumps."""
        notes = []
        if self._by_stamp is False:
            notes.append(f"the first image of {topic} has no stamp: times are when its images were recorded")
        if self._unstamped:
            notes.append(
                f"{self._unstamped} of {self._images} images of {topic} have no stamp: their times follow from when "
                "they were recorded"
            )
        if self._jumps:
            step, image = self._first_jump
            often = "once" if self._jumps == 1 else f"{self._jumps} times, first"
            notes.append(
                f"the clock of {topic} jumps {often} by {step / 1e9:+.0f} s before image {image}: no time is "
                "counted there"
            )
        return tuple(notes)
