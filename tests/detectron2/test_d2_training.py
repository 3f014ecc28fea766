"""Training, checkpoints and the other things that detectron2 does with a model, with QuAC inside."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor, DefaultTrainer, HookBase
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from PIL import Image
from skimage import data
from torch.utils.checkpoint import checkpoint

import quac_plugins as quac
import quac_plugins.detectron2

FPN = "faster_rcnn_R_50_FPN_qacon"


def step(model, inputs, seed=0):
    """Losses and gradients of one batch."""
    torch.manual_seed(seed)
    model.zero_grad()
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients


@pytest.fixture
def dataset(tmp_path):
    """Four photographs with boxes, in detectron2's catalog."""
    name, records = f"photographs_{tmp_path.name}", []
    for index, photograph in enumerate(("astronaut", "coffee", "chelsea", "rocket")):
        picture = np.ascontiguousarray(getattr(data, photograph)()[:256:2, :320:2, :3])
        file = tmp_path / f"{index}.png"
        Image.fromarray(picture).save(file)
        boxes = [[10, 10, 60, 60], [40, 20, 110, 90]]
        records.append({
            "file_name": str(file), "image_id": index, "height": picture.shape[0], "width": picture.shape[1],
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": kind, "iscrowd": 0}
                for kind, box in enumerate(boxes)
            ],
        })  # fmt: skip
    DatasetCatalog.register(name, lambda: copy.deepcopy(records))
    MetadataCatalog.get(name).set(thing_classes=["a", "b", "c"])
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def training(config, dataset, tmp_path):
    return lambda iterations=4, **changes: config(
        FPN,
        {
            "DATASETS.TRAIN": (dataset,),
            "DATASETS.TEST": (dataset,),
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.MIN_SIZE_TRAIN": (96,),
            "INPUT.MIN_SIZE_TEST": 96,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.BASE_LR": 0.001,
            "SOLVER.MAX_ITER": iterations,
            "SOLVER.CHECKPOINT_PERIOD": 2,
            "OUTPUT_DIR": str(tmp_path / "out"),
            "SEED": 1,
            **changes,
        },
    )


class Losses(HookBase):
    """Every step's loss; what is drawn in a step depends on its number alone."""

    def __init__(self):
        self.values = {}

    def before_step(self):
        torch.manual_seed(self.trainer.iter)

    def after_step(self):
        self.values[self.trainer.iter] = self.trainer.storage.latest()["total_loss"][0]


class Trainer(DefaultTrainer):
    """The same pictures in every step."""

    batch = None

    @classmethod
    def build_train_loader(cls, cfg):
        return itertools.repeat(cls.batch)

    @classmethod
    def build_evaluator(cls, cfg, name):
        return None


def test_default_trainer_resumes_bit_for_bit(training, inputs):
    cfg = training(4)
    Trainer.batch = inputs()
    whole, rest = Losses(), Losses()
    trainer = Trainer(cfg)
    trainer.register_hooks([whole])
    trainer.resume_or_load(resume=False)
    trainer.test = lambda *_: None
    trainer.train()
    changed = [n for n, p in trainer.model.named_parameters() if ".fc3." in n and p.abs().sum() > 0]
    assert changed  # what was put in has been trained
    again = Trainer(cfg)
    again.register_hooks([rest])
    again.checkpointer.load(f"{cfg.OUTPUT_DIR}/model_0000001.pth")
    again.start_iter = 2
    again.train()
    assert len(whole.values) == 4
    assert rest.values == {index: whole.values[index] for index in (2, 3)}


def test_train_evaluate_and_predict_by_config(training, dataset):
    """detectron2's own loader, COCO evaluator and predictor."""

    class Evaluated(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg, name):
            return COCOEvaluator(name, output_dir=cfg.OUTPUT_DIR)

    cfg = training(2)
    trainer = Evaluated(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert "AP" in trainer._last_eval_results["bbox"]
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
    predictor = DefaultPredictor(cfg)
    record = DatasetCatalog.get(dataset)[0]
    bgr = np.ascontiguousarray(np.asarray(Image.open(record["file_name"]))[..., ::-1])
    instances = predictor(bgr)["instances"]
    assert instances.image_size == (128, 160)
    saved = torch.load(cfg.MODEL.WEIGHTS, weights_only=False)["model"]
    state = predictor.model.state_dict()
    assert all(torch.equal(state[name], tensor.cpu()) for name, tensor in saved.items())
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as lines:
        assert all(np.isfinite(json.loads(line).get("total_loss", 0)) for line in lines)


def test_a_checkpoint_brings_everything_back(tmp_path, config, build, inputs, moved):
    cfg = config("mask_rcnn_R_50_FPN_heads_qacon", {"MODEL.QUAC.PRIOR.ENABLED": True})
    model = moved(build(cfg))
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    again = build(cfg)
    DetectionCheckpointer(again).load(str(tmp_path / "model.pth"))
    with torch.no_grad():
        a, b = model(inputs()), again(inputs())
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one["instances"].scores, other["instances"].scores)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for one, other in zip(a, copied(inputs()), strict=True):
            assert torch.equal(one["instances"].scores, other["instances"].scores)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "naiveSyncBN", "GN"])
