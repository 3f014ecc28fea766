"""Segmentation networks of mmseg with QuAC and the degradation prior in their backbones, from mmseg's own configs."""

import copy

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner
from mmseg.registry import MODELS
from test_mmdet import QUAC, expected, losses_of, tap_of, total

import quac_plugins as quac

FCN, SEGFORMER = "_base_/models/fcn_r50-d8.py", "_base_/models/segformer_mit-b0.py"


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("name", [FCN, SEGFORMER])
def test_a_network_starts_as_its_host_trains_and_predicts(name, prior, config, scope, segmentation):
    cfg = config("mmseg", name)
    with scope("mmseg"):
        torch.manual_seed(0)
        host = revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg))).train()
        options = {"quac": {**QUAC, "where": "auto"}, **({"prior": {"freeze": False}} if prior else {})}
        cfg.backbone = {"type": "QuACBackbone", "backbone": cfg.backbone, **options}
        model = revert_sync_batchnorm(MODELS.build(cfg)).train()
    missing, unexpected = model.load_state_dict(host.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("backbone.") for name in missing)
    wanted, found = losses_of(host, segmentation), losses_of(model, segmentation)
    assert float(total(found).detach()) == pytest.approx(float(total(wanted).detach()), rel=1e-5)
    assert torch.allclose(
        tap_of(model).context._local.forward.q, expected(segmentation["inputs"]), rtol=2e-3, atol=2e-3
    )
    total(found).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".fc3." in n or ".quac_prior.body." in n)
    results = model.eval().test_step(copy.deepcopy(segmentation))
    assert [tuple(one.pred_sem_seg.data.shape) for one in results] == [(1, 128, 128)] * 2


def test_windows_of_a_large_picture_have_their_own_quality(config, scope, pictures):
    cfg = config("mmseg", FCN)
    cfg.test_cfg = {"mode": "slide", "crop_size": (96, 96), "stride": (64, 64)}
    cfg.backbone = {"type": "QuACBackbone", "backbone": cfg.backbone, "quac": dict(QUAC)}
    with scope("mmseg"):
        model = revert_sync_batchnorm(MODELS.build(cfg)).eval()
    picture = pictures(((160, 160), (160, 160)))[:1]
    model.test_step({"inputs": picture})
    last = [picture[0][:, 64:, 64:]]
    assert torch.allclose(tap_of(model).context._local.forward.q, expected(last), rtol=2e-3, atol=2e-3)


def test_pretrained_of_the_whole_network_goes_to_the_backbone_inside(config, scope, tmp_path):
    cfg = config("mmseg", FCN)
    with scope("mmseg"):
        torch.manual_seed(1)
        trained = MODELS.build(copy.deepcopy(cfg)).backbone
        torch.save({"state_dict": trained.state_dict()}, tmp_path / "backbone.pth")
        cfg.pretrained = str(tmp_path / "backbone.pth")
        cfg.backbone = {"type": "QuACBackbone", "backbone": cfg.backbone, "quac": dict(QUAC)}
        model = MODELS.build(cfg)
        model.init_weights()
    found = model.backbone.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.state_dict().items())


def test_the_runner_trains_evaluates_and_fits_a_prior(config, labelled, tmp_path):
    classes = {"classes": ("dark", "light"), "palette": [[0, 0, 0], [255, 255, 255]]}
    dataset = {
        "type": "BaseSegDataset", "data_root": str(labelled), "metainfo": classes, "img_suffix": ".png",
        "data_prefix": {"img_path": "pictures", "seg_map_path": "labels"},
    }  # fmt: skip
    load = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
    loader = {"batch_size": 2, "num_workers": 0}
    model = config("mmseg", SEGFORMER)
    model.decode_head.num_classes, model.decode_head.norm_cfg = 2, {"type": "BN"}
    model.backbone = {"type": "QuACBackbone", "backbone": model.backbone, "quac": {"where": "auto"}, "prior": {}}
    hook = {
        "type": "FitPriorHook", "data": str(labelled / "pictures"), "corruptions": ["fog"], "steps": 8, "views": 2,
        "input_size": 128,
    }  # fmt: skip
    sampler = {"type": "InfiniteSampler", "shuffle": True, "seed": 0}
    degraded = [{"type": "CorruptImage", "corruptions": "all", "seed": 0}, {"type": "PackSegInputs"}]
    cfg = {
        "default_scope": "mmseg", "model": model, "work_dir": str(tmp_path), "log_level": "ERROR",
        "custom_imports": {"imports": ["quac_plugins.mmengine"]}, "custom_hooks": [hook], "randomness": {"seed": 0},
        "train_dataloader": {**loader, "sampler": sampler, "dataset": {**dataset, "pipeline": load + degraded}},
        "val_dataloader": {
            **loader, "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": {**dataset, "pipeline": [load[0], degraded[0], load[1], degraded[1]]},
        },
        "val_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]}, "val_cfg": {"type": "ValLoop"},
        "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 1e-3}},
        "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 4, "val_interval": 4},
    }  # fmt: skip
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.hooks[-1].report is not None or any(getattr(one, "report", None) for one in runner.hooks)
    assert 0 <= runner.val()["mIoU"] <= 100
    assert quac.injection_of(runner.model.backbone).prior is not None
