"""Every parameter: its descriptor, and its rejection with a reason, over the service that `ros2 param` uses."""

import math
from pathlib import Path

import pytest
import rclpy
import yaml
from ament_index_python.packages import get_package_share_directory
from rclpy.parameter import Parameter

from nerve_core.settings import Settings
from nerve_ros.parameters import (
    ALWAYS,
    FIELDS,
    START,
    NodeConfig,
    ParameterError,
    declare,
    descriptor,
    unknown_overrides,
)

PICTURE = {"width": 96, "height": 64}

REJECTED = [
    ("vocabulary", ["mug", "mu\x07g"], "control"),
    ("vocabulary", "mug", "type"),
    ("vocabulary", [f"n {number}" for number in range(255)], "254"),
    ("background_name", "", "1 to 128 characters"),
    ("background_name", "x" * 129, "1 to 128 characters"),
    ("background_name", "a\nb", "control"),
    ("negatives", ["wall", ""], "empty"),
    ("negatives", 3, "type"),
    ("threshold", -0.5, "0.0 to 1.0"),
    ("threshold", 1.01, "range"),
    ("threshold", math.nan, "range"),
    ("threshold", math.inf, "range"),
    ("threshold", 1, "type"),
    ("presence_threshold", -0.5, "0.0 to 1.0"),
    ("presence_threshold", 7.0, "range"),
    ("confidence_classes", [f"n {number}" for number in range(17)], "at most 16"),
    ("confidence_classes", ["mug", ""], "empty name"),
    ("confidence_classes", ["mu\x1bg"], "control"),
    ("enabled", 1, "type"),
    ("use_depth", "yes", "type"),
    ("depth_tolerance", -0.1, "range"),
    ("inference_timeout", -1.0, "range"),
    ("inference_timeout", math.nan, "range"),
    ("exit_when_stuck", 1, "type"),
    ("on_out_of_memory", "reboot", "accepted: cpu, deactivate"),
    ("model", "", "name of a model pair"),
    ("model", "   ", "name of a model pair"),
    ("input_size", [512], "rows and columns"),
    ("input_size", [0, 64], "rows and columns"),
    ("input_size", [64, 5000], "rows and columns"),
    ("input_size", 512, "type"),
    ("edges", "crf", "accepted: pair, none, pixels, pamr"),
    ("edge_steps", -2, "range"),
    ("edge_steps", 2.0, "type"),
    ("edge_distances", [0, 4], "1 to 1024"),
    ("edge_distances", [4, 2000], "1 to 1024"),
    ("edge_sigma", 0.0, "0.1 to 100.0"),
    ("edge_sigma", 101.0, "range"),
    ("edge_size", -1, "range"),
    ("edge_size", [320], "type"),
    ("preset", "mine", "accepted: pair, paper"),
    ("revision", 3, "type"),
    ("cache_dir", 3, "type"),
    ("offline", "yes", "type"),
    ("device", "tpu", "accepted: auto, cpu, cuda"),
    ("device", "cuda:", "accepted: auto, cpu, cuda"),
    ("precision", "fp8", "accepted: auto, fp16, bf16, fp32"),
    ("image_transport", "theora", "accepted: raw, compressed"),
    ("max_rate", -1.0, "range"),
    ("max_rate", 5, "type"),
    ("max_rate", math.nan, "range"),
    ("max_image_age", -1.0, "range"),
    ("max_image_age", math.inf, "range"),
    ("id_reuse_delay", -1.0, "range"),
    ("id_reuse_delay", 1e9, "range"),
    ("overlay_alpha", 1.5, "range"),
    ("overlay_alpha", math.nan, "range"),
    ("warm_up", 1, "type"),
    ("compile", "yes", "type"),
    ("autostart", True, "read-only"),
    ("no_such_parameter", 1, "undeclared"),
]
ACCEPTED = [
    ("vocabulary", ["mug|cup", "стул"]),
    ("vocabulary", [""]),
    ("background_name", "rest"),
    ("negatives", ["wall"]),
    ("negatives", [""]),
    ("threshold", 0.0),
    ("threshold", 1.0),
    ("presence_threshold", 0.5),
    ("confidence_classes", ["mug", "стул"]),
    ("confidence_classes", [""]),
    ("enabled", False),
    ("use_depth", True),
    ("depth_tolerance", 0.5),
    ("inference_timeout", 0.0),
    ("exit_when_stuck", True),
    ("on_out_of_memory", "deactivate"),
    ("input_size", [128, 256]),
    ("edges", "none"),
    ("edge_steps", 0),
    ("edge_distances", [2, 6, 18]),
    ("edge_sigma", 6.5),
    ("edge_size", 240),
    ("preset", "paper"),
    ("device", "cuda:1"),
    ("precision", "bf16"),
    ("image_transport", "compressed"),
    ("max_rate", 30.0),
    ("max_image_age", 0.5),
    ("id_reuse_delay", 0.0),
    ("overlay_alpha", 1.0),
    ("warm_up", False),
    ("compile", True),
    ("offline", True),
    ("model", "/some/folder"),
    ("revision", "main"),
    ("cache_dir", "/tmp"),
]


