"""MMEngine's Runner with QuAC inside: training, evaluation, resuming, wrappers, hooks, processes."""

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, METRICS, OPTIM_WRAPPERS, TRANSFORMS
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

import quac_plugins as quac

# narrow: each of these tests builds several
RESNET = {"depth": 18, "stem_channels": 8, "base_channels": 8}
HEAD = {"in_channels": 64}
QUAC = {"type": "QuACResNet", **RESNET, "quac": {"where": "spatial", "quality": "brisque"}}
PIPELINE = [{"type": "LoadImageFromFile"}, {"type": "PackInputs"}]


@pytest.fixture(autouse=True)
def _trusted_checkpoints(monkeypatch):
    """mmengine 0.10 resumes from its own checkpoints by full unpickling, which torch has to be asked for since 2.6."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


@pytest.fixture
def config(classifier, folder, tmp_path):
    """A Runner's config: twelve photographs of 64×64, three to a batch."""

    def make(backbone=QUAC, epochs=2, **changes):
        dataset = {"type": "CustomDataset", "data_prefix": str(folder), "pipeline": PIPELINE}
        loader = {"batch_size": 3, "num_workers": 0, "dataset": dataset}
        cfg = {
            "default_scope": "mmpretrain",
            "custom_imports": {"imports": ["quac_plugins.mmengine"]},
            "model": classifier(backbone=backbone, head=HEAD),
            "work_dir": str(tmp_path / "work"),
            "train_dataloader": {**loader, "sampler": {"type": "DefaultSampler", "shuffle": True, "seed": 0}},
            "val_dataloader": {**loader, "sampler": {"type": "DefaultSampler", "shuffle": False}},
            "val_evaluator": {"type": "Accuracy", "topk": (1,)},
            "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
            "train_cfg": {"by_epoch": True, "max_epochs": epochs, "val_interval": epochs},
            "val_cfg": {},
            "default_hooks": {"logger": {"type": "LoggerHook", "interval": 1}},
            "randomness": {"seed": 0},
            "log_level": "ERROR",
            "experiment_name": f"test{next(make.counter)}",
            **changes,
        }
        cfg["test_dataloader"], cfg["test_evaluator"], cfg["test_cfg"] = cfg["val_dataloader"], cfg["val_evaluator"], {}
        return Config(cfg)

    make.counter = itertools.count()
    return make


@OPTIM_WRAPPERS.register_module(force=True)
class HalfOptimWrapper(OptimWrapper):
    """Mixed precision as AmpOptimWrapper has it, which needs a GPU."""

    @contextlib.contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


class Losses(Hook):
    """Every step's loss; what is drawn in a step depends on its number alone."""

    def __init__(self):
        self.values = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        torch.manual_seed(runner.iter)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.values[runner.iter] = float(outputs["loss"].detach())


def trained(cfg):
    runner, losses = Runner.from_cfg(cfg), Losses()
    runner.register_hook(losses)
    runner.train()
    return runner, losses.values


def test_train_validate_test_and_resume_bit_for_bit(config, tmp_path):
    runner, whole = trained(config(epochs=3, work_dir=str(tmp_path / "a")))
    assert len(whole) == 12
    assert np.isfinite(list(whole.values())).all()
    fc3 = [p for n, p in runner.model.named_parameters() if n.endswith("act3.fc3.weight") or ".fc3.weight" in n]
    assert any(p.abs().sum() > 0 for p in fc3)
    again = config(epochs=3, work_dir=str(tmp_path / "b"), resume=True, load_from=f"{tmp_path}/a/epoch_2.pth")
    _, rest = trained(again)
    assert list(rest) == [8, 9, 10, 11]
    assert rest == {index: whole[index] for index in rest}
    cfg = config(load_from=f"{tmp_path}/a/epoch_3.pth", work_dir=str(tmp_path / "c"))
    assert Runner.from_cfg(cfg).test() == runner.val()


def test_the_same_config_without_quac_starts_at_the_same_loss(config, tmp_path):
    """Preserved: the first step's loss is the host's, from the same weights."""
    host = {"type": "ResNet", **RESNET}
    plain = Runner.from_cfg(config(host, work_dir=str(tmp_path / "plain")))
    torch.save(plain.model.state_dict(), tmp_path / "host.pth")
    found = []
    for backbone in (host, QUAC):
        cfg = config(
            backbone, epochs=1, load_from=str(tmp_path / "host.pth"), work_dir=str(tmp_path / backbone["type"])
        )
        found.append(trained(cfg)[1])
    assert found[0][0] == found[1][0]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    "wrapper",
    [
        {"type": "HalfOptimWrapper"},
        {"type": "OptimWrapper", "accumulative_counts": 2, "clip_grad": {"max_norm": 1.0}},
    ],
)
def test_optimizer_wrappers(wrapper, config):
    cfg = config(epochs=1)
    cfg.optim_wrapper = {**wrapper, "optimizer": {"type": "SGD", "lr": 0.01}}
    _, losses = trained(cfg)
    assert np.isfinite(list(losses.values())).all()


