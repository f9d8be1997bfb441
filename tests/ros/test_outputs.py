"""What is published of an image, and when: ids for labels, LabelInfo on change, the overlay on demand."""

import math

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from std_msgs.msg import Header

from nerve_core import ClassConfidence, Segmentation
from nerve_ros.labels import Labels
from nerve_ros.outputs import Outputs, with_ids

LABELS = Labels(("ball", "ladder"), (7, 3))
HEADER = Header(frame_id="camera")


class Publisher:
    def __init__(self):
        self.sent = []
        self.is_activated = True
        self.watchers = 0

    def publish(self, message):
        self.sent.append(message)

    def get_subscription_count(self):
        return self.watchers


class Node:
    """Hands out publishers by topic, and notes those given back."""

    def __init__(self):
        self.publishers = {}
        self.destroyed = []

    def create_lifecycle_publisher(self, kind, topic, qos):
        self.publishers[topic.removeprefix("segmentation/")] = Publisher()
        return self.publishers[topic.removeprefix("segmentation/")]

    def destroy_lifecycle_publisher(self, publisher):
        self.destroyed.append(publisher)


@pytest.fixture
def node():
    return Node()


@pytest.fixture
def outputs(node):
    return Outputs(node)


def segmentation():
    labels = np.array([[0, 1, 1], [2, 255, 0]], np.uint8)
    seen = (
        ClassConfidence("ball", 1, 0.9, 0.8, 0.95, 2, (1, 0, 2, 1), (1.5, 0.0)),
        ClassConfidence("ladder", 2, 0.5, 0.6, 0.7, 1, (0, 1, 1, 1), (0.0, 1.0)),
    )
    return Segmentation(labels, np.full((2, 3), 200, np.uint8), ("ball", "ladder"), seen, {})


def test_masks_hold_class_ids_and_unlabelled_pixels_have_no_confidence():
    masks = with_ids(segmentation(), LABELS, LABELS.id_table())
    assert masks.mask.tolist() == [[0, 7, 7], [3, 255, 0]]
    assert masks.confidence.tolist() == [[200, 200, 200], [200, 0, 200]]
    assert [(seen.name, seen.id, seen.area) for seen in masks.classes] == [("ball", 7, 2), ("ladder", 3, 1)]
    ball = masks.classes[0]
    assert (ball.box.x_offset, ball.box.y_offset, ball.box.width, ball.box.height) == (1, 0, 2, 1)
    assert (ball.centroid_x, ball.centroid_y) == (1.5, 0.0)
    assert ball.presence == pytest.approx(0.9)
    assert ball.mean_probability == pytest.approx(0.8)
    assert ball.peak_probability == pytest.approx(0.95)


def test_a_name_without_pixels_has_no_box_and_no_centroid():
    nothing = ClassConfidence("ball", 1, 0.1, 0.0, 0.2, 0, None, None)
    labels = np.zeros((2, 2), np.uint8)
    seen = Segmentation(labels, labels, ("ball",), (nothing,), {})
    (message,) = with_ids(seen, Labels(("ball",), (9,)), Labels(("ball",), (9,)).id_table()).classes
    assert (message.area, message.box.width, message.box.height) == (0, 0, 0)
    assert math.isnan(message.centroid_x)
    assert math.isnan(message.centroid_y)


def test_label_info_is_sent_on_change_only(node, outputs):
    sent = node.publishers["label_info"].sent
    for labels, background, threshold, count in (
        (LABELS, "background", 0.0, 1),
        (LABELS, "background", 0.0, 1),
        (Labels(("ladder", "ball"), (3, 7)), "background", 0.0, 1),
        (LABELS, "rest", 0.0, 2),
        (LABELS, "rest", 0.5, 3),
        (Labels(("ball",), (7,)), "rest", 0.5, 4),
    ):
        assert outputs.label_info(labels, background, threshold, Time(sec=count))
        assert len(sent) == count


def test_a_label_info_that_is_known_already_is_in_force_and_one_never_sent_is_not(node, outputs):
    """The rest of an id begins when its name leaves, by whichever request it was last in use."""
    publisher = node.publishers["label_info"]
    publisher.is_activated = False
    assert not outputs.label_info(LABELS, "background", 0.0, Time())
    publisher.is_activated = True
    assert outputs.label_info(LABELS, "background", 0.0, Time())
    assert outputs.label_info(LABELS, "background", 0.0, Time())
    assert len(publisher.sent) == 1


def test_every_message_of_an_image_carries_its_header(node, outputs):
    outputs.image(HEADER, segmentation(), LABELS, LABELS.id_table(), np.zeros((2, 3, 3), np.uint8), 0.5)
    for topic in ("mask", "confidence", "class_confidence"):
        (message,) = node.publishers[topic].sent
        assert message.header == HEADER
    assert not node.publishers["overlay"].sent


def test_the_overlay_is_drawn_while_somebody_watches_in_colours_that_follow_the_ids(node, outputs):
    node.publishers["overlay"].watchers = 1
    image = np.full((40, 60, 3), 100, np.uint8)
    labels = np.zeros((40, 60), np.uint8)
    labels[20:, :30], labels[20:, 30:] = 1, 2
    seen = Segmentation(labels, labels, ("ball", "ladder"), segmentation().class_confidence, {})
    swapped = Segmentation(
        np.array([0, 2, 1], np.uint8)[labels], labels, ("ladder", "ball"), segmentation().class_confidence[::-1], {}
    )
    for given, of in ((seen, LABELS), (swapped, Labels(("ladder", "ball"), (3, 7)))):
        outputs.image(HEADER, given, of, of.id_table(), image, 1.0)
    one, other = node.publishers["overlay"].sent
    assert (one.width, one.height, one.step, one.encoding) == (60, 40, 180, "rgb8")
    assert one.header == HEADER
    assert one.data == other.data
    assert bytes(one.data) != image.tobytes()


def test_every_publisher_is_given_back(node, outputs):
    outputs.destroy()
    assert {id(publisher) for publisher in node.destroyed} == {id(made) for made in node.publishers.values()}
