"""Train the quality function `degradation`, by which routed priors choose, on real photographs.

    python examples/train_degradation.py --data DIR              # judged on photographs left out; the table
    python examples/train_degradation.py --data DIR --publish    # and then trained on all and written into the package

DIR holds imagenet_sample/*/*.jpg, bsds/{train,val}/*.jpg and camvid/{train,val}/*.jpg; by default QUAC_DATA.
scikit-image's photographs are taken too. Each photograph is cut and resized (112 to 512 pixels, as networks take
them, and a fifth of them smaller), mirrored half of the time and degraded by each of the 15 corruptions at random
severities; some are then stored as JPEG, as pictures are. Clean pictures are also those that a JPEG of quality 50 to 98
holds. Only the features are kept (--work), so that the training itself takes minutes.

The photographs of ImageNet are judged by networks that have seen none of the same photograph (--folds). The bias of
"clean" is raised so far that most clean pictures of photographs left out are taken for clean; a fit raises the identity
further where its experts allow that.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
from collections.abc import Iterator
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from quac_plugins.core.quality import degradation as shipped
from quac_plugins.core.quality.degradation import CLEAN, KINDS, MOST_SEVERE, described, network
from quac_plugins.core.quality.detail import CHANNELS
from quac_plugins.degradations import corrupt, image_seed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SIDES = (112, 512)
SMALL = (32, 112)
ENLARGED = 1.3  # at most, since hosts enlarge small photographs
ROUNDS = 5  # pictures of each photograph and corruption
_WHOLE, _SMALL = (2, 3), (4,)  # rounds of whole photographs, and of small cuts
CLEAN_PICTURES = 4  # of each photograph and round, without a corruption
FEATURES = 47 + CHANNELS
WIDTH, EPOCHS, RATE, DROPOUT, NOISE = 128, 60, 2e-3, 0.1, 0.1
CLEAN_KEPT = 0.92  # share of clean pictures of photographs left out that are to be taken for clean


# -- pictures


def photographs(data: Path) -> list[tuple[str, Path]]:
    """(name, file), those of ImageNet first."""
    paths = sorted((data / "imagenet_sample").glob("*/*.jpg"))
    paths += sorted((data / "bsds").glob("*/*.jpg"))
    paths += sorted((data / "camvid").glob("train/*.*"))[::3]  # neighbours in a film are alike
    paths += sorted((data / "camvid").glob("val/*.*"))[::3]
    from skimage import data as of_skimage

    folder = Path(of_skimage.__file__).parent
    paths += [p for p in sorted(folder.glob("*")) if p.stem in ("astronaut", "chelsea", "coffee", "rocket")]
    return [(str(path.relative_to(data) if data in path.parents else path.name), path) for path in paths]


def is_judged(name: str) -> bool:
    """Whether a photograph is one of ImageNet's, on which the table is made."""
    return name.startswith("imagenet_sample")


