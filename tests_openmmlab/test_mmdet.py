"""Detectors of mmdet with QuAC and the degradation prior in their backbones, from mmdet's own configs."""

import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import Runner

import quac_plugins as quac

QUAC = {"where": "spatial", "quality": "brisque"}
RETINANET, FASTER = (
    "retinanet/retinanet_r18_fpn_1x_coco.py",
    "faster_rcnn/faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py",
)
SWIN = "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
DEFORMABLE = "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py"


def expected(pictures):
    return torch.cat([quac.brisque(p.flip(0)[None].float() / 255) for p in pictures])


def tap_of(model):
    return next(module for name, module in model.named_modules() if name.endswith("quac_tap"))


def total(losses):
    flat = [v for value in losses.values() for v in (value if isinstance(value, list) else [value])]
    return sum(value.mean() for value in flat)


def losses_of(model, batch):
    torch.manual_seed(0)
    data = model.data_preprocessor(copy.deepcopy(batch), training=True)
    return model(**data, mode="loss")


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("name", [RETINANET, FASTER, SWIN, DEFORMABLE])
def test_a_detector_starts_as_its_host_trains_and_predicts(name, prior, config, scope, detection):
    cfg = config("mmdet", name)
    with scope("mmdet"):
        torch.manual_seed(0)
        host = MODELS.build(copy.deepcopy(cfg)).train()
        options = {"quac": {**QUAC, "where": "auto" if name == SWIN else "spatial"}}
        if prior:
            options["prior"] = {"site": "auto", "freeze": False}
        cfg.backbone = {"type": "QuACBackbone", "backbone": cfg.backbone, **options}
        model = MODELS.build(cfg).train()
    missing, unexpected = model.load_state_dict(host.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("backbone.") for name in missing)
    wanted, found = losses_of(host, detection), losses_of(model, detection)
    assert float(total(found).detach()) == pytest.approx(float(total(wanted).detach()), rel=1e-5)
    assert torch.allclose(tap_of(model).context._local.forward.q, expected(detection["inputs"]), rtol=2e-3, atol=2e-3)
    total(found).backward()
    inside = {n: p for n, p in model.named_parameters() if ".fc3." in n or ".quac_prior.body." in n}
    frozen = [n for n, p in inside.items() if not p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in inside.values())
    assert all(n.startswith(("backbone.layer1.", "backbone.stem.", "backbone.bn1.")) for n in frozen)
    model.eval()
    with torch.no_grad():
        results = model.test_step(copy.deepcopy(detection))
    assert len(results) == 2
    assert all(torch.isfinite(one.pred_instances.scores).all() for one in results)


def test_a_detector_whose_layers_are_built_with_qswish(config, scope, detection):
    cfg = config("mmdet", "yolox/yolox_tiny_8xb8-300e_coco.py")
    cfg.data_preprocessor.pop("batch_augments")
    with scope("mmdet"):
        torch.manual_seed(0)
        host = MODELS.build(copy.deepcopy(cfg)).eval()
        for part in (cfg.backbone, cfg.neck, cfg.bbox_head):
            part.act_cfg = {"type": "QSwish", "host": {"type": "Swish"}}
        model = MODELS.build(cfg).eval()
    missing, unexpected = model.load_state_dict(host.state_dict(), strict=False)
    assert not unexpected
    assert missing
    parts = {n.split(".")[0] for n, m in model.named_modules() if type(m).__name__ == "QSwish"}
    assert parts == {"backbone", "neck", "bbox_head"}
    assert len([n for n, _ in model.named_modules() if n.endswith("quac_tap")]) == 1
    with torch.no_grad():
        batch = model.data_preprocessor(copy.deepcopy(detection))
        assert all(
            torch.allclose(a, b, atol=1e-5)
            for many, others in zip(model(**batch, mode="tensor"), host(**batch, mode="tensor"), strict=True)
            for a, b in zip(many, others, strict=True)
        )
    losses = losses_of(model.train(), detection)
    total(losses).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".fc3." in n)


