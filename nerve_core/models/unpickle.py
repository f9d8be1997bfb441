"""Rewrites weights that were published as pickles as one safetensors file; `conversion` runs it in its own process.

    python -m nerve_core.models.unpickle TARGET PICKLE...

The pickles, one or the shards of one model, are opened by PyTorch's restricted unpickler alone, which makes tensors and
plain values and stops at the first name of anything else. What was written is read back and compared. The result is one
JSON object on standard output: {"tensors": how many} or {"error": a sentence, "full": whether the disk was}. The
process ends when its standard input does, so that it never outlives the one that started it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

OLDEST_TORCH = (2, 10)
"""Before it a crafted file could run code in the restricted unpickler too (CVE-2025-32434, CVE-2026-24747)."""
_SHARED = 2  # tensors may share memory in a pickle and not in safetensors: how many times the pickle's bytes are taken
_SPARE = 1 << 20  # bytes, for models of next to nothing


class Refused(ValueError):
    """Weights that cannot be converted; the text says why."""


def read_pickles(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of a model's pickles, on the CPU and mapped from the disk where their format allows it.

    Raises Refused for what holds anything but one dictionary of tensors by name, or more than its own size explains.
    """
    if _torch_version() < OLDEST_TORCH:
        raise Refused(
            f"torch {torch.__version__} is installed, whose restricted unpickler a crafted file can get around; "
            f"upgrade to torch {'.'.join(map(str, OLDEST_TORCH))} or later"
        )
    tensors: dict[str, Tensor] = {}
    for path in paths:
        content = _unpickle(path)
        if not isinstance(content, dict) or not content:
            raise Refused(f"{path.name} holds no dictionary of tensors but {_kind(content)}")
        for name, value in content.items():
            if not isinstance(name, str) or name == "__metadata__":
                raise Refused(f"{path.name} has an entry {name!r:.80}, which is no name of a tensor")
            if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise Refused(f"{path.name} has an entry {name!r:.80} that is no plain tensor but {_kind(value)}")
            if name in tensors:
                raise Refused(f"{path.name} has {name!r:.80}, which another file of the same model has too")
            tensors[name] = value.detach()
    size = sum(path.stat().st_size for path in paths)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if needed > _SHARED * size + _SPARE:
        raise Refused(f"its tensors would take {needed} bytes where its files have {size}")
    return tensors


def write_safetensors(tensors: dict[str, Tensor], target: Path) -> None:
    """Write tensors and read them back. Tensors that share memory are written once each.

    Raises Refused where what is read back differs; OSError or SafetensorError where it cannot be written.
    """
    taken: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if place in taken else tensor.contiguous()
        taken.add(place)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(apart, target, metadata={"format": "pt"})
    with target.open("rb") as file:
        os.fsync(file.fileno())
    with safe_open(target, "pt") as stored:
        if set(stored.keys()) != set(tensors):
            raise Refused(f"{target.name} was written with other tensors than were read; the disk may be failing")
    for name, tensor in tensors.items():
        with safe_open(target, "pt") as stored:  # opened for each, or all that was read would stay mapped in memory
            copy = stored.get_tensor(name)
        if copy.dtype != tensor.dtype or copy.shape != tensor.shape or not torch.equal(_bytes(copy), _bytes(tensor)):
            raise Refused(f"{name} in {target.name} is not what was written; the disk may be failing")


def _unpickle(path: Path) -> object:
    """What a pickle holds. Raises Refused."""
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"  # else the format before torch 1.6, which cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except OSError:
        raise
    except Exception as error:  # a file that is damaged, or made to be, makes it raise many kinds
        raise Refused(_why(path, str(error))) from error


def _why(path: Path, text: str) -> str:
    """The sentence for what `torch.load` says of a file."""
    if found := re.search(r"(?:GLOBAL|class|function) ([\w.]+\.[\w.]+)", text):
        return (
            f"{path.name} asks for {found[1]}, which is no tensor: it may run code, so it was opened no further and "
            "nothing of it was kept; take the model from another place"
        )
    if "WeightsUnpickler error:" in text:
        text = text.split("WeightsUnpickler error:")[1]
    lines = text.strip().splitlines() or ["it cannot be read"]
    return f"{path.name} is damaged or no file of weights ({lines[0].strip().rstrip('.'):.200})"


def _torch_version() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])


def _kind(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's memory, so that NaN compares equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _end_with_standard_input() -> None:
    os.read(0, 1)  # not of sys.stdin, whose lock the interpreter wants at its end
    os._exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, print the result and end the process."""
    target, *pickles = map(Path, sys.argv[1:] if arguments is None else arguments)
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    torch.set_num_threads(1)
    result: dict[str, object]
    try:
        tensors = read_pickles(pickles)
        write_safetensors(tensors, target)
        result = {"tensors": len(tensors)}
    except Refused as error:
        result = {"error": str(error), "full": False}
    except Exception as error:  # the disk, memory, or a type that safetensors does not have
        full = os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error)
        result = {"error": (str(error).strip().splitlines() or [repr(error)])[0], "full": full}
    print(json.dumps(result), flush=True)
    os._exit(1 if "error" in result else 0)


if __name__ == "__main__":
    main()