@pytest.fixture(scope="module")
def rig(new_rig):
    rig = new_rig(autostart=False)
    rig.node.wait_log("vocabulary is empty", 180.0)
    return rig


@pytest.fixture(scope="module")
def context(environment):
    """A ROS context of this process, in the module's domain."""
    made = rclpy.Context()
    rclpy.init(context=made, domain_id=int(environment["ROS_DOMAIN_ID"]))
    yield made
    rclpy.shutdown(context=made)


def test_every_parameter_has_a_rejection_and_an_acceptance_here():
    assert {name for name, *_ in REJECTED} - {"no_such_parameter"} == set(FIELDS)
    assert {name for name, _ in ACCEPTED} == set(FIELDS) - {"autostart"}


@pytest.mark.parametrize(("name", "value", "reason"), REJECTED)
def test_a_value_that_breaks_a_rule_is_rejected_with_the_reason_and_the_old_one_stays(rig, name, value, reason):
    old = rig.talker.do("get_parameter", name=name)["value"] if name in FIELDS else None
    answer = rig.talker.do("set_parameter", name=name, value=value)
    assert not answer["successful"]
    assert reason in answer["reason"].lower() or reason in answer["reason"]
    if name in FIELDS:
        assert rig.talker.do("get_parameter", name=name)["value"] == old


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_a_value_within_the_rules_is_accepted_and_read_back(rig, name, value):
    old = rig.talker.do("get_parameter", name=name)["value"]
    answer = rig.talker.do("set_parameter", name=name, value=value)
    assert answer["successful"], answer["reason"]
    assert rig.talker.do("get_parameter", name=name)["value"] == value
    assert rig.talker.do("set_parameter", name=name, value=old)["successful"]


def test_an_empty_list_is_an_empty_vocabulary(rig):
    assert rig.talker.do("set_parameter", name="vocabulary", value=[], kind="STRING_ARRAY")["successful"]
    assert rig.talker.do("get_parameter", name="vocabulary")["value"] == []


def test_every_parameter_is_described(rig):
    described = rig.talker.do("describe_parameters")["parameters"]
    for name, field in FIELDS.items():
        found = described[name]
        assert len(found["description"]) > 20
        assert found["read_only"] == (field.metadata["when"] == START)
        assert found["type"] == descriptor(field).type
        if isinstance(field.default, float):
            assert found["ranges"] == [[field.metadata["low"], field.metadata["high"]]]
        for choice in field.metadata["choices"]:
            assert choice in found["constraints"]