def whole(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The middle of a photograph as an evaluation sees it: often as it is, else made smaller."""
    native = min(image.size)
    side = min(native, SIDES[1]) if rng.random() < 0.7 else round(float(rng.uniform(SIDES[0], min(native, SIDES[1]))))
    if side < native or image.width != image.height:
        box = ((image.width - native) / 2, (image.height - native) / 2)
        box += (box[0] + native, box[1] + native)
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)


def cut(image: Image.Image, rng: np.random.Generator, sides: tuple[int, int] = SIDES) -> np.ndarray:
    """A part of a photograph at a size that networks take."""
    least, most = sides[0], min(sides[1], min(image.size) * ENLARGED)
    aspect = 1.0 if rng.random() < 0.7 else float(np.exp(rng.uniform(-0.3, 0.3)))
    side = float(np.exp(rng.uniform(np.log(least), np.log(most))))
    height, width = round(side), round(side * aspect)
    largest = min(image.height / height, image.width / width)  # pixels of the photograph for one of the picture
    unit = float(np.exp(rng.uniform(np.log(min(1 / ENLARGED, largest)), np.log(largest))))
    box = (min(width * unit, image.width), min(height * unit, image.height))
    left, top = rng.random() * (image.width - box[0]), rng.random() * (image.height - box[1])
    way = Image.Resampling.BICUBIC if rng.random() < 0.7 else Image.Resampling.BILINEAR
    part = image.resize((width, height), way, box=(left, top, left + box[0], top + box[1]))
    pixels = np.asarray(part)
    return np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def pictures_of(name: str, path: Path, round_: int) -> Iterator[tuple[np.ndarray, int, int, bool]]:
    """(pixels, kind, severity, stored as JPEG) of one photograph."""
    image = Image.open(path).convert("RGB")
    rng = np.random.default_rng(image_seed(round_, "train", 0, name))
    view = whole if round_ in _WHOLE else partial(cut, sides=SMALL) if round_ in _SMALL else cut
    for _ in range(CLEAN_PICTURES):
        pixels, stored = view(image, rng), bool(rng.random() < 0.5)
        yield as_jpeg(pixels, int(rng.integers(50, 99))) if stored else pixels, 0, 0, stored
    for kind, corruption in enumerate(KINDS[1:], 1):
        severity = int(rng.integers(1, 6))
        pixels = corrupt(view(image, rng), corruption, severity, image_seed(round_, corruption, severity, name))
        stored = bool(rng.random() < 0.3)
        yield as_jpeg(pixels, int(rng.integers(70, 99))) if stored else pixels, kind, severity, stored


def features_of(task: tuple[int, str, Path, int]) -> np.ndarray:
    """Rows of the features, photograph, kind, severity, JPEG and side."""
    index, name, path, round_ = task
    torch.set_num_threads(1)
    rows = []
    for pixels, kind, severity, stored in pictures_of(name, path, round_):
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        rows.append([*described(image)[0].tolist(), index, kind, severity, stored, min(pixels.shape[:2])])
    return np.array(rows, np.float32)


def features(args: argparse.Namespace, known: list[tuple[str, Path]]) -> np.ndarray:
    """The rows of all pictures, made once."""
    parts = []
    for round_ in range(ROUNDS):
        kept = args.work / f"features-{round_}.npy"
        if not kept.exists():
            tasks = [(index, name, path, round_) for index, (name, path) in enumerate(known)]
            with Pool(args.workers) as pool:
                rows = np.concatenate(list(pool.imap(features_of, tasks, chunksize=4)))
            np.save(kept.with_suffix(".part.npy"), rows)
            os.replace(kept.with_suffix(".part.npy"), kept)
        parts.append(np.load(kept))
    return np.concatenate(parts)


# -- training


def train(rows: np.ndarray, seed: int) -> dict[str, Tensor]:
    """Weights of a network that was fitted on rows."""
    torch.manual_seed(seed)
    q, kind, severity = (
        torch.from_numpy(rows[:, :FEATURES]),
        torch.from_numpy(rows[:, FEATURES + 1]).long(),
        torch.from_numpy(rows[:, FEATURES + 2]),
    )
    sizes = [FEATURES, WIDTH, WIDTH, len(KINDS) + 1]
    weights = {"mean": q.mean(0), "std": q.std(0).clamp(min=1e-4)}
    for layer, (before, after) in enumerate(itertools.pairwise(sizes), 1):
        linear = torch.nn.Linear(before, after)
        weights |= {f"fc{layer}.weight": linear.weight.detach(), f"fc{layer}.bias": linear.bias.detach()}
    learned = [tensor.requires_grad_() for name, tensor in weights.items() if name.startswith("fc")]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.02)
    batches = len(q) // 256
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        order = torch.randperm(len(q))
        for batch in order[: batches * 256].split(256):
            noisy = q[batch] + NOISE * torch.randn(len(batch), FEATURES) * weights["std"]
            with _dropped(weights) as thinned:
                outputs = network(noisy, thinned)
            loss = F.cross_entropy(outputs[:, :-1], kind[batch], label_smoothing=0.02)
            loss = loss + 0.1 * F.smooth_l1_loss(outputs[:, -1], severity[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {name: tensor.detach() for name, tensor in weights.items()}


class _dropped:
    """Weights whose hidden units are dropped at random: a column of the next layer stands for a unit."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = dict(weights)

    def __enter__(self) -> dict[str, Tensor]:
        for layer in ("fc2.weight", "fc3.weight"):
            columns = self.weights[layer].shape[1]
            self.weights[layer] = self.weights[layer] * (torch.rand(columns) > DROPOUT) / (1 - DROPOUT)
        return self.weights

    def __exit__(self, *error: object) -> None:
        """Nothing to undo: the weights themselves were left alone."""


def logits(rows: np.ndarray, weights: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return network(torch.from_numpy(rows[:, :FEATURES]), weights)


def clean_lead(rows: np.ndarray, outputs: Tensor) -> float:
    """What the logit of clean must be raised by, so that the wanted share of clean pictures keeps it."""
    of_clean = outputs[torch.from_numpy(rows[:, FEATURES + 1] == 0), :-1]
    lead = of_clean[:, 1:].max(dim=1).values - of_clean[:, 0]
    return max(0.0, float(lead.quantile(CLEAN_KEPT)))


# -- what comes out


def report(rows: np.ndarray, outputs: Tensor) -> dict[str, Any]:
    """For each kind and severity how often which answer was given, and the mean error of the severity."""
    answers = outputs[:, :-1].argmax(1).numpy()
    severity = outputs[:, -1].clamp(0, MOST_SEVERE).numpy()
    answered: dict[str, Any] = {}
    for index, kind in enumerate(KINDS):
        for level in sorted({int(s) for s in rows[rows[:, FEATURES + 1] == index, FEATURES + 2]}):
            chosen = (rows[:, FEATURES + 1] == index) & (rows[:, FEATURES + 2] == level)
            counts = np.bincount(answers[chosen], minlength=len(KINDS))
            answered.setdefault(kind, {})[str(level)] = {
                "n": int(chosen.sum()),
                "right": round(100 * counts[index] / chosen.sum(), 1),
                "answers": {KINDS[i]: int(n) for i, n in enumerate(counts) if n},
                "severity_error": round(float(np.abs(severity[chosen] - level).mean()), 2),
            }
    return answered


def markdown(shares: dict[str, Any], settings: str) -> str:
    lines = [
        "# The quality function `degradation`",
        "",
        f"`python examples/train_degradation.py --data DIR`: {settings}",
        "",
        "| kind | " + " | ".join(f"severity {level}" for level in range(1, 6)) + " | most often taken for |",
        "|---|" + "---|" * 6,
    ]
    for kind, levels in shares.items():
        wrong: dict[str, int] = {}
        for entry in levels.values():
            for answer, n in entry["answers"].items():
                wrong[answer] = wrong.get(answer, 0) + n * (answer != kind)
        total = sum(entry["n"] for entry in levels.values())
        confusions = [f"{a} {100 * n / total:.0f}" for a, n in sorted(wrong.items(), key=lambda i: -i[1])[:2] if n]
        cells = [f"{levels[str(level)]['right']:.1f}" if str(level) in levels else "" for level in range(1, 6)]
        if kind == CLEAN:
            cells = [f"{levels['0']['right']:.1f} (not degraded)", "", "", "", ""]
        lines.append(f"| {kind} | {' | '.join(cells)} | {', '.join(confusions)} |")
    degraded = {k: v for k, v in shares.items() if k != CLEAN}
    means = [np.mean([v[str(level)]["right"] for v in degraded.values()]) for level in range(1, 6)]
    lines.append(f"| mean of the 15 | {' | '.join(f'{mean:.1f}' for mean in means)} | |")
    errors = [np.mean([v[str(level)]["severity_error"] for v in degraded.values()]) for level in range(1, 6)]
    lines.append(f"| mean error of the severity | {' | '.join(f'{error:.2f}' for error in errors)} | |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("QUAC_DATA"), help="default: QUAC_DATA")
    parser.add_argument("--work", type=Path, default=Path("degradation-work"), help="features and networks, kept")
    parser.add_argument(
        "--folds", type=int, default=4, help="parts of ImageNet's photographs that are left out in turn"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--publish", action="store_true", help="write the weights into the package, the table beside")
    args = parser.parse_args()
    if args.data is None or not (Path(args.data) / "imagenet_sample").is_dir():
        parser.error(f"--data {args.data}: no folder imagenet_sample in it")
    args.data = Path(args.data)
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = parse()
    known = photographs(args.data)
    judged = np.array([is_judged(name) for name, _ in known])
    rows = features(args, known)
    photograph = rows[:, FEATURES].astype(int)
    # neighbours in the list may be of one class
    fold = np.where(judged, np.random.default_rng(args.seed).permutation(len(known)) % args.folds, -1)[photograph]
    outputs = torch.empty(len(rows), len(KINDS) + 1)
    for part in range(args.folds):
        kept = args.work / f"fold-{part}.safetensors"
        if not kept.exists():
            save_file(train(rows[fold != part], args.seed), kept)
        weights = load_file(kept)
        outputs[torch.from_numpy(fold == part)] = logits(rows[fold == part], weights)
    left_out = fold >= 0
    raised = clean_lead(rows[left_out], outputs[torch.from_numpy(left_out)])
    outputs[:, 0] += raised
    shares = report(rows[left_out], outputs[torch.from_numpy(left_out)])
    (args.work / "folds.json").write_text(
        json.dumps({"raised": raised, "names": [n for n, _ in known], "fold": _of_photographs(photograph, fold)})
    )
    settings = (
        f"{len(rows)} pictures of {len(known)} photographs, sides of {SIDES[0]} to {SIDES[1]} pixels, "
        f"and a fifth of {SMALL[0]} to {SMALL[1]}. Share of the "
        f"pictures of {int(judged.sum())} ImageNet photographs, in percent, that are told for what they are; judged by "
        f"{args.folds} networks, none of which has seen the photograph, seed {args.seed}. The logit of clean is raised "
        f"by {raised:.2f}; the network in the package was trained on all."
    )
    text = markdown(shares, settings)
    print(text)
    if args.publish:
        weights = train(rows, args.seed)
        weights["fc3.bias"][0] += raised
        save_file(weights, Path(shipped.__file__).with_suffix(".safetensors"), metadata={"kinds": ",".join(KINDS)})
        (RESULTS / "degradation.md").write_text(text)
        (RESULTS / "degradation.json").write_text(json.dumps(shares, indent=1) + "\n")


def _of_photographs(photograph: np.ndarray, fold: np.ndarray) -> list[int]:
    parts = np.full(photograph.max() + 1, -1)
    parts[photograph] = fold
    return parts.tolist()


if __name__ == "__main__":
    main()