@pytest.mark.parametrize(
    ("backbone", "path"),
    [
        ({"type": "QuACResNet", "depth": 18, "quac": {"where": "layer9.*"}}, "quac.where"),
        ({"type": "DegradationPrior", "backbone": {"type": "ResNet", "depth": 18}, "site": "layer9.*"}, "site"),
    ],
)
def test_a_site_that_is_not_there_is_named_with_its_path(backbone, path, config, scope):
    cfg = config("mmdet", RETINANET)
    cfg.backbone = backbone
    with scope("mmdet"), pytest.raises(ValueError, match=rf"^model\.backbone\.{path}: .*layer9"):
        MODELS.build(cfg)


@pytest.fixture
def run(config, coco, tmp_path):
    """A Runner's config on the small data set, from mmdet's own."""

    def make(backbone, work, **changes):
        cfg = config("mmdet", RETINANET, whole=True)
        cfg.model.backbone = backbone
        cfg.model.bbox_head.num_classes = 2
        cfg.model.test_cfg.score_thr = 0.0  # so few steps find nothing else
        dataset = {
            "type": "CocoDataset", "data_root": str(coco), "ann_file": "all.json", "data_prefix": {"img": ""},
            "metainfo": {"classes": ("one", "other")},
        }  # fmt: skip
        load = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
        meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
        train = [
            *load,
            {"type": "CorruptImage", "corruptions": ["fog"], "prob": 0.5, "seed": 0},
            {"type": "PackDetInputs"},
        ]
        test = [*load, {"type": "CorruptImage", "corruptions": ["fog"]}]
        test += [{"type": "Resize", "scale": (128, 128)}, {"type": "PackDetInputs", "meta_keys": meta}]
        loader = {"batch_size": 2, "num_workers": 0, "persistent_workers": False}
        cfg.train_dataloader = {
            **loader, "dataset": {**dataset, "pipeline": train},
            "sampler": {"type": "DefaultSampler", "shuffle": True, "seed": 0},
        }  # fmt: skip
        cfg.val_dataloader = cfg.test_dataloader = {
            **loader, "dataset": {**dataset, "pipeline": test, "test_mode": True},
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        }  # fmt: skip
        cfg.val_evaluator = cfg.test_evaluator = {
            "type": "CocoMetric",
            "ann_file": str(coco / "all.json"),
            "metric": "bbox",
        }
        cfg.train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": 2, "val_interval": 2}
        cfg.param_scheduler = []
        cfg.work_dir, cfg.log_level, cfg.experiment_name = str(tmp_path / work), "ERROR", work
        cfg.randomness = {"seed": 0}
        cfg.custom_imports = {"imports": ["quac_plugins.mmengine"], "allow_failed_imports": False}
        cfg.merge_from_dict(changes)
        return Config(cfg._cfg_dict)

    return make


def test_the_runner_trains_evaluates_and_resumes(run, tmp_path):
    backbone = {"type": "QuACResNet", "depth": 18, "num_stages": 4, "out_indices": (0, 1, 2, 3), "quac": dict(QUAC)}
    runner = Runner.from_cfg(run(backbone, "whole"))
    runner.train()
    fc3 = [p for n, p in runner.model.named_parameters() if ".fc3.weight" in n]
    assert any(p.abs().sum() > 0 for p in fc3)
    again = Runner.from_cfg(run(backbone, "again", resume=True, load_from=str(tmp_path / "whole" / "epoch_1.pth")))
    again.train()
    wanted, found = runner.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert "coco/bbox_mAP" in again.test()


def test_a_prior_is_fitted_inside_a_detector(run, coco):
    backbone = {"type": "ResNet", "depth": 18, "num_stages": 4, "out_indices": (0, 1, 2, 3)}
    hook = {
        "type": "FitPriorHook", "data": str(coco), "corruptions": ["contrast"], "severities": 5, "steps": 20,
        "views": 2, "input_size": 128,
    }  # fmt: skip
    cfg = run({"type": "DegradationPrior", "backbone": backbone, "site": "auto"}, "prior", custom_hooks=[hook])
    runner = Runner.from_cfg(cfg)
    runner.test()
    report = next(one for one in runner.hooks if type(one).__name__ == "FitPriorHook").report
    assert report.images["all"] == 4
    assert report.stages["prior"]["best"] < report.stages["prior"]["first"]
