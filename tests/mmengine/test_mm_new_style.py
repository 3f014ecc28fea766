"""Configs in new style (pure Python), which import this package only when a part of the model is being built."""

import json
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


ERRORS = """
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
UNFINISHED = """
    from mmengine.registry import MODELS
    model = MODELS.build(cfg.model)
    tap = model.backbone.conv1.quac_tap
    assert tap.mean is None
    import torch
    model.backbone(torch.rand(1, 3, 64, 64))
    from quac_plugins.mmengine import finish
    assert finish(model).backbone.conv1.quac_tap is tap and tap.mean is not None
"""
CHANGES = {
    "quac": {
        "cfg.model.backbone.quac['qualty'] = 'x'": "quac.qualty: unknown option",
        "cfg.model.backbone.quac['where'] = 'layer9.*'": "model.backbone.quac.where: where='layer9.*' matches",
    },
    "act": {"cfg.model.backbone.act_cfg['init'] = 1": "act_cfg.init: unknown init 1"},
}
CASES = {
    "quac": (QUAC, RUN),
    "act": (ACT, RUN),
    "errors of quac": (QUAC, f"CHANGES = {list(CHANGES['quac'])}", ERRORS),
    "errors of act": (ACT, f"CHANGES = {list(CHANGES['act'])}", ERRORS),
    "unfinished": (QUAC, UNFINISHED),
}
# Each case is a process in which the package was never imported, split from one that has the frameworks.
SPLIT = """
import json, os, sys, traceback
import mmpretrain.utils.dependency
mmpretrain.utils.dependency.WITH_MULTIMODAL = False  # mmpretrain's models come before quac_plugins.mmengine here
import mmpretrain.models, pytest, torch
from skimage import data
torch.set_num_threads(1)
for name, code in json.load(open("cases.json")).items():
    process = os.fork()
    if process == 0:
        os.chdir(name)
        for stream, file in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
        try:
            exec(code, {})
            failed = 0
        except BaseException:
            traceback.print_exc()
            failed = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(failed)
    os.waitpid(process, 0)
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What each case printed, and its warnings and errors; it reads its config file."""
    root, codes = tmp_path_factory.mktemp("cases"), {}
    for name, (config, *parts) in CASES.items():
        (root / name).mkdir()
        (root / name / "config.py").write_text(textwrap.dedent(config))
        codes[name] = "\n".join(textwrap.dedent(part) for part in (START, *parts, "print('finished')"))
    (root / "cases.json").write_text(json.dumps(codes))
    subprocess.run([sys.executable, "-c", SPLIT], cwd=root, check=True)

    def printed(name):
        out, err = ((root / name / stream).read_text() for stream in ("stdout", "stderr"))
        assert out.endswith("finished\n"), err[-2000:]
        return out, err

    return printed


@pytest.mark.parametrize("name", ["quac", "act"])
def test_the_runner_finishes_what_it_has_built(name, done):
    done(name)


@pytest.mark.parametrize("name", ["quac", "act"])
def test_an_error_says_its_path(name, done):
    """From the part on that is built while the package is imported; of later models, from the model on."""
    lines = [line for line in done(f"errors of {name}")[0].splitlines() if line.startswith("ValueError: ")]
    for line, message in zip(lines, CHANGES[name].values(), strict=True):
        assert line.startswith(f"ValueError: {message}")


def test_a_model_that_nobody_finishes_is_warned_of(done):
    assert "UserWarning: quac_plugins.mmengine is imported by the config of a model" in done("unfinished")[1]
