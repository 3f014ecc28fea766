"""Configs in new style (pure Python), which import this package only when a part of the model is being built."""

import subprocess
import sys
import textwrap

import pytest

QUAC = """
    from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead
    from quac_plugins.mmengine import build_quac_resnet
    default_scope = "mmpretrain"
    model = dict(type=ImageClassifier,
        backbone=dict(type=build_quac_resnet, depth=18, quac=dict(where="spatial")),
        neck=dict(type=GlobalAveragePooling), head=dict(type=LinearClsHead, num_classes=2, in_channels=512),
        data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True))
"""
ACT = """
    from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead, MobileNetV2
    from quac_plugins.mmengine.activations import QACON
    default_scope = "mmpretrain"
    model = dict(type=ImageClassifier, backbone=dict(type=MobileNetV2, act_cfg=dict(type=QACON)),
        neck=dict(type=GlobalAveragePooling), head=dict(type=LinearClsHead, num_classes=2, in_channels=1280),
        data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True))
"""
START = """
    import sys
    import mmpretrain.utils.dependency
    mmpretrain.utils.dependency.WITH_MULTIMODAL = False  # mmpretrain's models come before quac_plugins.mmengine here
    from mmengine.config import Config
    from mmengine.runner import Runner
    cfg = Config.fromfile("config.py")
    assert "quac_plugins.mmengine" not in sys.modules
    cfg.work_dir, cfg.log_level = "work", "ERROR"
"""
RUN = """
    import numpy as np, pytest, torch
    from skimage import data
    model = Runner.from_cfg(cfg).model.eval()
    import quac_plugins as quac
    taps = [module for name, module in model.named_modules() if name.endswith("quac_tap")]
    assert len(taps) == 1
    assert taps[0].mean == pytest.approx((0.485, 0.456, 0.406)) and taps[0].channel_order == "rgb"
    pictures = [
        torch.from_numpy(np.ascontiguousarray(getattr(data, name)()[:h, :w, ::-1])).permute(2, 0, 1)
        for name, h, w in (("astronaut", 96, 128), ("coffee", 120, 100))
    ]
    with torch.no_grad():
        assert model(**model.data_preprocessor({"inputs": pictures}), mode="tensor").shape == (2, 2)
    wanted = torch.cat([quac.brisque(one.flip(0)[None].float() / 255) for one in pictures])
    assert torch.allclose(taps[0].context._local.forward.q, wanted, rtol=2e-3, atol=2e-3)
    sites = [m for m in model.modules() if isinstance(m, quac.ChannelActivation)]
    cfg = Config.fromfile("config.py")
    cfg.work_dir, cfg.log_level, cfg.experiment_name = "work", "ERROR", "again"
    again = Runner.from_cfg(cfg).model  # wrapped from here on
    assert len([m for m in again.modules() if isinstance(m, quac.ChannelActivation)]) == len(sites) > 5
"""


def run(folder, config, *parts):
    """What a fresh process prints and its errors; the config file is read there."""
    (folder / "config.py").write_text(textwrap.dedent(config))
    code = "\n".join(textwrap.dedent(part) for part in parts)
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("config", [QUAC, ACT])
def test_the_runner_finishes_what_it_has_built(config, tmp_path):
    done = run(tmp_path, config, START, RUN)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (
            QUAC,
            {
                "cfg.model.backbone.quac['qualty'] = 'x'": "quac.qualty: unknown option",
                "cfg.model.backbone.quac['where'] = 'layer9.*'": "model.backbone.quac.where: where='layer9.*' matches",
            },
        ),
        (ACT, {"cfg.model.backbone.act_cfg['init'] = 1": "act_cfg.init: unknown init 1"}),
    ],
)
def test_an_error_says_its_path(config, changes, tmp_path):
    """From the part on that is built while the package is imported; of later models, from the model on."""
    build = """
        import copy
        kept = cfg
        for change in CHANGES:
            cfg = copy.deepcopy(kept)
            cfg.experiment_name = str(len(change))
            exec(change)
            try:
                Runner.from_cfg(cfg)
            except ValueError as error:
                print("ValueError:", str(error).splitlines()[-1])
    """
    done = run(tmp_path, config, START, f"CHANGES = {list(changes)}", build)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ValueError: ")]
    for line, message in zip(lines, changes.values(), strict=True):
        assert line.startswith(f"ValueError: {message}")


def test_a_model_that_nobody_finishes_is_warned_of(tmp_path):
    build = """
        from mmengine.registry import MODELS
        model = MODELS.build(cfg.model)
        tap = model.backbone.conv1.quac_tap
        assert tap.mean is None
        import torch
        model.backbone(torch.rand(1, 3, 64, 64))
        from quac_plugins.mmengine import finish
        assert finish(model).backbone.conv1.quac_tap is tap and tap.mean is not None
    """
    done = run(tmp_path, QUAC, START, build)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "UserWarning: quac_plugins.mmengine is imported by the config of a model" in done.stderr
