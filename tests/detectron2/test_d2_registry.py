"""Every config of registry/detectron2 builds, trains one step and infers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

import quac_plugins as quac

FOLDER = Path(quac.registry_file("timm.toml")).parent / "detectron2"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SMALLER = {
    "faster_rcnn_R_50_C4_qacon": {
        "MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.WIDTH_PER_GROUP": 16, "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    },
    "faster_rcnn_timm_FPN_qacon": {"MODEL.QUAC.TIMM.NAME": "convnext_atto", "MODEL.QUAC.TIMM.PRETRAINED": False},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_config_builds_trains_and_infers(name, config, build, inputs):
    cfg = config(name, SMALLER.get(name))
    model = build(cfg, train=True)
    record = quac.injection_of(model.backbone)
    assert bool(record.config) == cfg.MODEL.QUAC.ENABLED
    assert bool(record.prior) == cfg.MODEL.QUAC.PRIOR.ENABLED
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
    batch = inputs()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with EventStorage():
        losses = model(batch)
    assert all(np.isfinite(float(loss.detach())) for loss in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())
    with torch.no_grad():
        found = model.eval()(batch)
    assert len(found) == 2
    if "sem_seg" in found[0]:
        assert found[0]["sem_seg"].shape == (4, 96, 128)
    else:
        assert found[0]["instances"].image_size == (96, 128)


def test_there_is_a_config_for_every_task():
    assert {"faster_rcnn_R_50_FPN_qacon", "retinanet_R_50_FPN_qacon", "mask_rcnn_R_50_FPN_qacon"} <= set(NAMES)
    assert {"semantic_R_50_FPN_qacon", "faster_rcnn_R_50_C4_qacon", "faster_rcnn_R_50_FPN_ddp"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_at_its_own_size_is_the_named_network(name, config):
    """As a user gets it, but for the weights: which are fetched when training starts."""
    cfg = config(name, small=False)
    assert cfg.MODEL.BACKBONE.NAME.startswith("build_quac_")
    if "R_50" in name:
        assert cfg.MODEL.RESNETS.DEPTH == 50
        assert cfg.MODEL.WEIGHTS.startswith("detectron2://")
