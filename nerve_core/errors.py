"""The errors that say what a caller can do something about: models that cannot be loaded, memory that is lacking."""


class ModelError(RuntimeError):
    """Models that cannot be loaded; the message says what was looked for, where, and what to do."""


class OutOfMemory(RuntimeError):
    """The device, or the machine, has no room for what was asked; whatever could be spared is given back already."""