def test_the_moving_average_has_a_quality_of_its_own(config):
    runner, _ = trained(config(epochs=1, custom_hooks=[{"type": "EMAHook", "momentum": 0.1}]))
    ema = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook").ema_model.module
    assert ema.backbone.conv1.quac_tap.context is not runner.model.backbone.conv1.quac_tap.context
    assert "accuracy/top1" in runner.val()


def test_test_time_augmentation(config):
    from mmpretrain.models import AverageClsScoreTTA

    runner = Runner.from_cfg(config())
    model = AverageClsScoreTTA(module=runner.model).eval()
    batches = list(runner.build_dataloader(runner._val_dataloader))[:1]
    flipped = {**batches[0], "inputs": [image.flip(-1) for image in batches[0]["inputs"]]}
    both = {key: [batches[0][key], flipped[key]] for key in batches[0]}
    with torch.no_grad():
        found = model.test_step(both)
        alone = runner.model.eval().test_step(copy.deepcopy(batches[0]))
    assert len(found) == len(alone) == 3
    assert all(torch.isfinite(one.pred_score).all() for one in found)


def test_a_config_survives_dump_and_reload(config, tmp_path):
    cfg = config()
    cfg.dump(tmp_path / "config.py")
    again = Config.fromfile(tmp_path / "config.py")
    assert again.model == cfg.model
    torch.manual_seed(0)
    first = MODELS.build(copy.deepcopy(cfg.model)).state_dict()
    torch.manual_seed(0)
    second = MODELS.build(copy.deepcopy(again.model)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_prior_is_fitted_when_the_weights_are_there(config, folder, tmp_path):
    host = {"type": "ResNet", **RESNET}
    plain = Runner.from_cfg(config(host, work_dir=str(tmp_path / "plain")))
    torch.save({"state_dict": plain.model.state_dict()}, tmp_path / "host.pth")
    hook = {
        "type": "FitPriorHook", "data": str(folder), "limit": 4, "corruptions": ["contrast"], "severities": 5,
        "steps": 6, "views": 1, "input_size": 64,
    }  # fmt: skip
    prior = {"type": "DegradationPrior", "backbone": host, "site": "auto"}
    cfg = config(prior, load_from=str(tmp_path / "host.pth"), custom_hooks=[hook])
    runner = Runner.from_cfg(cfg)
    assert "accuracy/top1" in runner.test()
    fitted = next(one for one in runner.hooks if type(one).__name__ == "FitPriorHook")
    assert fitted.report.images["all"] == 4
    assert fitted.report.held_out <= 1
    state = runner.model.state_dict()
    loaded = torch.load(tmp_path / "host.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.items())
    report = fitted.report
    runner.val()
    assert fitted.report is report  # once
    torch.save({"state_dict": runner.model.state_dict()}, tmp_path / "fitted.pth")
    again = Runner.from_cfg(config(prior, load_from=str(tmp_path / "fitted.pth"), custom_hooks=[hook]))
    again.test()  # what is loaded is fitted already
    assert all(
        torch.equal(again.model.state_dict()[name], tensor) for name, tensor in runner.model.state_dict().items()
    )
    averaged = config(prior, load_from=str(tmp_path / "host.pth"), custom_hooks=[{"type": "EMAHook"}, hook])
    runner = Runner.from_cfg(averaged)
    runner.test()
    ema = next(one for one in runner.hooks if type(one).__name__ == "EMAHook").ema_model.module
    fitted = quac.adapter_state(runner.model.backbone)
    assert all(torch.equal(quac.adapter_state(ema.backbone)[name], tensor) for name, tensor in fitted.items())
    with pytest.raises(FileNotFoundError, match=r"FitPriorHook\.data: there is no folder or file '.*nowhere'"):
        Runner.from_cfg(config(prior, custom_hooks=[{**hook, "data": str(tmp_path / "nowhere")}])).test()
    with pytest.raises(ValueError, match="holds no degradation prior"):
        Runner.from_cfg(config(QUAC, custom_hooks=[hook], work_dir=str(tmp_path / "none"))).test()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stpes": 20}, r"FitPriorHook\.stpes: .*did you mean 'steps'"),
        ({"corruptions": ["fogg"]}, r"FitPriorHook\.corruptions: .*fogg"),
        ({"severities": 9}, r"FitPriorHook\.severities: .*9"),
        ({"steps": "many"}, r"FitPriorHook\.steps: steps must be a whole number"),
        ({"limit": 0}, r"FitPriorHook\.limit: limit must be a whole number"),
        ({"lr": "fast"}, r"FitPriorHook\.lr: lr must be a number above 0"),
        ({"input_size": "large"}, r"FitPriorHook\.input_size: "),
    ],
)
def test_a_wrong_option_of_the_hook_is_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        HOOKS.build({"type": "FitPriorHook", "data": "few/", **options})


