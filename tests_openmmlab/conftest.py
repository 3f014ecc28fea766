"""mmdet and mmseg with their compiled operators, their own configs, and real photographs as MMCV reads them."""

import copy
import json
from pathlib import Path

import mmdet
import mmseg
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from PIL import Image
from skimage import data

import quac_plugins.mmengine  # noqa: F401

NAMES = ("astronaut", "coffee", "chelsea", "rocket")
BOXES = [[10.0, 10, 60, 70], [30, 20, 90, 80]]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def scope():
    """Build in the scope of mmdet or mmseg, as a Runner does."""

    def use(name):
        return DefaultScope.overwrite_default_scope(name)

    return use


@pytest.fixture(scope="session")
def config():
    """config("mmdet", "retinanet/retinanet_r18_fpn_1x_coco.py"): the model of a config that the package ships."""

    def load(package, name, whole=False):
        root = Path({"mmdet": mmdet, "mmseg": mmseg}[package].__file__).parent / ".mim" / "configs"
        found = Config.fromfile(root / name)
        if whole:
            return found
        model = copy.deepcopy(found.model)
        model.pop("pretrained", None)
        model.backbone.pop("init_cfg", None)
        if package == "mmseg":
            model.data_preprocessor.size = (128, 128)
        return model

    return load


@pytest.fixture
def pictures():
    """BGR, uint8, (3, H, W); of different sizes."""

    def make(sizes=((96, 128), (120, 100))):
        found = [np.ascontiguousarray(getattr(data, NAMES[i])()[:h, :w, ::-1]) for i, (h, w) in enumerate(sizes)]
        return [torch.from_numpy(picture).permute(2, 0, 1) for picture in found]

    return make


@pytest.fixture
def detection(pictures):
    """A batch as mmdet's data loader gives it, with boxes, labels and masks."""
    samples = []
    for picture in pictures():
        height, width = picture.shape[1:]
        masks = np.zeros((2, height, width), np.uint8)
        masks[0, 10:70, 10:60] = masks[1, 20:80, 30:90] = 1
        instances = InstanceData(
            bboxes=HorizontalBoxes(BOXES), labels=torch.tensor([0, 2]), masks=BitmapMasks(masks, height, width)
        )
        meta = {"img_shape": (height, width), "ori_shape": (height, width), "scale_factor": (1.0, 1.0), "img_id": 0}
        sample = DetDataSample(metainfo={**meta, "batch_input_shape": (128, 128)})
        sample.gt_instances, sample.ignored_instances = (
            instances,
            InstanceData(bboxes=HorizontalBoxes(torch.zeros(0, 4))),
        )
        samples.append(sample)
    return {"inputs": pictures(), "data_samples": samples}


@pytest.fixture
def segmentation(pictures):
    """A batch as mmseg's data loader gives it."""
    alike = pictures(((128, 128), (128, 128)))
    samples = []
    for picture in alike:
        labels = torch.zeros(1, *picture.shape[1:], dtype=torch.long)
        labels[:, 20:80, 30:90] = 2
        shape = tuple(picture.shape[1:])
        sample = SegDataSample(metainfo={"img_shape": shape, "ori_shape": shape, "pad_shape": shape})
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return {"inputs": alike, "data_samples": samples}


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """Four photographs with two boxes each, as COCO has them."""
    root = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    for i, name in enumerate(NAMES):
        Image.fromarray(np.ascontiguousarray(getattr(data, name)()[:128, :128, :3])).save(root / f"{name}.png")
        images.append({"id": i, "file_name": f"{name}.png", "height": 128, "width": 128})
        for j, (left, top, right, bottom) in enumerate(BOXES):
            box = [left, top, right - left, bottom - top]
            annotations.append({
                "id": 2 * i + j + 1, "image_id": i, "category_id": j, "bbox": box, "iscrowd": 0,
                "area": box[2] * box[3],
            })  # fmt: skip
    categories = [{"id": 0, "name": "one"}, {"id": 1, "name": "other"}]
    (root / "all.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Four photographs with a label for each pixel, as files."""
    root = tmp_path_factory.mktemp("labelled")
    for kind in ("pictures", "labels"):
        (root / kind).mkdir()
    for name in NAMES:
        picture = np.ascontiguousarray(getattr(data, name)()[:128, :128, :3])
        Image.fromarray(picture).save(root / "pictures" / f"{name}.png")
        Image.fromarray((picture.mean(2) > 100).astype(np.uint8)).save(root / "labels" / f"{name}.png")
    return root
