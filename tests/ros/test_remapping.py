"""Which topic the node takes images from, by ROS's remapping rules, and that it reports the one that it takes."""

from __future__ import annotations

import pytest

import harness


@pytest.mark.parametrize(
    ("transport", "rules", "topic"),
    [
        ("raw", ("image:=/camera/color",), "/camera/color"),
        ("compressed", (), "/image/compressed"),
        ("compressed", ("image:=/camera/color",), "/camera/color/compressed"),
        ("compressed", ("image/compressed:=/camera/jpeg",), "/camera/jpeg"),
        ("compressed", ("image:=/camera/color", "image/compressed:=/camera/jpeg"), "/camera/jpeg"),
        ("compressed", ("__ns:=/front", "image:=color"), "/front/color/compressed"),
        # The topic of compressed images itself, which everybody copies from `ros2 topic list`.
        ("raw", ("image:=/camera/color/compressed",), "/camera/color/compressed"),
        ("compressed", ("image:=/camera/jpeg/compressed",), "/camera/jpeg/compressed"),
        # ROS applies one rule to a name, once.
        ("raw", ("image:=/first", "/first:=/second"), "/first"),
    ],
)
def test_images_are_taken_from_where_the_rules_say(environment, transport, rules, topic):
    arguments = [word for rule in rules for word in ("-r", rule)]
    node = harness.Node(environment, arguments=arguments, image_transport=transport, vocabulary=["ball"])
    try:
        node.wait_log(f"waiting for images on {topic}", harness.LOADING)
        node.wait_active()
    finally:
        node.end()
    assert f"waiting for images on {topic}" in [line.rpartition("]: ")[2] for line in node.lines]
