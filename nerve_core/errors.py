"""Errors that a caller can act on: models that cannot be loaded, and too little memory."""


class ModelError(RuntimeError):
    """Models that cannot be loaded; the message says what was looked for, where, and what to do."""


class OutOfMemory(RuntimeError):
    """The device or the machine has too little memory for what was asked; caches and buffers are freed already."""


def not_finite(of: str, precision: str) -> RuntimeError:
    """The error of values that are no finite numbers. of: what computed them; precision: such as "float16"."""
    if precision == "float32":
        return RuntimeError(
            f"{of} values are not finite in float32: a weight is damaged; nerve models verify --deep PAIR names it"
        )
    return RuntimeError(f"{of} values overflow in {precision}; use precision bf16 or fp32")
