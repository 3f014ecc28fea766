"""Small detectors from the project's own configs, and real photographs as detectron2 hands them to a model."""

import logging

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import detection_utils
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from skimage import data

import quac_plugins as quac
from quac_plugins.detectron2 import add_quac_config

SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.NUM_CLASSES": 3,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
    "TEST.DETECTIONS_PER_IMAGE": 8,
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("detectron2").setLevel(logging.ERROR)
    logging.getLogger("fvcore").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def config():
    """config("faster_rcnn_R_50_FPN_qacon", {"MODEL.MASK_ON": True}): a small detector; None for detectron2's own."""

    def make(name=None, changes=None, small=True):
        cfg = get_cfg()
        add_quac_config(cfg)
        if name is not None:
            cfg.merge_from_file(quac.registry_file(f"detectron2/{name}.yaml"))
        for key, value in {**(SMALL if small else {}), **(changes or {})}.items():
            cfg.merge_from_list([key, value])
        return cfg

    return make


def picture(name, height, width):
    """A photograph as detectron2's dataset mapper gives it: BGR, uint8, (3, H, W)."""
    rgb = np.ascontiguousarray(getattr(data, name)()[: height * 2 : 2, : width * 2 : 2, :3])
    return torch.from_numpy(np.ascontiguousarray(detection_utils.convert_PIL_to_numpy(_pil(rgb), "BGR"))).permute(
        2, 0, 1
    )


def _pil(rgb):
    from PIL import Image

    return Image.fromarray(rgb)


@pytest.fixture
def inputs():
    """Two photographs of different sizes, with boxes, masks and labels."""

    def make(sizes=((96, 128), (120, 100))):
        found = []
        for name, (height, width) in zip(("astronaut", "coffee"), sizes, strict=False):
            instances = Instances((height, width))
            instances.gt_boxes = Boxes(torch.tensor([[10.0, 10, 60, 70], [30, 20, 90, 80]]))
            instances.gt_classes = torch.tensor([0, 2])
            masks = torch.zeros(2, height, width, dtype=torch.bool)
            masks[0, 10:70, 10:60] = masks[1, 20:80, 30:90] = True
            instances.gt_masks = BitMasks(masks)
            image = picture(name, height, width)
            labels = torch.zeros(height, width, dtype=torch.long)
            labels[20:60, 20:60] = 2
            found.append({
                "image": image, "instances": instances, "sem_seg": labels, "height": height, "width": width,
            })  # fmt: skip
        return found

    return make


@pytest.fixture
def build():
    def make(cfg, train=False):
        torch.manual_seed(0)
        return build_model(cfg).train(train)

    return make
