"""Declares every ROS parameter of the node, each once, with its type, text and rules.

A parameter is a field of :class:`NodeConfig`: its default gives the ROS type, its metadata the descriptor. What a
single value must obey is checked in ``NodeConfig.__post_init__``, so that start-up, ``set_parameters`` and tests
follow one rule. :func:`declare` reads the overrides, :func:`changed` answers a request to change some values.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.parameter import Parameter

from nerve_core import Vocabulary

if TYPE_CHECKING:
    from rclpy.node import Node

ALWAYS = "always"
UNCONFIGURED = "unconfigured"
START = "start"
_WHEN_TEXT = {
    ALWAYS: "May be set at any time.",
    UNCONFIGURED: "Read by configure: may be set while the node is unconfigured (deactivate and cleanup first).",
    START: "Read once, at start: may only be given to the node as it starts.",
}

MAX_PATH = 1024
"""Characters of a path or of the name of a model, at most."""

PAIR_VALUE = -1.0
"""What threshold and presence_threshold hold where the model pair's own value is meant."""

PRESET_EDGES = "pair"
"""What ``edges`` holds where the model pair's own value is meant."""

NO_NAMES = ("",)
"""How a parameter file writes an empty list of strings: ROS 2 cannot infer the type of ``[]``."""

MAX_CONFIDENCE_CLASSES = 16
"""Topics of single classes that the node has at most."""

PAIR_NEGATIVES = ("default",)
"""What ``negatives`` holds where the model pair's own list is meant."""


_RCLPY = ("use_sim_time", "start_type_description_service")
"""Parameters that every node of rclpy has."""


class ParameterError(ValueError):
    """A parameter's value is not acceptable; the text says which, why, and what is."""


