"""examples/train_restoration.py: resumes as if nothing had happened, alike on one process and on two."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from skimage import data

SCRIPT = Path(__file__).parents[2] / "examples/train_restoration.py"
CONFIG = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
    "quac": {"where": "all", "quality": "brisque", "norm": "layer"},
}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut", "coffee"):
        Image.fromarray(getattr(data, name)()).resize((80, 64)).save(folder / f"{name}.png")
    (tmp_path / "small.json").write_text(json.dumps(CONFIG))
    return folder


def run(tmp_path, photos, name, *more, launcher=(), broken=False, check=True):
    """The weights that a run of four steps ends with."""
    code = [str(SCRIPT)]
    if broken:  # interrupted in its third step
        code = ["-c", (
            "import runpy, sys, torch; calls = []\n"
            "step = torch.optim.AdamW.step\n"
            "def stop(self, *args, **kwargs):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 3: raise KeyboardInterrupt\n"
            "    return step(self, *args, **kwargs)\n"
            "torch.optim.AdamW.step = stop\n"
            f"sys.argv[0] = {str(SCRIPT)!r}\n"
            f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        )]  # fmt: skip
    arguments = [
        "--data", photos, "--config", tmp_path / "small.json", "--work", tmp_path / f"{name}-work",
        "--out", tmp_path / name, "--steps", 4, "--batch-size", 2, "--patch", 32, "--checkpoint-every", 2,
        "--log-every", 1, *more,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "QUAC_DATA"} | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, *launcher, *code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if broken:
        assert done.returncode != 0
        return None
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
        return load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
    return done


def test_resumed_it_ends_where_it_would_have(tmp_path, photos):
    whole = run(tmp_path, photos, "whole", "--val", photos, "--scores", tmp_path / "scores.json", "--validate-every", 4)
    run(tmp_path, photos, "broken", broken=True)
    assert [f.name for f in (tmp_path / "broken-work").iterdir()] == ["step-2"]
    resumed = run(tmp_path, photos, "broken")
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["1 steps"]) >= {"clean", "blur-1", "haze-5"}
    assert set(scores["10 steps"]) >= {"clean", "blur-3", "haze-3"}
    assert (tmp_path / "whole-work" / "step-4.png").is_file()
    other = run(tmp_path, photos, "broken", "--lr", 1, check=False)
    assert other.returncode != 0
    assert "--lr was 0.001; give another --work" in other.stderr


def test_two_processes_train_what_one_does(tmp_path, photos, free_port):
    one = run(tmp_path, photos, "one")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port))
    two = run(tmp_path, photos, "two", launcher=launcher)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["meta_acon", "silu"])
def test_the_twins(activation, tmp_path, photos):
    names = run(tmp_path, photos, activation, "--activation", activation)
    assert any(".act." in name for name in names) == (activation == "meta_acon")


def test_degradations_are_chosen(tmp_path, photos):
    noisy = run(tmp_path, photos, "noisy", "--degradations", "noise=2,jpeg", "--clean", 0)
    hazy = run(tmp_path, photos, "hazy", "--degradations", "haze", "--clean", 0, "--shift", 2)
    assert json.loads((tmp_path / "hazy/scheduler/scheduler_config.json").read_text())["shift"] == 2
    assert any(not torch.equal(noisy[name], hazy[name]) for name in noisy)
    for option, value, message in (
        ("--degradations", "fog=1", "unknown degradation 'fog'"),
        ("--degradations", "jpeg=0", "must be a number above 0"),
        ("--degradations", "jpeg=much", "could not convert"),
        ("--clean", 2, "--clean must be a share from 0 to 1"),
        ("--shift", 0, "--shift must be above 0"),
    ):
        assert message in run(tmp_path, photos, "wrong", option, value, check=False).stderr


def test_times_are_drawn_where_the_scheduler_takes_steps():
    draw = runpy.run_path(str(SCRIPT), run_name="script")["draw_times"]
    assert (draw(100, 0.5, 64.0, torch.Generator().manual_seed(0)) == 1).all()
    found = draw(1000, 1.0, 64.0, torch.Generator().manual_seed(0))
    uniform, first = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    assert (found[first < 0.5] == 1).all()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=64.0)
    scheduler.set_timesteps(sigmas=uniform[first >= 0.5].tolist())
    torch.testing.assert_close(found[first >= 0.5], scheduler.sigmas[:-1].clamp(min=0.02))
