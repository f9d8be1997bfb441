"""NERVE: segments images by names of objects, without training. Independent of ROS.

from nerve_core import Segmenter

segmenter = Segmenter.from_pretrained("embedded")
found = segmenter(image, ["ball", "ladder"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import ModelError as ModelError
    from .errors import OutOfMemory as OutOfMemory
    from .readout import ClassConfidence as ClassConfidence
    from .segmenter import Segmentation as Segmentation
    from .segmenter import Segmenter as Segmenter
    from .text.vocabulary import Vocabulary as Vocabulary
    from .text.vocabulary import VocabularyError as VocabularyError

_MODULES = {
    "ClassConfidence": "readout",
    "ModelError": "errors",
    "OutOfMemory": "errors",
    "Segmentation": "segmenter",
    "Segmenter": "segmenter",
    "Vocabulary": "text.vocabulary",
    "VocabularyError": "text.vocabulary",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the model libraries take seconds to import."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
