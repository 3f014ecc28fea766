"""Every config of registry/mmengine builds, trains one step and infers."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

import quac_plugins as quac
from quac_plugins.mmengine import CorruptedDataset

FOLDER = Path(quac.registry_file("timm.toml")).parent / "mmengine"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_builds_trains_and_infers(name, pictures):
    cfg = Config.fromfile(quac.registry_file(f"mmengine/{name}.py"))
    cfg.model.setdefault("data_preprocessor", cfg.get("data_preprocessor"))
    model = MODELS.build(cfg.model).train()
    record = quac.injection_of(model) or quac.injection_of(model.backbone)
    assert bool(record.prior) == ("ddp" in name)
    wrapper = build_optim_wrapper(model, {"optimizer": {"type": "SGD", "lr": 0.001}})
    samples = [DataSample().set_gt_label(i) for i in range(2)]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    batch = {"inputs": pictures(((64, 64), (64, 64))), "data_samples": samples}
    losses = model.train_step(batch, wrapper)
    assert torch.isfinite(losses["loss"])
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    with torch.no_grad():
        found = model.eval().test_step(batch)
    assert [len(one.pred_score) for one in found] == [1000, 1000]


def test_the_config_of_corruptions_judges_every_condition(folder):
    cfg = Config.fromfile(quac.registry_file("mmengine/resnet50_qacon_corruptions_in1k.py"))
    dataset = cfg.val_dataloader.dataset
    pipeline = dataset.dataset.pipeline
    made = CorruptedDataset(
        {"type": "mmpretrain.CustomDataset", "data_prefix": str(folder), "pipeline": pipeline},
        dataset.corruptions, dataset.severities,
    )  # fmt: skip
    assert len(made) == 16 * 12
    assert made[12 * 15]["inputs"].shape == (3, 224, 224)
    kinds = [step["type"] for step in cfg.train_dataloader.dataset.pipeline]
    assert kinds.index("CorruptImage") < kinds.index("PackInputs")