def test_a_request_that_rclpy_stumbles_over_does_not_bring_the_node_down(rig):
    rig.talker.do("set_broken_parameter", name="vocabulary", type_number=99)
    assert rig.talker.do("set_parameter", name="overlay_alpha", value=0.25)["successful"]
    assert rig.node.running


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (Parameter("threshold", value=1.5), "threshold"),
        (Parameter("threshold", value=math.nan), "threshold"),
        (Parameter("precision", value="fp8"), "accepted: auto, fp16, bf16, fp32"),
        (Parameter("vocabulary", value="ball, ladder"), "vocabulary has the wrong type"),
        (Parameter("max_rate", value=5), "max_rate has the wrong type"),
        (Parameter("input_size", value=[1, 2, 3]), "rows and columns"),
    ],
)
def test_an_override_that_breaks_a_rule_is_refused_at_start_with_the_reason(context, override, reason):
    node = rclpy.create_node("bare", context=context, parameter_overrides=[override])
    try:
        with pytest.raises(ParameterError, match=reason):
            declare(node)
    finally:
        node.destroy_node()


def test_overrides_are_read_at_start(context):
    given = {"vocabulary": ["mug|cup", "стул"], "threshold": 0.25, "input_size": [64, 128], "autostart": False}
    overrides = [Parameter(name, value=value) for name, value in given.items()]
    node = rclpy.create_node("bare", context=context, parameter_overrides=overrides)
    config = declare(node)
    node.destroy_node()
    assert config == NodeConfig(vocabulary=("mug|cup", "стул"), threshold=0.25, input_size=(64, 128), autostart=False)


def test_no_list_has_an_empty_default():
    assert all(field.default for field in FIELDS.values() if isinstance(field.default, tuple))


def test_the_defaults_are_within_the_rules():
    assert NodeConfig().vocabulary == ("",)
    assert NodeConfig().make_vocabulary().names == ()
    assert NodeConfig().frame_settings() == NodeConfig().load_settings() == {}
    assert NodeConfig(threshold=0.0).frame_settings() == {"threshold": 0.0}
    assert NodeConfig(input_size=(64, 128)).load_settings() == {"input_size": (64, 128)}
    assert NodeConfig().load_settings() == {}
    chosen = {"edges": "pixels", "edge_steps": 0, "edge_distances": (4,), "edge_sigma": 2.0, "edge_size": 200}
    assert NodeConfig(**chosen).load_settings() == chosen
    assert Settings().replaced(chosen).flat().items() >= chosen.items()


def test_negatives_mean_the_pairs_own_none_or_those_given():
    assert NodeConfig().make_vocabulary().negatives is None
    assert NodeConfig(negatives=("",)).make_vocabulary().negatives == ()
    assert NodeConfig(negatives=("wall",)).make_vocabulary().negatives == ("wall",)


def test_what_is_dynamic_is_what_can_change_between_two_images():
    always = {name for name, field in FIELDS.items() if field.metadata["when"] == ALWAYS}
    assert always == {
        "vocabulary",
        "background_name",
        "negatives",
        "threshold",
        "presence_threshold",
        "max_rate",
        "max_image_age",
        "id_reuse_delay",
        "overlay_alpha",
        "confidence_classes",
        "enabled",
        "depth_tolerance",
        "inference_timeout",
        "exit_when_stuck",
        "on_out_of_memory",
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_numbers_out_of_range_make_no_config(value):
    with pytest.raises(ParameterError, match="overlay_alpha"):
        NodeConfig(overlay_alpha=value)


def test_unknown_names_are_told_with_the_nearest_known_one():
    assert unknown_overrides(["model", "qos_overrides./image.subscription.depth"]) == []
    assert unknown_overrides(["use_sim_time", "start_type_description_service"]) == []
    (sentence,) = unknown_overrides(["vocabluary"])
    assert "did you mean 'vocabulary'" in sentence


def test_the_parameter_file_names_every_parameter_with_its_default_and_nothing_else():
    path = Path(get_package_share_directory("nerve_ros")) / "config" / "nerve.yaml"
    (rules,) = yaml.safe_load(path.read_text()).values()
    given = rules["ros__parameters"]
    defaults = {
        name: list(field.default) if isinstance(field.default, tuple) else field.default
        for name, field in FIELDS.items()
    }
    assert given == defaults
    assert all(type(given[name]) is type(default) for name, default in defaults.items())
