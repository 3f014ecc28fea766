"""q is of the image as it was before padding, in RGB, whatever else is in the batch."""

import warnings

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import ImageList

import quac_plugins as quac
from quac_plugins.core.quality.padding import let_lists_note_sizes, note_sizes, sizes_of


def q_of(model):
    """The q that the model's backbone used last."""
    record = quac.injection_of(model.backbone)
    return model.backbone.get_submodule(record.tap).quac_tap.context._local.forward.q


def expected(inputs):
    return torch.cat([quac.brisque(one["image"][None].flip(1).float() / 255) for one in inputs])


CONFIGS = ["faster_rcnn_R_50_FPN_qacon", "retinanet_R_50_FPN_qacon", "semantic_R_50_FPN_qacon"]


@pytest.mark.parametrize("std", [[1.0, 1.0, 1.0], [57.375, 57.12, 58.395]])
@pytest.mark.parametrize("name", CONFIGS)
def test_q_is_of_each_image_alone(name, std, config, build, inputs):
    model, images = build(config(name, {"MODEL.PIXEL_STD": std})), inputs()
    with torch.no_grad():
        model(images)
        together = q_of(model)
        assert torch.allclose(together, expected(images), rtol=2e-3, atol=2e-3)
        for index, one in enumerate(images):
            model([one])
            assert torch.allclose(q_of(model), together[index : index + 1], rtol=1e-4, atol=1e-5)


def test_padding_changes_no_feature(config, build, inputs, moved):
    """Moved activations: the features of an image are the same alone and beside a larger one."""
    model, images = moved(build(config(CONFIGS[0]))), inputs(((96, 128), (256, 256)))
    images[0]["image"] = images[0]["image"].clone()
    with torch.no_grad():
        alone = model.backbone(model.preprocess_image(images[:1]).tensor)
        padded = ImageList.from_tensors([model.preprocess_image(images[:1]).tensor[0]], 256)
        padded.image_sizes = [(96, 128)]
        note_sizes(padded.tensor, padded.image_sizes)
        model.backbone(padded.tensor)
        assert torch.allclose(q_of(model), expected(images[:1]), rtol=2e-3, atol=2e-3)
        other = model.backbone(padded.tensor.clone())  # nobody knows of the padding any more
        assert not torch.allclose(q_of(model), expected(images[:1]), rtol=2e-3, atol=2e-3)
        assert alone["p2"].shape != other["p2"].shape


def test_rgb_models_and_grey_ones(config, build, inputs):
    images = inputs()
    for one in images:
        one["image"] = one["image"].flip(0)
    model = build(config(CONFIGS[0], {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53]}))
    with torch.no_grad():
        model(images)
    wanted = torch.cat([quac.brisque(one["image"][None].float() / 255) for one in images])
    assert torch.allclose(q_of(model), wanted, rtol=2e-3, atol=2e-3)
    grey = {"INPUT.FORMAT": "L", "MODEL.PIXEL_MEAN": [116.28], "MODEL.PIXEL_STD": [57.0]}
    model = build(config(CONFIGS[0], grey))
    for one in images:
        one["image"] = one["image"][:1]
    with torch.no_grad():
        model(images)
    wanted = torch.cat([quac.brisque(one["image"][None].float().expand(-1, 3, -1, -1) / 255) for one in images])
    assert torch.allclose(q_of(model), wanted, rtol=2e-3, atol=2e-3)


def test_test_time_augmentation(config, build, inputs):
    cfg = config("mask_rcnn_R_50_FPN_heads_qacon", {"TEST.AUG.MIN_SIZES": (80, 112), "TEST.AUG.MAX_SIZE": 160})
    model, seen = build(cfg), []
    tap = model.backbone.get_submodule(quac.injection_of(model.backbone).tap).quac_tap
    begin = tap.context.begin

    def watched(q, images=None):
        seen.append((q, images, sizes_of(images)))
        begin(q, images)

    tap.context.begin = watched
    with torch.no_grad():
        found = GeneralizedRCNNWithTTA(cfg, model, batch_size=4)([{**inputs()[0], "file_name": ""}])
    assert len(found[0]["instances"]) > 0
    assert any(sizes is not None for _, _, sizes in seen)  # scales of several sizes in one batch
    for q, images, sizes in seen:
        for index, (height, width) in enumerate(sizes or [tuple(images.shape[-2:])] * len(images)):
            alone = tap.quality(tap.to_rgb(images[index : index + 1, :, :height, :width]))
            assert torch.allclose(q[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_trace_of_a_whole_detector_is_warned_of(config, build, inputs):
    """Sizes are no numbers there, so q is of the padded tensor."""
    images = [{"image": inputs()[0]["image"]}]
    for enabled in (True, False):
        adapter = TracingAdapter(build(config("semantic_R_50_FPN_qacon", {"MODEL.QUAC.ENABLED": enabled})), (images,))
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        ours = [str(one.message) for one in caught if "are of the padded tensor" in str(one.message)]
        assert len(ours) == enabled
    backbone = build(config(CONFIGS[0])).backbone
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():  # images alone, without a list that pads them
            torch.jit.trace(backbone, torch.rand(1, 3, 64, 64), strict=False, check_trace=False)
        assert not [one for one in caught if "padded tensor" in str(one.message)]


def test_an_image_list_is_what_it_was(inputs):
    tensors = [one["image"].float() for one in inputs()]
    images = ImageList.from_tensors(tensors, 32)
    assert images.tensor.shape == (2, 3, 128, 128)
    assert sizes_of(images.tensor) == [(96, 128), (120, 100)]
    assert sizes_of(images.to("cpu").tensor) == [(96, 128), (120, 100)]
    assert torch.equal(images[1], tensors[1])
    ImageList(torch.rand(2, 30, 40), [(32, 32), (30, 40)])  # as the RPN's own tests make it
    before = ImageList.__init__
    let_lists_note_sizes(ImageList)
    assert ImageList.__init__ is before  # once


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(4, 4)], "1 sizes for a tensor of 2 images"),
        ([(4, 4), (9, 4)], "does not lie"),
        ([(4, 4), (0, 4)], "does not"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        note_sizes(torch.zeros(2, 3, 8, 8), sizes)