def test_every_corruption_is_judged(config, folder):
    pipeline = [
        {"type": "LoadImageFromFile"}, {"type": "CorruptImage"},
        {"type": "PackInputs", "meta_keys": ("img_path", "corruption", "severity")},
    ]  # fmt: skip
    inner = {"type": "CustomDataset", "data_prefix": str(folder), "pipeline": pipeline}
    dataset = {"type": "CorruptedDataset", "dataset": inner, "corruptions": ["fog", "contrast"], "severities": [3, 5]}
    cfg = config()
    cfg.test_dataloader.dataset = dataset
    cfg.test_evaluator = {"type": "CorruptionAccuracy"}
    found = Runner.from_cfg(cfg).test()
    names = {f"corruption/{n}/{s}" for n in ("fog", "contrast") for s in (3, 5)}
    assert set(found) == names | {"corruption/clean", "corruption/mean"}
    assert found["corruption/mean"] == pytest.approx(np.mean([found[name] for name in names]))
    again = DATASETS.build(dataset)
    assert len(again) == 5 * 12
    first, second = again[12 + 3], DATASETS.build(dataset)[12 + 3]
    assert torch.equal(first["inputs"], second["inputs"])
    assert first["data_samples"].corruption == "fog"
    assert not torch.equal(first["inputs"], again[3]["inputs"])


def test_the_corruption_metric_counts():
    metric = METRICS.build({"type": "CorruptionAccuracy"})
    evaluator = Evaluator(metric)
    for name, severity, label, predicted in (("clean", 0, 1, 1), ("fog", 3, 0, 0), ("fog", 3, 0, 1), ("snow", 1, 1, 0)):
        sample = DataSample(metainfo={"corruption": name, "severity": severity}).set_gt_label(label)
        sample.set_pred_score(torch.eye(2)[predicted])
        evaluator.process([sample])
    assert evaluator.evaluate(4) == {
        "corruption/clean": 100.0, "corruption/fog/3": 50.0, "corruption/snow/1": 0.0, "corruption/mean": 25.0,
    }  # fmt: skip
    with pytest.raises(KeyError, match="meta_keys"):
        evaluator.process([DataSample().set_gt_label(1).set_pred_score(torch.eye(2)[1])])


def test_the_transform(pictures):
    from quac_plugins.degradations import corrupt

    bgr = pictures()[0].permute(1, 2, 0).numpy()
    results = {"img": bgr.copy(), "img_path": "a.png", "corruption": "contrast", "severity": 4}
    made = TRANSFORMS.build({"type": "CorruptImage"})(dict(results))["img"]
    assert np.array_equal(made[..., ::-1], corrupt(np.ascontiguousarray(bgr[..., ::-1]), "contrast", 4))
    drawn = [TRANSFORMS.build({"type": "CorruptImage", "corruptions": "all", "seed": s}) for s in (1, 1, 2)]
    found = [transform(dict(results)) for transform in drawn]
    assert np.array_equal(found[0]["img"], found[1]["img"])
    assert not np.array_equal(found[0]["img"], found[2]["img"])
    never = TRANSFORMS.build({"type": "CorruptImage", "corruptions": "fog", "prob": 0.0})(dict(results))
    assert np.array_equal(never["img"], bgr)
    assert (never["corruption"], never["severity"]) == ("clean", 0)
    with pytest.raises(ValueError, match="uint8 images"):
        drawn[0]({"img": bgr.astype(np.float32)})
    with pytest.raises(ValueError, match="fogg"):
        TRANSFORMS.build({"type": "CorruptImage", "corruptions": "fogg"})
    with pytest.raises(ValueError, match="prob must lie between 0 and 1, got 'x'"):
        TRANSFORMS.build({"type": "CorruptImage", "corruptions": "fog", "prob": "x"})
    with pytest.raises(ValueError, match="needs a CorruptedDataset"):
        TRANSFORMS.build({"type": "CorruptImage"})({"img": bgr})


@pytest.mark.usefixtures("group_of_one")
def test_wrapped_for_several_processes_it_trains_as_alone(classifier, pictures):
    backbone = {**QUAC, "quac": {**QUAC["quac"], "norm": "layer"}}
    torch.manual_seed(0)
    alone = MODELS.build(classifier(backbone=backbone, head=HEAD)).train()
    other = copy.deepcopy(alone)
    image = pictures()[0][:, :64, :64]
    for model in (alone, MMDistributedDataParallel(other, broadcast_buffers=False)):
        wrapper = build_optim_wrapper(model, {"optimizer": {"type": "SGD", "lr": 0.01}})
        for _ in range(2):
            samples = [DataSample().set_gt_label(label) for label in range(2)]
            model.train_step({"inputs": [image.clone()] * 2, "data_samples": samples}, wrapper)
    found = other.state_dict()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(found[name], tensor, msg=name)
    assert any(".fc3." in name and tensor.abs().sum() > 0 for name, tensor in found.items())