def _parameter(
    default: Any,
    description: str,
    *,
    when: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    return dataclasses.field(
        default=default,
        metadata={
            "description": description,
            "when": when,
            "low": low,
            "high": high,
            "choices": choices,
        },
    )


@dataclasses.dataclass(frozen=True)
class NodeConfig:
    """All parameters of the node, as one immutable value. Raises ParameterError where one breaks its rule."""

    vocabulary: tuple[str, ...] = _parameter(
        NO_NAMES,
        "The names to segment by, 0 to 254; an entry may carry synonyms ('mug|cup|coffee mug'). [''] means none. "
        "Follows the last set that was accepted, also from the topics vocabulary and vocabulary_text.",
        when=ALWAYS,
    )
    background_name: str = _parameter(
        "background",
        "The name of label 0 in segmentation/label_info. An entry of this name in the vocabulary is no class: its "
        "words compete for pixels, which are 0.",
        when=ALWAYS,
    )
    negatives: tuple[str, ...] = _parameter(
        PAIR_NEGATIVES,
        "Names that compete for pixels but are given as background: ['default'] is the model pair's own list of "
        "stuff words, [''] means none.",
        when=ALWAYS,
    )
    threshold: float = _parameter(
        PAIR_VALUE,
        "A pixel whose best probability is below this is background. -1 is the model pair's own value.",
        when=ALWAYS,
        low=-1.0,
        high=1.0,
    )
    presence_threshold: float = _parameter(
        PAIR_VALUE,
        "A name whose presence in the image is below this gets no pixel. -1 is the model pair's own value.",
        when=ALWAYS,
        low=-1.0,
        high=1.0,
    )
    confidence_classes: tuple[str, ...] = _parameter(
        NO_NAMES,
        "Names whose probability at every pixel is published too, on segmentation/confidence/<name>_<id>, while they "
        "are in the vocabulary; 0 to 16. [''] means none.",
        when=ALWAYS,
    )
    enabled: bool = _parameter(
        True,
        "Segment and publish. false: only keep the newest image, for the service ~/locate; follows ~/enable too.",
        when=ALWAYS,
    )
    model: str = _parameter(
        "embedded", "The model pair: a name ('embedded', 'sd21-clipl14', ...) or a folder.", when=UNCONFIGURED
    )
    input_size: tuple[int, int] = _parameter(
        (0, 0),
        "Rows and columns that the image is resized to for the diffusion model, multiples of 64 for most. [0, 0] is "
        "the model pair's own value.",
        when=UNCONFIGURED,
        low=0,
        high=4096,
    )
    edges: str = _parameter(
        PRESET_EDGES,
        "What draws the outlines: the image's own pixels (pixels, or pamr as it was published), or the upsampled grid "
        "alone (none). pair is the model pair's own, under the preset.",
        when=UNCONFIGURED,
        choices=(PRESET_EDGES, "none", "pixels", "pamr"),
    )
    edge_steps: int = _parameter(
        -1,
        "Of edges 'pixels': how often labels are averaged over pixels alike. -1 is the model pair's own value.",
        when=UNCONFIGURED,
        low=-1,
        high=100,
    )
    edge_distances: tuple[int, ...] = _parameter(
        (0,),
        "Of edges 'pixels': how far the 8 neighbours of a pixel lie, in pixels of an image of edge_size. [0] is the "
        "model pair's own value.",
        when=UNCONFIGURED,
        low=0,
        high=1024,
    )
    edge_sigma: float = _parameter(
        PAIR_VALUE,
        "Of edges 'pixels': difference of colour (CIELAB) that parts two pixels, 0.1 to 100.0; smaller is sharper. -1 "
        "is the model pair's own value.",
        when=UNCONFIGURED,
        low=-1.0,
        high=100.0,
    )
    edge_size: int = _parameter(
        0,
        "Of edges 'pixels': longer side that the image is worked on at, in pixels. 0 is the model pair's own value.",
        when=UNCONFIGURED,
        low=0,
        high=4096,
    )
    preset: str = _parameter(
        "pair",
        "Settings of the method: those of the model pair, or as near to the paper as its text allows.",
        when=UNCONFIGURED,
        choices=("pair", "paper"),
    )
    revision: str = _parameter(
        "", "Revision of the model pair on the hub. Empty: the one the pair names.", when=UNCONFIGURED
    )
    cache_dir: str = _parameter(
        "", "Folder of downloaded models. Empty: the usual one of the hub client.", when=UNCONFIGURED
    )
    offline: bool = _parameter(
        False, "Never ask the network for a model: take what is on this machine, or fail.", when=UNCONFIGURED
    )
    device: str = _parameter(
        "auto", "Where to compute: auto (CUDA where there is one), cpu, cuda, cuda:1, ...", when=UNCONFIGURED
    )
    precision: str = _parameter(
        "auto",
        "Number format of the networks. auto: fp16 on CUDA; on the CPU fp32, or bf16 where the model pair asks for it "
        "and the processor is faster with it.",
        when=UNCONFIGURED,
        choices=("auto", "fp16", "bf16", "fp32"),
    )
    image_transport: str = _parameter(
        "raw",
        "Which topic to read: raw is image (sensor_msgs/Image), compressed is image/compressed (JPEG or PNG). Where a "
        "topic is published with the other type, it is read by the type that it has.",
        when=UNCONFIGURED,
        choices=("raw", "compressed"),
    )
    use_depth: bool = _parameter(
        False,
        "Read depth (sensor_msgs/Image, registered to the camera) and camera_info, so that ~/locate answers with a "
        "point in metres too.",
        when=UNCONFIGURED,
    )
    depth_tolerance: float = _parameter(
        0.1,
        "Seconds that a depth image and the image it is used with may lie apart at most.",
        when=ALWAYS,
        low=0.0,
        high=60.0,
    )
    max_rate: float = _parameter(
        0.0,
        "Segment at most this many images a second. 0: as many as the machine manages.",
        when=ALWAYS,
        low=0.0,
        high=1000.0,
    )
    max_image_age: float = _parameter(
        0.0,
        "Drop an image whose stamp is older than this many seconds when its turn comes. 0: however old.",
        when=ALWAYS,
        low=0.0,
        high=3600.0,
    )
    id_reuse_delay: float = _parameter(
        60.0,
        "Seconds that a class id stays unused after its name left the vocabulary, before another name may get it.",
        when=ALWAYS,
        low=0.0,
        high=86400.0,
    )
    overlay_alpha: float = _parameter(
        0.5, "Opacity of the colours in segmentation/overlay.", when=ALWAYS, low=0.0, high=1.0
    )
    warm_up: bool = _parameter(
        True,
        "Run one image through the models in configure, so that the first real one is not slow.",
        when=UNCONFIGURED,
    )
    compile: bool = _parameter(
        False,
        "Run the networks through torch.compile: frames may take less, configure takes minutes more. Where it fails "
        "the log says so and they run as they are.",
        when=UNCONFIGURED,
    )
    inference_timeout: float = _parameter(
        30.0,
        "Seconds after which an image that is still being worked on is an ERROR in the diagnostics, and ~/locate stops "
        "waiting. 0: never.",
        when=ALWAYS,
        low=0.0,
        high=3600.0,
    )
    exit_when_stuck: bool = _parameter(
        False,
        "End the process (exit code 70) where inference_timeout is exceeded, so that launch starts it again (respawn).",
        when=ALWAYS,
    )
    on_out_of_memory: str = _parameter(
        "cpu",
        "What to do where three images in a row found no memory: load the models on the CPU, or deactivate.",
        when=ALWAYS,
        choices=("cpu", "deactivate"),
    )
    autostart: bool = _parameter(True, "Configure and activate at start, without a lifecycle manager.", when=START)

    def __post_init__(self) -> None:
        for field in FIELDS.values():
            value, rule = getattr(self, field.name), field.metadata
            if rule["choices"] and value not in rule["choices"]:
                raise ParameterError(f"{field.name} is {_short(value)}; accepted: {', '.join(rule['choices'])}")
            if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
                # rclpy has looked at the range already, but takes what is nearly within it.
                low, high = rule["low"], rule["high"]
                if not math.isfinite(value) or not low <= value <= high:
                    raise ParameterError(f"{field.name} is {value}; accepted: {low} to {high}")
        for name in ("threshold", "presence_threshold"):
            value = getattr(self, name)
            if value < 0.0 and value != PAIR_VALUE:
                raise ParameterError(
                    f"{name} is {value}; accepted: 0.0 to 1.0, or {PAIR_VALUE} for the model pair's own"
                )
        if self.edge_sigma != PAIR_VALUE and self.edge_sigma < 0.1:
            raise ParameterError(
                f"edge_sigma is {self.edge_sigma}; accepted: 0.1 to 100.0, or {PAIR_VALUE} for the model pair's own"
            )
        farthest = FIELDS["edge_distances"].metadata["high"]
        if self.edge_distances != (0,) and not (
            self.edge_distances and all(1 <= distance <= farthest for distance in self.edge_distances)
        ):
            raise ParameterError(
                f"edge_distances is {list(self.edge_distances)[:8]}; accepted: whole numbers of pixels, 1 to "
                f"{farthest}, or [0] for the model pair's own"
            )
        sides, (low, high) = self.input_size, (1, FIELDS["input_size"].metadata["high"])
        if len(sides) != 2 or (sides != (0, 0) and not all(low <= side <= high for side in sides)):
            raise ParameterError(
                f"input_size is {list(sides)[:4]}; accepted: two numbers, rows and columns, {low} to {high}, or [0, 0]"
            )
        name = self.background_name
        if not name.strip() or len(name) > 128 or any(unicodedata.category(letter) == "Cc" for letter in name):
            raise ParameterError(
                f"background_name is {_short(name)}; accepted: 1 to 128 characters, no control characters"
            )
        classes = _names(self.confidence_classes)
        if len(classes) > MAX_CONFIDENCE_CLASSES:
            raise ParameterError(
                f"confidence_classes has {len(classes)} names; accepted: at most {MAX_CONFIDENCE_CLASSES}. The topic "
                "~/dense has the maps of all names"
            )
        try:
            Vocabulary(classes)
        except ValueError as error:
            raise ParameterError(f"confidence_classes: {error}; [''] alone means none") from error
        for name in ("model", "cache_dir", "revision"):
            value = getattr(self, name)
            if len(value) > MAX_PATH or not value.isprintable():
                raise ParameterError(f"{name} is {_short(value)}; accepted: at most {MAX_PATH} printable characters")
        if not self.model.strip():
            raise ParameterError("model is empty; accepted: the name of a model pair, or its folder")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise ParameterError(f"device is {_short(self.device)}; accepted: auto, cpu, cuda, cuda:<number>")

    def make_vocabulary(self) -> Vocabulary:
        """The vocabulary that ``vocabulary``, ``negatives`` and ``background_name`` describe.

        Raises nerve_core.VocabularyError (a ValueError) with the reason where they describe none.
        """
        negatives = None if self.negatives == PAIR_NEGATIVES else _names(self.negatives)
        return Vocabulary(_names(self.vocabulary), negatives=negatives, background_name=self.background_name)

    def dense_names(self) -> frozenset[str]:
        """The names of ``confidence_classes`` as they are compared: in NFC and without case."""
        return frozenset(
            unicodedata.normalize("NFC", name.strip()).casefold() for name in _names(self.confidence_classes)
        )

    def load_settings(self) -> dict[str, object]:
        """The settings of the method that override the model pair's own as it is loaded."""
        given: dict[str, object] = {
            "input_size": self.input_size,
            "edges": self.edges,
            "edge_steps": self.edge_steps,
            "edge_distances": self.edge_distances,
            "edge_sigma": self.edge_sigma,
            "edge_size": self.edge_size,
        }
        return {name: value for name, value in given.items() if value != FIELDS[name].default}

    def frame_settings(self) -> dict[str, object]:
        """Those that may change between two images."""
        chosen = {"threshold": self.threshold, "presence_threshold": self.presence_threshold}
        return {name: value for name, value in chosen.items() if value != PAIR_VALUE}


FIELDS: Mapping[str, dataclasses.Field] = {field.name: field for field in dataclasses.fields(NodeConfig)}
"""The parameters by name; a field's metadata holds its rules."""

VOCABULARY_FIELDS = ("vocabulary", "negatives", "background_name")
"""The parameters that together make the vocabulary: a change of one is a new vocabulary."""


def vocabulary_differs(one: NodeConfig, other: NodeConfig) -> bool:
    """Whether these ask for different vocabularies."""
    return any(getattr(one, name) != getattr(other, name) for name in VOCABULARY_FIELDS)


def _names(values: tuple[str, ...]) -> tuple[str, ...]:
    return () if values == NO_NAMES else values


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _ros_type(default: object) -> Parameter.Type:
    if isinstance(default, bool):
        return Parameter.Type.BOOL
    if isinstance(default, float):
        return Parameter.Type.DOUBLE
    if isinstance(default, int):
        return Parameter.Type.INTEGER
    if isinstance(default, str):
        return Parameter.Type.STRING
    whole = isinstance(default, tuple) and bool(default) and all(isinstance(value, int) for value in default)
    return Parameter.Type.INTEGER_ARRAY if whole else Parameter.Type.STRING_ARRAY


def descriptor(field: dataclasses.Field) -> ParameterDescriptor:
    """The ROS descriptor of a field of NodeConfig: type, text, range, choices, read-only flag."""
    rule = field.metadata
    kind = _ros_type(field.default)
    made = ParameterDescriptor(
        name=field.name,
        type=kind.value,
        description=f"{rule['description']} {_WHEN_TEXT[rule['when']]}",
        read_only=rule["when"] == START,
    )
    if rule["choices"]:
        made.additional_constraints = "One of: " + ", ".join(rule["choices"])
    if kind is Parameter.Type.DOUBLE:
        made.floating_point_range = [FloatingPointRange(from_value=rule["low"], to_value=rule["high"])]
    if kind in (Parameter.Type.INTEGER, Parameter.Type.INTEGER_ARRAY):
        made.integer_range = [IntegerRange(from_value=rule["low"], to_value=rule["high"], step=1)]
    return made


def to_parameter(name: str, value: object) -> Parameter:
    """A ROS parameter from a value as NodeConfig holds it."""
    return Parameter(name, _ros_type(value), list(value) if isinstance(value, tuple) else value)


def declare(node: Node) -> NodeConfig:
    """Declare every parameter on `node` and return the values it was started with.

    Raises ParameterError, naming the parameter, where an override has the wrong type or breaks a rule.
    """
    values = {}
    for field in FIELDS.values():
        default = to_parameter(field.name, field.default)
        try:
            declared = node.declare_parameter(field.name, default.value, descriptor(field))
        except InvalidParameterTypeException as error:
            raise ParameterError(
                f"{field.name} has the wrong type ({error}); write lists of names as ['ball', 'ladder'] and whole "
                "numbers with a point (5.0) where a number is meant"
            ) from error
        except InvalidParameterValueException as error:
            raise ParameterError(str(error)) from error
        values[field.name] = declared.value
    return from_ros(values)


def from_ros(values: Mapping[str, Any]) -> NodeConfig:
    """The parameters of these values, as rclpy gives them, by name. Raises ParameterError where one breaks a rule."""
    return NodeConfig(**{name: _from_ros(value) for name, value in values.items()})


def unknown_overrides(names: Iterable[str]) -> list[str]:
    """One sentence for each name in `names` (the overrides the node was started with) that is no parameter."""
    sentences = []
    for name in names:
        if name in FIELDS or name in _RCLPY or "." in name:  # qos_overrides.* and the like have points
            continue
        close = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(FIELDS)}"
        sentences.append(f"parameter '{name[:60]}' is unknown and has no effect; {hint}")
    return sentences


def changed(current: NodeConfig, parameters: Iterable[Parameter], *, configured: bool) -> NodeConfig:
    """`current` with `parameters` set; names that are not fields of NodeConfig are left alone.

    `configured`: whether the node is past configure, where what configure reads is fixed.
    Raises ParameterError where a value breaks its rule or may not be set now.
    """
    values: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.name not in FIELDS:
            continue
        value = _from_ros(parameter.value)
        if value == getattr(current, parameter.name):
            continue
        if configured and FIELDS[parameter.name].metadata["when"] == UNCONFIGURED:
            raise ParameterError(
                f"{parameter.name} is read by configure and the node is configured; deactivate and clean up first, "
                "then set it and configure again"
            )
        values[parameter.name] = value
    return dataclasses.replace(current, **values)


def _from_ros(value: Any) -> Any:
    # Not `isinstance(value, list)`: rclpy 7.1 gives arrays back as it got them, lists, tuples or array.array.
    return value if isinstance(value, str | bool | int | float) else tuple(value)
