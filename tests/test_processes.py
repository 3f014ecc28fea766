"""Two processes, started as users do: fit, evaluation and training give what one gives, and an error ends both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import quac_plugins as quac
from quac_plugins.evaluate import EvaluationReport
from quac_plugins.processes import ALONE, Processes, process_group

SCRIPT = """
import importlib.util, os, runpy, sys, timm, torch, quac_plugins as quac
from quac_plugins.commands import app
from quac_plugins.evaluate import evaluate
from quac_plugins.processes import process_group

root, out = sys.argv[1:]
rank = int(os.environ.get("RANK", 0))
torch.set_num_threads(1)
torch.manual_seed(0)
host = timm.create_model("test_resnet", num_classes=4)
host.load_state_dict(torch.load(out + "/../host.pt"))

report = evaluate(host, root, corruptions="fog,impulse_noise", severities=(2, 5), limit=5, input_size=64)
report.to_json(f"{out}/evaluation-{rank}.json")

torch.manual_seed(99 * rank)  # what is put in differs, and is made the same
quac.inject(host, quac.PriorConfig(experts=["contrast", "pixelate"], site="stages"))
options = dict(input_size=64, views=1, draws=4, steps=8, check_every=2, batch_size=5, near_batch=5, severities=4)
options["logits_weight"] = 0.0  # of a random network: next to nothing, and so mostly rounding
report = quac.fit_prior(host, root, checkpoint=out + "/states", **options)
assert not torch.distributed.is_initialized()
report.to_json(f"{out}/fit-{rank}.json")
if rank == 0:
    quac.save_adapter(host, out + "/saved")
torch.save(quac.adapter_state(host), f"{out}/fit-{rank}.pt")

command = f"fit-prior test_resnet --data {root} --out {out}/adapter --corruptions contrast --steps 2"
command += f" --base-checkpoint {out}/../host.safetensors --num-classes 4 --input-size 64 --views 1 --draws 1"
app(f"{command} --json {out}/command.json --device cpu".split(), standalone_mode=False)


def note(name, function):
    try:
        function()
    except Exception as error:
        open(f"{out}/{name}-{rank}.txt", "w").write(f"{type(error).__name__}: {error}")


if "WORLD_SIZE" in os.environ:
    with process_group() as processes:
        numbers = torch.tensor([rank, 3.0])
        found = processes.average(numbers).tolist(), numbers.tolist(), processes.gather(rank)
        assert found == ([0.5, 3.0], [rank, 3.0], [0, 1])
        parameters = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
        parameters[0].grad = torch.full((2, 3), 2.0 + rank)
        if rank:
            parameters[2].grad = torch.ones(2, 3)
        processes.average_gradients(parameters)
        assert [p.grad if p.grad is None else p.grad.unique().tolist() for p in parameters] == [[2.5], None, [0.5]]
        note("raised", lambda: processes.of_main(lambda: 1 / 0))
    options["corruptions"] = "contrast"
    fresh = timm.create_model("test_resnet", num_classes=4)
    note("failed", lambda: quac.fit_prior(fresh, root if rank == 0 else "/none/there", **options))
    torch.manual_seed(rank)
    other = timm.create_model("test_resnet", num_classes=4)
    note("different", lambda: quac.fit_prior(other, root, **options))

if importlib.util.find_spec("diffusers"):
    sys.argv = ["train_restoration.py", "--data", root + "/class 0", "--config", out + "/../small.json"]
    sys.argv += ["--work", out + "/work", "--out", out + "/restorer"]
    sys.argv += ["--steps", "4", "--batch-size", "2", "--patch", "32"]
    sys.argv += ["--max-minutes", "60"] if "WORLD_SIZE" in os.environ else []  # one clock
    runpy.run_path(EXAMPLE, run_name="__main__")
"""
EXAMPLE = Path(__file__).parents[1] / "examples/train_restoration.py"
UNET = {
    "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False,
    "quac": {"where": "all", "quality": "brisque", "norm": "layer"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process leaves, what two leave, and what the two print."""
    folder = tmp_path_factory.mktemp("processes")
    root = folder / "photographs"
    numbers = np.random.default_rng(0)
    for index in range(6):
        path = root / f"class {index % 4}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(numbers.integers(0, 256, (8, 9, 3), dtype=np.uint8))
        coarse.resize((90, 80), Image.Resampling.BICUBIC).save(path)
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=4).state_dict()
    torch.save(state, folder / "host.pt")
    save_file(state, folder / "host.safetensors")
    (folder / "small.json").write_text(json.dumps(UNET))
    script = f"EXAMPLE = {str(EXAMPLE)!r}\n{SCRIPT}"
    (folder / "run.py").write_text(script)
    for name in ("one", "two"):
        (folder / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", str(root), str(folder / "one")])
        exec(script, {})
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py", str(root), "two"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *launch], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one", folder / "two", done.stdout


def test_two_processes_fit_what_one_does(folders, equal):
    """Each took half of every batch. The losses are those of the whole one, and so are the weights, up to rounding."""
    one, two = (quac.FitReport.from_json(folder / "fit-0.json") for folder in folders[:2])
    for stage in one.stages:
        for a, b in zip(one.stages[stage]["curve"], two.stages[stage]["curve"], strict=True):
            assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-5)
            assert a["loss"] == (b["loss"] and pytest.approx(b["loss"], rel=1e-5))
    states = [torch.load(folder / "fit-0.pt") for folder in folders[:2]]
    assert states[0].keys() == states[1].keys()
    assert all(torch.allclose(tensor, states[1][name], atol=1e-4) for name, tensor in states[0].items())
    assert equal(torch.load(folders[1] / "fit-1.pt"), states[1])
    assert quac.FitReport.from_json(folders[1] / "fit-1.json").stages == two.stages


def test_two_processes_judge_what_one_does(folders):
    reports = [
        EvaluationReport.from_json(folders[where] / f"evaluation-{rank}.json")
        for where, rank in ((0, 0), (1, 0), (1, 1))
    ]
    found = [{key: value for key, value in report.to_dict().items() if key != "seconds"} for report in reports]
    assert found[0] == found[1] == found[2]
    assert found[0]["clean"]["n"] == 5


def test_two_processes_train_what_one_does(folders):
    """The restorer of examples/train_restoration.py, of which each took half of every batch."""
    one, two = (load_file(f / "restorer/unet/diffusion_pytorch_model.safetensors") for f in folders[:2])
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_first_of_them_prints_and_writes(folders):
    _, two, told = folders
    assert told.count("prior after ") == 1
    assert len(list((two / "adapter").iterdir())) == 3
    assert (two / "command.json").is_file()
    assert not (two / "states").exists()


def test_an_error_of_one_ends_all_and_is_told(folders):
    names = ("failed", "raised", "different")
    told = [[(folders[1] / f"{name}-{rank}.txt").read_text() for rank in range(2)] for name in names]
    failed, raised, different = told
    assert failed[1].startswith("FileNotFoundError: there is no file or folder /none/there")
    assert failed[0] == f"RuntimeError: process 1 of 2 failed: {failed[1]}"
    assert raised == ["ZeroDivisionError: division by zero"] * 2
    assert all("hosts of different weights" in text for text in different)


def test_alone_nothing_is_exchanged():
    parameter = nn.Parameter(torch.ones(2))
    with process_group() as processes:
        assert processes is ALONE
        processes.average_gradients([parameter])
        processes.same([parameter])
        with pytest.raises(ZeroDivisionError):
            processes.of_main(lambda: 1 / 0)
    assert parameter.grad is None
    shares = [Processes(rank, 3).share(range(8)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(8))
