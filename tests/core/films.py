"""Short films with the truth of every pixel, for the tests of carrying."""

from __future__ import annotations

import functools

import cv2
import numpy as np

from nerve_core.embedded.scenes import Scene, draw_scene

SIZE = (240, 320)
STEP = 100_000_000
"""Nanoseconds between two images."""


@functools.cache
def world(seed: int = 5) -> Scene:
    """A wide scene that a camera can move over."""
    return draw_scene(seed, size=(600, 1400), objects=(24, 24), object_size=(0.1, 0.3))


def view(
    x: float, y: float = 300.0, *, scale: float = 1.0, roll: float = 0.0, skew: float = 0.0, seed: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels of `SIZE` about the place (x, y) of a world; skew: columns from each row to the next."""
    rows, columns = SIZE
    u = np.arange(columns)[None, :] - (columns - 1) / 2
    v = np.arange(rows)[:, None] - (rows - 1) / 2
    cos, sin = scale * np.cos(roll), scale * np.sin(roll)
    at_x = (x + cos * u - sin * v + skew * v).astype(np.float32)
    at_y = (y + sin * u + cos * v + 0 * skew).astype(np.float32)
    scene = world(seed)
    image = cv2.remap(scene.image, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    labels = cv2.remap(scene.labels, at_x, at_y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT)
    return image, labels


def noisy(image: np.ndarray, seed: int, sigma: float = 2.5, gain: float = 1.0) -> np.ndarray:
    """What a sensor makes of an image."""
    noise = np.random.default_rng(seed).standard_normal(image.shape, dtype=np.float32) * np.float32(sigma)
    return np.clip(np.rint(image * np.float32(gain) + noise), 0, 255).astype(np.uint8)
