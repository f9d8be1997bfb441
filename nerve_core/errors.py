"""Errors that a caller can act on: models that cannot be loaded, and too little memory."""


class ModelError(RuntimeError):
    """Models that cannot be loaded; the message says what was looked for, where, and what to do."""


class OutOfMemory(RuntimeError):
    """The device or the machine has too little memory for what was asked; caches and buffers are freed already."""
