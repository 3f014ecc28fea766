"""What was put into a detector's backbone travels over the Hub; the detector itself stays detectron2's."""

import pytest
import torch

import quac_plugins as quac
from quac_plugins.detectron2 import with_activations

FASTER_RCNN = "faster_rcnn_R_50_FPN_qacon"


def rebuilt(model, like):
    """A detector with the host's weights of another, and its own fresh QuAC."""
    inside = quac.adapter_state(like.backbone)
    kept = {name: t for name, t in like.state_dict().items() if name.removeprefix("backbone.") not in inside}
    for name, tensor in model.state_dict().items():
        if name in kept:
            tensor.copy_(kept[name])
    return model


def outputs(model, inputs):
    with torch.no_grad():
        return [found["instances"].pred_boxes.tensor for found in model(inputs())]


@pytest.mark.parametrize("changes", [{}, {"MODEL.QUAC.PRIOR.ENABLED": True}], ids=["activations", "and a prior"])
def test_a_backbones_adapter_goes_to_the_hub_and_back(changes, config, build, inputs, hub):
    model = build(config(FASTER_RCNN, changes))
    for name, tensor in model.backbone.state_dict().items():
        if "running_" in name:  # frozen statistics, which detectron2 sets to 0 and 1 where a state dict lacks them
            tensor.uniform_(0.5, 1.5)
    with torch.no_grad():
        for tensor in quac.adapter_state(model.backbone).values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand(tensor.shape))
    pushed = quac.push(model.backbone, "me/detector")
    again = rebuilt(build(config(FASTER_RCNN, changes)), model)
    assert not all(map(torch.equal, outputs(again, inputs), outputs(model, inputs)))
    quac.load_adapter(again.backbone, "me/detector", revision=pushed.commit)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(map(torch.equal, outputs(again, inputs), outputs(model, inputs)))
    card = hub.files("me/detector")["README.md"].decode()
    assert "detectron2.modeling.backbone.fpn.FPN" in card
    assert "timm" not in card


def test_it_also_goes_into_detectron2s_own_backbone(config, build, inputs, hub):
    model = build(config(FASTER_RCNN))
    quac.push(model.backbone, "me/detector")
    plain = build(config(FASTER_RCNN, {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone"}))
    for name, tensor in plain.state_dict().items():
        tensor.copy_(model.state_dict()[name])
    quac.load_adapter(with_activations(plain.backbone), "me/detector")
    assert all(map(torch.equal, outputs(plain, inputs), outputs(model, inputs)))


def test_a_whole_detector_says_which_part_to_give(config, build, hub):
    model = build(config(FASTER_RCNN))
    for act in (lambda: quac.push(model, "me/detector"), lambda: quac.save_adapter(model, "nowhere")):
        with pytest.raises(ValueError, match="GeneralizedRCNN holds no QuAC and no prior; what holds it is 'backbone'"):
            act()
