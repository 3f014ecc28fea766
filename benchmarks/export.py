"""How far exported networks are from the model in PyTorch, on photographs of scikit-image.

    python benchmarks/export.py                        # resnet18_qacon, random weights
    python benchmarks/export.py --checkpoint F         # and mobilenetv2_100 with a routed prior on the weights F

F is mobilenetv2_100.tf2_in1k of timm. What is put in is moved at random, so that it is not the identity. The table is
written to benchmarks/results/export.{json,md}: the largest difference of a logit over the largest logit, on batches of
one, four and five photographs of 224×224 pixels, and for the old exporter of ONNX also of 161×225.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from skimage import data
from tables import write_tables

import quac_plugins as quac
from quac_plugins.deploy import FORMATS
from quac_plugins.evaluate.building import build_model
from quac_plugins.evaluate.preprocessing import data_config

OUT = Path(__file__).parent / "results" / "export"
SIZES = ((224, 224), (161, 225))
OLD = "onnx, old exporter"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    hosts = {"resnet18_qacon": {"pretrained": False}}
    if arguments.checkpoint is not None:
        options = {"pad_type": "same", "experts": ["fog", "gaussian_noise"]}
        hosts["mobilenetv2_100_ddp"] = {"base_checkpoint": arguments.checkpoint, "model_kwargs": options}
        hosts["mobilenetv2_100_ddp"] |= {"mean": 0.5, "std": 0.5}
    rows = []
    for name, options in hosts.items():
        torch.manual_seed(0)
        model = build_model(name, **options)
        with torch.no_grad():
            for tensor in filter(torch.is_floating_point, quac.adapter_state(model).values()):
                tensor.add_(torch.rand_like(tensor) * 0.02)
        for format in (OLD, "torchscript", "torch-export", "onnx"):
            started = time.time()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model"
                difference = old(model, file) if format == OLD else new(model, file, format)
                megabytes = file.stat().st_size / 1e6
            rows.append({"model": name, "format": format, "difference": difference, "megabytes": megabytes})
            print(rows[-1], f"{time.time() - started:.0f} s", flush=True)
            write(rows)


def photographs(model: torch.nn.Module, size: tuple[int, int]) -> torch.Tensor:
    config = data_config(model)
    pixels = [torch.from_numpy(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    resized = [F.interpolate(p.permute(2, 0, 1)[None] / 255, size, mode="bilinear", antialias=True) for p in pixels]
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (torch.cat(resized).clamp(0, 1) - mean) / std


def new(model: torch.nn.Module, file: Path, format: str) -> float:
    assert format in FORMATS
    return quac.export(model, file, format=format, example=photographs(model, SIZES[0])).difference


def old(model: torch.nn.Module, file: Path) -> float:
    axes = {"images": {0: "batch", 2: "height", 3: "width"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (photographs(model, SIZES[0])[:2],), str(file), dynamo=False, opset_version=18,
            dynamic_axes=axes, input_names=["images"],
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in (photographs(model, size)[:n] for size in SIZES for n in (1, 4)):
        with torch.no_grad():
            expected = model(images)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def write(rows: list[dict]) -> None:
    lines = ["| model | format | largest difference / largest logit | MB |", "|---|---|---|---|"]
    lines += [f"| {r['model']} | {r['format']} | {r['difference']:.1e} | {r['megabytes']:.1f} |" for r in rows]
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, on a CPU."
    write_tables(OUT, {"versions": versions, "rows": rows}, "\n".join([*lines, "", versions, ""]))


if __name__ == "__main__":
    main()
