"""examples/train_restoration.py: resumes as if nothing had happened. On two processes: tests/test_processes.py."""

import itertools
import json
import math
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
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


@pytest.fixture
def run(tmp_path, photos, monkeypatch, capsys):
    """The script: the weights that four steps end with, or what it says instead."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("QUAC_DATA", raising=False)

    def script(name, *more, fails=False):
        arguments = [
            "--data", photos, "--config", tmp_path / "small.json", "--work", tmp_path / f"{name}-work",
            "--out", tmp_path / name, "--steps", 4, "--batch-size", 2, "--patch", 32, "--checkpoint-every", 2,
            "--log-every", 1, *more,
        ]  # fmt: skip
        command = [str(SCRIPT), *map(str, arguments)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command)
            if fails:
                with pytest.raises(SystemExit) as left:
                    runpy.run_path(str(SCRIPT), run_name="__main__")
                assert left.value.code
                return f"{left.value} {capsys.readouterr().err}"
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")

    return script


def interrupt_the_third(patch):
    steps, step = [], torch.optim.AdamW.step

    def stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", stop)


def test_resumed_it_ends_where_it_would_have(run, tmp_path, photos, monkeypatch):
    whole = run("whole", "--val", photos, "--scores", tmp_path / "scores.json", "--validate-every", 4)
    with monkeypatch.context() as patch:
        interrupt_the_third(patch)
        with pytest.raises(KeyboardInterrupt):
            run("broken")
    assert [f.name for f in (tmp_path / "broken-work").iterdir()] == ["step-2"]
    torch.manual_seed(1234)  # nothing of the process goes into it
    resumed = run("broken")
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["1 steps"]) >= {"clean", "blur-1", "haze-5"}
    assert set(scores["10 steps"]) >= {"clean", "blur-3", "haze-3"}
    assert (tmp_path / "whole-work" / "step-4.png").is_file()
    assert "--lr was 0.001; give another --work" in run("broken", "--lr", 1, fails=True)


def progress(**options):
    return runpy.run_path(str(SCRIPT), run_name="script")["Progress"](**options)


def test_the_rate_falls_over_the_steps_as_that_of_diffusers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, 1000)
    done = progress(steps=1000, minutes=None, started=0.0)
    for step in range(1000):
        done(step)
        assert done.rate() == schedule.get_last_lr()[0]
        assert done.part == step / 1000
        optimizer.step()
        schedule.step()


def test_the_rate_falls_over_the_minutes_where_they_end_first(monkeypatch):
    """A clock of its own: a step takes three seconds, so that 2 minutes are 40 steps, 2 of them for the warm-up."""
    now = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    done = progress(steps=10**6, minutes=2, started=1000.0)
    rates = []
    while done.part < 1:
        rates.append(done.rate(warm_up=10))
        now[0] += 3
        done(done.step + 1)
    assert len(rates) == 40
    assert rates[:4] == pytest.approx([0, 0.5, 1, (1 + math.cos(math.pi / 38)) / 2])
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[2:]))
    assert rates[-1] < 0.01
    later = progress(steps=10**6, minutes=2, started=now[0])  # in another process, after a checkpoint
    later.load_state_dict({"seconds": 60.0})
    later(20)
    assert later.part == pytest.approx(0.5)


LIMITED = ("--steps", 10**6, "--checkpoint-every", 10**6, "--log-every", 10**6, "--max-minutes", 60)


def hours_go_by(patch):
    """After the third step."""
    steps, step, clock = [], torch.optim.AdamW.step, time.perf_counter

    def count(self, *args, **kwargs):
        steps.append(1)
        return step(self, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", count)
    patch.setattr(time, "perf_counter", lambda: clock() + 1e6 * (len(steps) >= 3))


def test_what_diverged_in_the_last_minutes_is_not_saved(run, tmp_path, monkeypatch):
    hours_go_by(monkeypatch)
    message = run("wild", *LIMITED, "--lr", 1e30, fails=True)
    assert "the loss is not finite: take a smaller --lr" in message
    assert not (tmp_path / "wild").exists()
    assert not list((tmp_path / "wild-work").glob("step-*"))


def test_a_folder_of_an_earlier_version_is_refused(run, tmp_path):
    run("earlier")
    (folder,) = (tmp_path / "earlier-work").glob("step-*")
    (folder / "args.json").write_text(
        json.dumps({k: v for k, v in json.loads((folder / "args.json").read_text()).items() if k != "max_minutes"})
    )
    assert "of another run: made by another version of this script; give another" in run("earlier", fails=True)


def test_it_ends_when_the_minutes_are_over(run, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        hours_go_by(patch)
        run("limited", *LIMITED)
    (checkpoint,) = (tmp_path / "limited-work").glob("step-*")
    assert checkpoint.name == "step-3"
    assert "step 3 of 1000000: --max-minutes 60 are over" in capsys.readouterr().err
    run("limited", *LIMITED)  # they are: nothing is left to do
    assert list((tmp_path / "limited-work").glob("step-*")) == [checkpoint]
    assert "--max-minutes was 60.0; give another --work" in run("limited", *LIMITED[:-1], 61, fails=True)
    assert "no step could be taken in --max-minutes 1e-06" in run("none", "--max-minutes", 1e-6, fails=True)
    assert not (tmp_path / "none").exists()
    assert "--max-minutes must be above 0" in run("none", "--max-minutes", "nan", fails=True)


@pytest.mark.parametrize("activation", ["meta_acon", "silu"])
def test_the_twins(activation, run):
    names = run(activation, "--activation", activation)
    assert any(".act." in name for name in names) == (activation == "meta_acon")


def test_photographs_are_read_as_they_were_taken(tmp_path):
    photographs = runpy.run_path(str(SCRIPT), run_name="script")["photographs"]
    grey = np.asarray(Image.fromarray(data.coffee()).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.png")
    turned = Image.fromarray(grey)
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "b.png", exif=exif)
    deep, upright = photographs(tmp_path)
    assert np.array_equal(deep, np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(upright, np.rot90(deep, 3))
    (tmp_path / "c.jpg").write_bytes(b"no photograph")
    with pytest.raises(SystemExit, match=r"cannot read .*c\.jpg"):
        photographs(tmp_path)


def test_degradations_are_chosen(run, tmp_path):
    (tmp_path / "empty").mkdir()
    noisy = run("noisy", "--degradations", "noise=2,jpeg", "--clean", 0)
    hazy = run("hazy", "--degradations", "haze", "--clean", 0, "--shift", 2)
    assert json.loads((tmp_path / "hazy/scheduler/scheduler_config.json").read_text())["shift"] == 2
    assert any(not torch.equal(noisy[name], hazy[name]) for name in noisy)
    for option, value, message in (
        ("--degradations", "fog=1", "unknown degradation 'fog'"),
        ("--degradations", "jpeg=0", "must be a number above 0"),
        ("--degradations", "jpeg=much", "could not convert"),
        ("--clean", 2, "--clean must be a share from 0 to 1"),
        ("--shift", 0, "--shift must be above 0"),
        ("--steps", 0, "--steps: must be a whole number from 1"),
        ("--validate-every", 0, "--validate-every: must be a whole number from 1"),
        ("--patch", 17, "--patch must be a multiple of 2"),
        ("--lr", "nan", "--lr must be above 0"),
        ("--config", "nope", "--config nope: the registry has no file 'diffusers/nope.json'; it has"),
        ("--config", tmp_path / "no.json", "No such file"),
        ("--start", tmp_path, "is no folder of a saved pipeline"),
        ("--val", tmp_path / "empty", "holds no photographs"),
    ):
        assert message in run("wrong", option, value, fails=True)


def test_times_are_drawn_where_the_scheduler_takes_steps():
    draw = runpy.run_path(str(SCRIPT), run_name="script")["draw_times"]
    assert (draw(100, 0.5, 64.0, torch.Generator().manual_seed(0)) == 1).all()
    found = draw(1000, 1.0, 64.0, torch.Generator().manual_seed(0))
    uniform, first = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    assert (found[first < 0.5] == 1).all()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=64.0)
    scheduler.set_timesteps(sigmas=uniform[first >= 0.5].tolist())
    torch.testing.assert_close(found[first >= 0.5], scheduler.sigmas[:-1].clamp(min=0.02))