def test_every_norm_of_the_host_trains(norm, config, build, inputs):
    losses, gradients = step(build(config(FPN, {"MODEL.RESNETS.NORM": norm}), train=True), inputs())
    assert all(np.isfinite(list(losses.values())))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(".fc3." in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())


def test_one_image_a_batch_and_the_published_norm(config, build, inputs):
    """Batches of one are common in detection: the default norm takes them."""
    losses, _ = step(build(config(FPN), train=True), inputs()[:1])
    assert all(np.isfinite(list(losses.values())))
    losses, _ = step(build(config(FPN, {"MODEL.QUAC.NORM": "batch"}), train=True), inputs())
    assert all(np.isfinite(list(losses.values())))


def test_mixed_precision(config, build, inputs, moved):
    model = moved(build(config(FPN), train=True))
    full, _ = step(model, inputs())
    with torch.autocast("cpu", torch.bfloat16):
        half, gradients = step(model, inputs())
    assert all(abs(half[name] - full[name]) < 0.1 * max(1.0, full[name]) for name in full)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    tap = model.backbone.get_submodule(quac.injection_of(model.backbone).tap).quac_tap
    assert tap.context._local.forward.q.dtype == torch.float32


def test_activation_checkpointing_changes_nothing(config, build, inputs, moved):
    cfg = config("mask_rcnn_R_50_FPN_heads_qacon", {"MODEL.BACKBONE.FREEZE_AT": 0})
    model = moved(build(cfg, train=True))
    losses, gradients = step(model, inputs())

    def by_checkpoint(part):
        forward = part.forward
        part.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)

    for block in [*model.backbone.bottom_up.res3, *model.backbone.bottom_up.res4, model.roi_heads.box_head]:
        by_checkpoint(block)
    again, found = step(model, inputs())
    assert again == losses
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_the_prior_of_a_detector_is_fitted_on_photographs(config, build, inputs, tmp_path):
    """Without labels, on the backbone alone; the adapter goes into another copy of the detector."""
    cfg = config("faster_rcnn_R_50_FPN_ddp", {"MODEL.RESNETS.NORM": "BN", "MODEL.PIXEL_STD": [1.0, 1.0, 1.0]})
    model, seen = build(cfg), []
    with torch.no_grad():
        model.backbone.bottom_up.stem.conv1.weight.mul_(0.02)
    hook = model.backbone.bottom_up.stem.conv1.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    before = {n: t.clone() for n, t in model.state_dict().items() if "quac_prior" not in n}
    photographs = [getattr(data, name)()[:128, :128, :3] for name in ("astronaut", "coffee", "chelsea", "rocket")]
    report = quac.fit_prior(
        model.backbone, photographs, corruptions="contrast", severities=5, steps=16, views=1, draws=4,
        input_size=128, progress=False,
    )  # fmt: skip
    hook.remove()
    assert report.held_out < 1
    shown = torch.cat([images[:1].float() for images in seen if images.device.type == "cpu" and len(images) < 64])
    assert 80 < float(shown.abs().max()) < 160  # as the detector itself shows them: to 255, less the mean
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    quac.save_adapter(model.backbone, tmp_path / "adapter")
    other = build(cfg)
    other.load_state_dict(before, strict=False)
    quac.load_adapter(other.backbone, tmp_path / "adapter")
    with torch.no_grad():
        a, b = (m.backbone(m.preprocess_image(inputs()).tensor) for m in (model, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("group_of_one")
def test_wrapped_for_several_processes_it_trains_as_alone(config, inputs):
    torch.manual_seed(0)
    alone = build_model(config(FPN)).train()
    start, other = copy.deepcopy(alone.state_dict()), copy.deepcopy(alone)
    for model in (alone, torch.nn.parallel.DistributedDataParallel(other, broadcast_buffers=False)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
        for index in range(2):
            torch.manual_seed(index)
            with EventStorage():
                loss = sum(model(inputs()[:1]).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = other.state_dict()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(found[name], tensor, msg=name)
    assert any(".fc3." in name and not torch.equal(found[name], start[name]) for name in found)
