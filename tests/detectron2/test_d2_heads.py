"""ROI heads: each proposal takes the q of its image, or it is refused; never another image's."""

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import quac_plugins as quac
from quac_plugins.detectron2 import inject_heads

HEADS = {"MODEL.META_ARCHITECTURE": "QuACGeneralizedRCNN", "MODEL.QUAC.HEADS": "all"}
C4 = {
    **HEADS,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.MASK_ON": True,
}
KINDS = {
    "fpn": ("mask_rcnn_R_50_FPN_heads_qacon", {}),
    "fpn with convolutions": ("mask_rcnn_R_50_FPN_heads_qacon", {
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 2, "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    }),
    "cascade": ("mask_rcnn_R_50_FPN_heads_qacon", {
        "MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    }),
    "c4": ("faster_rcnn_R_50_C4_qacon", C4),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def model(request, config, build, moved):
    name, changes = KINDS[request.param]
    return moved(build(config(name, changes)))


def given(model, images, boxes):
    """What the heads say of these boxes, whatever the proposals are."""
    instances = []
    for one, found in zip(images, boxes, strict=True):
        made = Instances(tuple(one["image"].shape[-2:]))
        made.proposal_boxes, made.objectness_logits = Boxes(found), torch.ones(len(found))
        instances.append(made)
    padded = model.preprocess_image(images)
    with torch.no_grad():
        features = model.backbone(padded.tensor)
        heads = model.roi_heads
        maps = [features[name] for name in heads.in_features] if hasattr(heads, "in_features") else None
        maps = maps or [features[name] for name in heads.box_in_features]
        if hasattr(heads, "res5"):
            return heads._shared_roi_transform(maps, [i.proposal_boxes for i in instances])
        head = heads.box_head[0] if isinstance(heads.box_head, torch.nn.ModuleList) else heads.box_head
        return head(heads.box_pooler(maps, [i.proposal_boxes for i in instances]))


def close(found, expected):
    """Up to rounding of the largest: without trained weights features grow from block to block."""
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())


def test_each_proposal_has_its_images_quality(model, inputs):
    """Two images of one size: what is said of a proposal is the same whether its image is alone or beside another."""
    images = inputs(((96, 128), (96, 128)))
    first = torch.tensor([[5.0, 5, 60, 60], [20, 10, 90, 80], [0, 0, 128, 96]])
    second = torch.tensor([[15.0, 25, 70, 90]])
    together = given(model, images, [first, second])
    alone = torch.cat([given(model, images[:1], [first]), given(model, images[1:], [second])])
    assert close(together, alone)
    swapped = given(model, images[::-1], [second, first])
    assert close(swapped, alone[[3, 0, 1, 2]])
    record = quac.injection_of(model.backbone)
    context = model.backbone.get_submodule(record.tap).quac_tap.context
    with quac.use_q(model.backbone, context._local.forward.q.flip(0)):  # the other image's quality: other numbers
        assert not close(given(model, images[::-1], [second, first]), swapped)


def test_an_image_without_proposals(model, inputs):
    images = inputs(((96, 128), (96, 128)))
    boxes = torch.tensor([[5.0, 5, 60, 60]])
    nothing = torch.zeros(0, 4)
    found = given(model, images, [nothing, boxes])
    assert close(found, given(model, images[1:], [boxes]))
    assert given(model, images, [nothing, nothing]).shape[0] == 0


def test_inference_and_training_run(model, inputs):
    with torch.no_grad():
        found = model(inputs())
    assert [len(one["instances"]) for one in found] != [0, 0]
    with EventStorage():
        losses = model.train()(inputs())
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    inside = [n for n, p in model.roi_heads.named_parameters() if ".fc3." in n and p.grad is not None]
    assert inside


def test_a_preserved_detector_says_what_it_said(config, build, inputs):
    for name, changes in KINDS.values():
        plain = {
            **changes,
            "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
            "MODEL.QUAC.HEADS": "",
            "MODEL.QUAC.ENABLED": False,
        }
        ours, host = build(config(name, changes)), build(config(name, plain))
        ours.load_state_dict(host.state_dict(), strict=False)
        with torch.no_grad():
            for a, b in zip(ours(inputs()), host(inputs()), strict=True):
                assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
                assert torch.equal(a["instances"].scores, b["instances"].scores)


def test_features_that_come_from_elsewhere_are_refused(config, build, inputs):
    model = build(config("mask_rcnn_R_50_FPN_heads_qacon"))
    heads = model.roi_heads
    with pytest.raises(quac.QualityError, match="before any image"):
        heads.box_head(torch.rand(3, 256, 7, 7))
    with torch.no_grad():
        model(inputs())
        with pytest.raises(quac.QualityError, match=r"'roi_heads\.box_head' is given features of 999 proposals"):
            heads.box_head(torch.rand(999, 256, 7, 7))


def test_features_of_several_images_go_through_the_heads_in_any_order(config, build, moved, inputs):
    model = moved(build(config(*KINDS["fpn"])))
    heads, boxes = model.roi_heads, [Boxes(torch.tensor([[5.0, 5, 60, 60], [20, 10, 90, 80]]))]
    with torch.no_grad():
        images = [model.preprocess_image([one]).tensor for one in inputs(((96, 128), (96, 128)))]

        def say(features):
            return heads.box_head(heads.box_pooler([features[name] for name in heads.box_in_features], boxes))

        expected = [say(model.backbone(one)) for one in images]
        features = [model.backbone(one) for one in images]
        for i in (0, 1, 0):
            assert torch.equal(say(features[i]), expected[i])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_heads_are_not_traced(config, build, inputs):
    """A trace would keep how many proposals each of its own images had."""
    model, images = build(config("mask_rcnn_R_50_FPN_heads_qacon")), [{"image": inputs()[0]["image"]}]
    adapter = TracingAdapter(model, (images,), lambda model, given: model.inference(given, do_postprocess=False))
    with (
        torch.no_grad(),
        pytest.raises(quac.QualityError, match=r"'roi_heads\.box_head' .*cannot be traced.*HEADS: ''"),
    ):
        torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)


def test_patterns_of_heads(config, build):
    model = build(
        config("mask_rcnn_R_50_FPN_heads_qacon", {"MODEL.QUAC.HEADS": "box_head.fc_relu1, mask_head.deconv*"})
    )
    names = [n for n, m in model.roi_heads.named_modules() if type(m).__name__ == "QACON"]
    assert names == ["box_head.fc_relu1", "mask_head.deconv_relu"]
    model = build(config("mask_rcnn_R_50_FPN_heads_qacon", {"MODEL.QUAC.HEADS": "spatial"}))
    assert not any("fc_relu" in n for n, m in model.roi_heads.named_modules() if type(m).__name__ == "QACON")
    with pytest.raises(ValueError, match=r"MODEL\.QUAC\.HEADS: .*'box_hat\.\*' matches no .* box_head\.fc_relu1"):
        build(config("mask_rcnn_R_50_FPN_heads_qacon", {"MODEL.QUAC.HEADS": "box_hat.*"}))
    model = build(
        config("mask_rcnn_R_50_FPN_heads_qacon", {"MODEL.QUAC.HEADS": r"re:^mask_head\..*relu$|fc_relu[1,9]"})
    )
    inside = [n for n, m in model.roi_heads.named_modules() if type(m).__name__ == "QACON"]
    assert "box_head.fc_relu1" in inside
    assert "box_head.fc_relu2" not in inside
    assert "mask_head.deconv_relu" in inside
    for wrong, message in (("last", "place in a backbone"), ("auto", "'all', 'spatial'"), ("re:(", "regular expr")):
        with pytest.raises(ValueError, match=rf"MODEL\.QUAC\.HEADS: .*{message}"):
            build(config("mask_rcnn_R_50_FPN_heads_qacon", {"MODEL.QUAC.HEADS": wrong}))
    with pytest.raises(ValueError, match="the ROI heads of this QuACGeneralizedRCNN already hold QuAC"):
        inject_heads(model)
    plain = build(config("mask_rcnn_R_50_FPN_qacon", {"MODEL.QUAC.ENABLED": False}))
    with pytest.raises(ValueError, match="the backbone holds no QuAC that computes q"):
        inject_heads(plain)
