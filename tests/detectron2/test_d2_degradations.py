"""The augmentation: the same pictures as everywhere else in the project, boxes untouched."""

import numpy as np
import pytest
from detectron2.data.transforms import AugInput, AugmentationList, NoOpTransform

from quac_plugins.degradations import corrupt
from quac_plugins.detectron2 import CorruptImage


@pytest.fixture
def bgr(inputs):
    return np.ascontiguousarray(inputs()[0]["image"].permute(1, 2, 0).numpy())


def test_the_corruption_is_the_projects_own_in_either_order(bgr):
    rgb = np.ascontiguousarray(bgr[..., ::-1])
    expected = corrupt(rgb, "contrast", 4)
    made = CorruptImage("contrast", 4).get_transform(bgr).apply_image(bgr)
    assert np.array_equal(made[..., ::-1], expected)
    made = CorruptImage("contrast", 4, channel_order="RGB").get_transform(rgb).apply_image(rgb)
    assert np.array_equal(made, expected)


def test_with_a_seed_it_depends_on_the_image_alone(bgr):
    made = [CorruptImage("all", seed=0).get_transform(bgr).apply_image(bgr) for _ in range(2)]
    assert np.array_equal(*made)
    others = [CorruptImage("all", seed=s).get_transform(bgr).apply_image(bgr) for s in range(1, 5)]
    assert any(not np.array_equal(made[0], other) for other in others)


def test_boxes_stay_and_prob_is_the_share(bgr):
    boxes = np.array([[1.0, 2, 30, 40]])
    given = AugInput(bgr.copy(), boxes=boxes.copy())
    AugmentationList([CorruptImage("fog", 5)])(given)
    assert np.array_equal(given.boxes, boxes)
    assert not np.array_equal(given.image, bgr)
    np.random.seed(0)
    never = [isinstance(CorruptImage("fog", 5, prob=0.5).get_transform(bgr), NoOpTransform) for _ in range(200)]
    assert 60 < sum(never) < 140


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruptions": "fogg"}, "fogg"),
        ({"severities": 6}, "6"),
        ({"prob": 2}, "prob must lie"),
        ({"prob": "x"}, "prob must lie between 0 and 1, got 'x'"),
        ({"channel_order": "YUV"}, "channel_order must be"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        CorruptImage(**options)


def test_images_of_another_type_are_refused(bgr):
    with pytest.raises(ValueError, match="uint8 images"):
        CorruptImage().get_transform(bgr.astype(np.float32))
