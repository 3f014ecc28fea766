"""What QuAC does, on one photograph: quality features of a clean, blurred, noisy and compressed copy, and how the
activations of a small network move with them; then a restoration pipeline on a degraded copy. Writes demo.png and
restoration.png; takes less than a minute on two CPU cores.

    python examples/demo.py [--image photo.jpg] [--out demo-output]

The network is small and starts from random weights with preserved activations; for a few seconds it learns, on crops of
other photographs, to tell the four kinds apart. Nothing tells its activations to use the quality: they learn to.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import skimage.data
import timm
import torch
from rich.console import Console
from rich.table import Table
from skimage.io import imread
from skimage.metrics import peak_signal_noise_ratio
from skimage.transform import resize
from torch import nn

import quac_plugins as quac
from quac_plugins.core.curves import activation_curves
from quac_plugins.degradations import corrupt
from quac_plugins.impairments import impair

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = {"clean": None, "blurred": "gaussian_blur", "noisy": "gaussian_noise", "compressed": "jpeg_compression"}
COLOURS = ["#222222", "#1f77b4", "#d62728", "#2ca02c"]
PIPELINE, IMPAIRED = "restoration_qacon.bsds", "rain"
SIZE = 224
CROP = 96


def copies(photograph: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """The four copies of a photograph (H, W, 3) uint8."""
    return [photograph if name is None else corrupt(photograph, name, 4, seed=seed) for name in KINDS.values()]


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def photograph(path: Path | None) -> np.ndarray:
    """The user's picture or the cat, as (224, 224, 3) uint8."""
    picture = imread(path) if path else skimage.data.chelsea()
    if picture.ndim == 2:
        picture = np.stack([picture] * 3, axis=-1)
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    picture = resize(picture[top : top + side, left : left + side, :3], (SIZE, SIZE), anti_aliasing=True)
    return (picture * 255).round().astype(np.uint8)


def learn(model: nn.Module, steps: int, seed: int = 0) -> float:
    """Teach a network to tell the kinds apart, on crops of other photographs; returns its accuracy at the end."""
    generator = np.random.default_rng(seed)
    sources = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket()]
    stock = [to_tensor(copies(source, seed=seed)) for source in sources]
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labels = torch.arange(4).repeat(4)
    right = 0.0
    model.train()
    for step in range(steps):
        crops = []
        for _ in range(4):
            source = stock[generator.integers(len(stock))]
            y, x = (int(generator.integers(size - CROP)) for size in source.shape[2:])
            crops.append(source[:, :, y : y + CROP, x : x + CROP])
        logits = model((torch.cat(crops) - mean) / std)
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps - 10:
            right += (logits.argmax(1) == labels).float().mean().item() / 10
    model.eval()
    return right


def curves_of(model: nn.Module, images: torch.Tensor, layer: str, x: torch.Tensor) -> torch.Tensor:
    """y(x) of every channel of a layer for every image: (B, C, len(x))."""
    return activation_curves(model, [layer], lambda: model(images), x)[layer]


def draw(path: Path, pictures: list[np.ndarray], q: torch.Tensor, curves: torch.Tensor, x: torch.Tensor, layer: str):
    """Pictures above, quality features in the middle, the shapes of three channels below."""
    figure = plt.figure(figsize=(13, 10.5), layout="constrained")
    grid = figure.add_gridspec(3, 12, height_ratios=[1.25, 1, 1.1])
    for i, (kind, picture) in enumerate(zip(KINDS, pictures, strict=True)):
        axes = figure.add_subplot(grid[0, 3 * i : 3 * i + 3])
        axes.imshow(picture)
        axes.set_title(kind, color=COLOURS[i], fontsize=13)
        axes.axis("off")
    axes = figure.add_subplot(grid[1, :])
    scale = q.abs().amax(dim=0).clamp(min=1e-9)
    for i, kind in enumerate(KINDS):
        axes.bar(np.arange(36) + 0.2 * i - 0.3, (q[i] / scale).numpy(), width=0.2, color=COLOURS[i], label=kind)
    axes.set(xlabel="feature", xlim=(-0.7, 35.7))
    axes.set_title("The 36 BRISQUE features, each divided by its largest", loc="left")  # beside the legend
    axes.axvline(17.5, color="#bbbbbb", lw=1)
    axes.legend(ncol=4, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9, frameon=False)
    spread = (curves.amax(dim=0) - curves.amin(dim=0)).amax(dim=-1)
    for place, channel in enumerate(spread.argsort(descending=True)[:3].tolist()):
        axes = figure.add_subplot(grid[2, 4 * place : 4 * place + 4])
        for i, kind in enumerate(KINDS):
            axes.plot(x.numpy(), curves[i, channel].numpy(), color=COLOURS[i], lw=2, label=kind)
        axes.set(title=f"{layer}, channel {channel}", xlabel="x", ylabel="y(x)")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def restore(picture: np.ndarray, path: Path) -> tuple[float, float]:
    """Degrade a photograph, restore it with the pipeline of the package, and draw both; PSNR in dB before and after."""
    from quac_plugins.diffusers import QuACRestorationPipeline
    from quac_plugins.evaluate.comparison_plot import draw_comparison

    pipe = QuACRestorationPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    degraded = impair(picture, IMPAIRED, 3, seed=0)
    restored = np.asarray(pipe(degraded).images[0])
    draw_comparison(path, pipe, to_tensor([degraded])[0], to_tensor([restored])[0])
    before, after = (peak_signal_noise_ratio(picture, one) for one in (degraded, restored))
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="a photograph; by default the cat of scikit-image")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    start, console = time.perf_counter(), Console()
    torch.manual_seed(0)

    pictures = copies(photograph(args.image))
    images = to_tensor(pictures)
    q = quac.brisque(images)
    table = Table(title="Quality features (BRISQUE, 5 of 36)")
    chosen = {"shape": 0, "variance": 1, "shape, horizontal": 2, "right variance": 5, "shape, half size": 18}
    for title in ("", *chosen):
        table.add_column(title, justify="right" if title else "left")
    for kind, row in zip(KINDS, q, strict=True):
        table.add_row(kind, *(f"{row[i]:.3f}" for i in chosen.values()))
    console.print(table)

    model = timm.create_model("test_resnet_qacon", num_classes=4)
    layer = quac.injection_of(model).sites[1].name
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    x = torch.linspace(-4, 4, 161)
    normalized = (images - mean) / std
    before = curves_of(model.eval(), normalized, layer, x)
    accuracy = learn(model, args.steps)
    curves = curves_of(model, normalized, layer, x)
    moved = curves - curves[:1]
    console.print(f"{args.steps} steps: the network tells the four kinds apart in {accuracy:.0%} of its last crops.")
    console.print(f"Layer {layer}: largest distance of an activation's curve from the one for the clean picture")
    table = Table()
    for title in ("", "before learning", "after"):
        table.add_column(title, justify="right" if title else "left")
    for i, kind in enumerate(KINDS):
        table.add_row(kind, f"{(before - before[:1])[i].abs().max():.4f}", f"{moved[i].abs().max():.4f}")
    console.print(table)

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "demo.png"
    draw(path, pictures, q, curves, x, layer)
    console.print(f"Wrote {path}")
    path = args.out / "restoration.png"
    before, after = restore(photograph(args.image), path)
    console.print(f"{IMPAIRED}, restored in one step by {PIPELINE}: {before:.1f} → {after:.1f} dB")
    console.print(f"Wrote {path} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
