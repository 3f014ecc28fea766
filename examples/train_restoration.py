"""Train a restoration pipeline on clean photographs that are degraded on the fly.

    python examples/train_restoration.py --data DIR/train --val DIR/val --out restorer                 # Q-ACON
    python examples/train_restoration.py --data DIR/train --val DIR/val --activation silu --out twin    # without
    torchrun --nproc-per-node 8 examples/train_restoration.py --config restoration_large --mixed-precision bf16 …

``restoration_large`` is meant for a large GPU, where it has not been run yet. Its 2,500 steps are 0.41 TFLOP each (13
GFLOP a patch), so that 0.7 TFLOP/s are enough for 25 minutes; two CPU cores, at 6 s a step, need four hours. With
``--max-minutes 24`` the training ends after the step in which they do, its learning rate having fallen in that time.
DIR/train holds photographs of any sizes, in folders or not; by default QUAC_DATA/bsds. ``--out`` becomes a pipeline
that ``QuACRestorationPipeline.from_pretrained`` and ``quac restore`` load. An interrupted run goes on from its last
checkpoint in --work. The three activations share the network, the pictures, their order and the number of steps.

The path from the degraded image y to the clean one x₀ is a straight line, x_t = x₀ + t (y − x₀), and the network learns
its velocity y − x₀ from x_t, t and the quality of y; what counts is the error of what is left of the degradation, t
times the velocity's. For the first part of the steps t is 1, where every restoration begins. A share of the pictures,
``--clean``, are not degraded, so that good ones are left alone. Several steps of the pipeline are taken near t = 1
(``--shift`` of its scheduler, s t / (1 + (s − 1) t)): at a lower t, what a step did not remove is taken for more of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import piq
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import quac_plugins as quac
from quac_plugins.diffusers import QuACRestorationPipeline, QuACUNet2DModel
from quac_plugins.images import read_image
from quac_plugins.impairments import IMPAIRMENTS, Impair, impair
from quac_plugins.processes import ALONE, Processes, default_device, process_group

ACTIVATIONS = ("qacon", "meta_acon", "silu")
SEVERITIES = (1, 3, 5)
STATE = "state.pt"  # in a folder of --work
KINDS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def photographs(folder: Path) -> list[np.ndarray]:
    """uint8 (H, W, 3)."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in KINDS)
    if not files:
        raise SystemExit(f"{folder} holds no photographs ({', '.join(sorted(KINDS))})")
    try:
        return [np.asarray(read_image(file, upright=True)) for file in files]
    except OSError as error:  # it names the file
        raise SystemExit(str(error)) from None


class Patches(Dataset[Any]):
    """Random crops, mirrored and turned, with a degraded copy; the draw is a function of the seed and of the index.

    q is that of the degraded patch, as at inference it is that of the degraded image.
    """

    def __init__(
        self,
        pictures: list[np.ndarray],
        side: int,
        count: int,
        seed: int,
        names: dict[str, float] | None = None,
        clean: float = 0.2,
    ):
        self.pictures, self.side, self.count, self.seed = pictures, side, count, seed
        self.names, self.clean = names, clean
        if small := [p.shape[:2] for p in pictures if min(p.shape[:2]) < side]:
            raise SystemExit(f"a photograph of {small[0]} pixels is smaller than --patch {side}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, index])
        picture = self.pictures[rng.integers(len(self.pictures))]
        top, left = (rng.integers(size - self.side + 1) for size in picture.shape[:2])
        clean = np.rot90(picture[top : top + self.side, left : left + self.side], rng.integers(4))
        clean = np.ascontiguousarray(clean[:, ::-1] if rng.random() < 0.5 else clean)
        degraded = Impair(self.names, clean=self.clean, mixed=0.3, seed=int(rng.integers(2**31)))(clean)
        return as_tensor(clean), as_tensor(degraded)


def as_tensor(image: np.ndarray) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255


def build(args: argparse.Namespace) -> Any:
    config = config_of(args.config)
    options = {key: value for key, value in config.items() if key not in ("_class_name", "quac")}
    if args.activation == "silu":
        unet = UNet2DModel(**options)
    else:
        unet = QuACUNet2DModel(**options, quac={**config.get("quac", {}), "activation": args.activation})
    torch.nn.init.zeros_(unet.conv_out.weight)  # at first every image is left alone
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


def config_of(name: str) -> dict[str, Any]:
    """A network's config, of the registry or in a file."""
    try:
        file = name if name.endswith(".json") else quac.registry_file(f"diffusers/{name}.json")
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not that of a network")
    except (OSError, ValueError) as error:
        raise SystemExit(f"--config {name}: {error}") from None
    return config


def loss_of(unet: Any, clean: Tensor, degraded: Tensor, quality: Any, times: Tensor, loss: str = "rmse") -> Tensor:
    """Of each picture's mean square error in the scale [−1, 1], averaged: its root, or with ``"psnr"`` its logarithm.

    A mean square error would be that of dark and hazy pictures alone, and with an absolute one the network changes
    nothing for long: under so many degradations the median change of a pixel is none. The logarithm weighs every
    picture alike, as PSNR does; before the degradations are told apart, the network learns nothing from it either.
    """
    t = times[:, None, None, None]
    velocity = 2 * (degraded - clean)
    q = quality(degraded)
    sample = 2 * clean - 1 + t * velocity
    predicted = unet(sample, 1000 * times, return_dict=False, **({} if q is None else {"q": q}))[0]
    error = (t * (predicted.float() - velocity)).square().mean((1, 2, 3))
    # 1e-3 is 36 dB, 4e-4 is 40 dB: below, a picture that is almost as it was would count for all the others
    return (error + 1e-3).sqrt().mean() if loss == "rmse" else (error + 4e-4).log().mean() / 2


def draw_times(count: int, part: float, shift: float, generator: torch.Generator) -> Tensor:
    """t (count,) after a part of the steps: at first where restorations begin, later half of them on the way.

    Those are drawn as the scheduler takes them (Esser et al., ICML 2024, eq. 23): no step is spent where none is taken.
    """
    uniform, first = torch.rand(2, count, generator=generator)
    shifted = shift * uniform / (1 + (shift - 1) * uniform)
    return torch.where((first < 0.5) | (part < 0.6), torch.ones(count), shifted.clamp(min=0.02))


class Progress:
    """The part that is done of a training's steps or of its minutes, whichever is further; alike on every process.

    The minutes are those of the main process since it began (its imports apart), with those of the runs it goes on
    from.
    """

    def __init__(self, steps: int, minutes: float | None, started: float, processes: Processes = ALONE):
        self.steps, self.minutes, self.started, self.processes = steps, minutes, started, processes
        self.step, self.time = 0, 0.0

    def seconds(self) -> float:
        """Since the training began."""
        return time.perf_counter() - self.started

    def __call__(self, step: int) -> None:
        """Before the step, counted from 0."""
        self.step = step
        if self.minutes is not None:
            self.time = self.processes.of_main(self.seconds) / (60 * self.minutes)

    @property
    def part(self) -> float:
        """From 0 to 1."""
        return min(max(self.step / self.steps, self.time), 1.0)

    def rate(self, warm_up: int = 100) -> float:
        """Of the learning rate: up a line, for 5 % of the minutes at most, then down half a cosine to nothing."""
        up = max(self.step / warm_up, self.time / 0.05)
        if up < 1:
            return up
        left = max((self.step - warm_up) / max(1, self.steps - warm_up), (self.time - 0.05) / 0.95, 0.0)
        return 0.5 * (1.0 + math.cos(math.pi * min(left, 1.0)))

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Count the time before the checkpoint too."""
        self.started -= state["seconds"]


def train(args: argparse.Namespace, processes: Processes, device: torch.device, started: float) -> tuple[Any, EMAModel]:
    """The pipeline, and the average of its weights."""
    torch.manual_seed(args.seed)
    tell = print if processes.rank == 0 else lambda *_, **__: None
    unet = build(args)
    if args.start is not None:
        unet.load_state_dict(type(unet).from_pretrained(args.start / "unet").state_dict())
    unet.to(device)
    pipe = QuACRestorationPipeline(unet, FlowMatchEulerDiscreteScheduler(shift=args.shift))
    progress = Progress(args.steps, args.max_minutes, started, processes)
    count = args.steps * args.batch_size
    patches = Patches(photographs(args.data), args.patch, count, args.seed, args.degradations, args.clean)
    ema = EMAModel(unet.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    mixed = {"dtype": torch.float16 if scaler.is_enabled() else torch.bfloat16, "enabled": args.mixed_precision != "no"}
    kept = {"unet": unet, "ema": ema, "progress": progress, "optimizer": optimizer, "scaler": scaler}
    network = torch.compile(unet) if args.compile else unet
    first = resume(args, kept)
    ema.to(device)
    # of each batch every process takes its part, as one process has them all
    parts = np.split(np.arange(args.batch_size), processes.world_size)[processes.rank]
    batches = ((step * args.batch_size + parts).tolist() for step in range(first, args.steps))
    loader = DataLoader(patches, batch_sampler=batches, num_workers=args.num_workers)
    began, total, done = time.perf_counter(), torch.zeros((), device=device), first
    for step, (clean, degraded) in enumerate(loader, first):
        progress(step)
        if progress.part == 1:
            break
        clean, degraded = clean.to(device), degraded.to(device)
        generator = torch.Generator().manual_seed(step + 1000003 * args.seed)
        part = 1.0 if args.start is not None else progress.part
        times = draw_times(args.batch_size, part, args.shift, generator)[parts].to(clean)
        with torch.autocast(device.type, **mixed):
            loss = loss_of(network, clean, degraded, pipe.quality_of, times, args.loss)
        scaler.scale(loss).backward()
        processes.average_gradients(parameters)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * progress.rate()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ema.step(parameters)
        total += loss.detach()  # read now and then, since a GPU would be waited for
        done = step + 1
        log, keep = done % args.log_every == 0, done % args.checkpoint_every == 0 or done == args.steps
        judge = args.val is not None and done % args.validate_every == 0
        mean = check(processes, total) if log or keep or judge else math.nan
        if log:
            speed = (done - first) / (time.perf_counter() - began)
            tell(f"step {done}: loss {mean / args.log_every:.4f}, {speed:.2f} steps/s", file=sys.stderr)
            total.zero_()
        if keep and processes.rank == 0:
            save(args, kept, done)
        if judge and processes.rank == 0:
            ema.store(parameters)
            ema.copy_to(parameters)
            unet.eval()
            validate(args, pipe, done)
            ema.restore(parameters)
            unet.train()
    if done == 0:
        raise SystemExit(f"no step could be taken in --max-minutes {args.max_minutes:g}: the start took longer")
    if done < args.steps:
        tell(f"step {done} of {args.steps}: --max-minutes {args.max_minutes:g} are over", file=sys.stderr)
        check(processes, total)
        if done > first and not keep and processes.rank == 0:
            save(args, kept, done)
    return pipe, ema


def check(processes: Processes, total: Tensor) -> float:
    """The mean over all processes."""
    mean = float(processes.average(total))
    if not math.isfinite(mean):
        raise SystemExit("the loss is not finite: take a smaller --lr")
    return mean


def save(args: argparse.Namespace, kept: dict[str, Any], done: int) -> None:
    """Beside, then renamed: a folder that is there is whole."""
    folder = args.work / f"step-{done}"
    part = folder.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    torch.save({name: holder.state_dict() for name, holder in kept.items()}, part / STATE)
    (part / "args.json").write_text(json.dumps(fixed(args)), encoding="utf-8")
    os.replace(part, folder)
    for old in args.work.glob("step-*"):
        if old.suffix != ".part" and old.is_dir() and int(old.name.partition("-")[2]) < done:
            shutil.rmtree(old)


def fixed(args: argparse.Namespace) -> dict[str, Any]:
    """What a run that goes on must share with the one it goes on from."""
    config = config_of(args.config)
    start = None if args.start is None else args.start.name
    names = ("activation", "steps", "max_minutes", "batch_size", "patch", "lr", "loss", "seed", "ema_decay", "shift")
    chosen = {name: getattr(args, name) for name in (*names, "degradations", "clean")}
    return {"data": args.data.name, "config": config, "start": start, **chosen}


def resume(args: argparse.Namespace, kept: dict[str, Any]) -> int:
    """The number of steps that were done."""
    folders = [f for f in args.work.glob("step-*") if f.is_dir() and f.suffix != ".part"]
    if not folders:
        return 0
    latest = max(folders, key=lambda folder: int(folder.name.partition("-")[2]))
    was = json.loads((latest / "args.json").read_text(encoding="utf-8"))
    if was != (now := fixed(args)) or not (latest / STATE).is_file():
        differ = [f"--{key.replace('_', '-')} was {was[key]!r}" for key in was if key in now and was[key] != now[key]]
        reason = ", ".join(differ) or "made by another version of this script"
        raise SystemExit(f"{latest} is of another run: {reason}; give another --work")
    states = torch.load(latest / STATE, map_location="cpu", weights_only=True)
    for name, holder in kept.items():
        holder.load_state_dict(states[name])
    return int(latest.name.partition("-")[2])


# -- judging


@torch.no_grad()
def scores(
    pipe: Any, pictures: list[np.ndarray], steps: int, severities: tuple[int, ...] = SEVERITIES
) -> dict[str, Any]:
    """PSNR, SSIM and HaarPSI (Reisenhofer et al., 2018, a perceptual score) before and after, by degradation."""
    pipe.set_progress_bar_config(disable=True)
    conditions: list[tuple[str, int]] = [("clean", 0), *((name, s) for name in IMPAIRMENTS for s in severities)]
    result = {}
    for name, severity in conditions:
        rows = []
        for index, picture in enumerate(pictures):
            degraded = picture if name == "clean" else impair(picture, name, severity, seed=index)
            restored = pipe(degraded, num_inference_steps=steps, output_type="pt").images
            clean = as_tensor(picture)[None]
            rows.append([values(as_tensor(degraded)[None], clean), values(restored, clean)])
        before, after = np.mean(rows, axis=0)
        result[f"{name}-{severity}" if severity else name] = {
            key: [round(float(b), 4), round(float(a), 4)]
            for key, b, a in zip(("psnr", "ssim", "haarpsi"), before, after, strict=True)
        }
    return result


def middle(picture: np.ndarray, side: int) -> np.ndarray:
    top, left = (max(size - side, 0) // 2 for size in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def values(image: Tensor, clean: Tensor) -> list[float]:
    image = (image * 255).round() / 255  # as it is saved
    psnr = min(float(piq.psnr(image, clean, data_range=1.0)), 60.0)  # of the clean picture itself it is infinite
    return [psnr, float(piq.ssim(image, clean, data_range=1.0)), float(piq.haarpsi(image, clean, data_range=1.0))]


def validate(args: argparse.Namespace, pipe: Any, done: int) -> None:
    """Scores at severity 3 and a picture of what is restored."""
    pictures = photographs(args.val)[: args.val_limit]
    result = scores(pipe, pictures, 1, (3,))
    print(
        f"step {done}: " + ", ".join(f"{n} {v['psnr'][0]:.1f}→{v['psnr'][1]:.1f}" for n, v in result.items()),
        file=sys.stderr,
    )
    rows = []
    for name in IMPAIRMENTS:
        degraded = impair(pictures[0], name, 3, seed=0)
        restored = np.asarray(pipe(degraded).images[0])
        rows.append(np.concatenate([pictures[0], degraded, restored], axis=1))
    args.work.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(args.work / f"step-{done}.png")


def weighted(text: str) -> dict[str, float]:
    """``"jpeg=3,noise"``: name → weight."""
    try:
        weights = {name: float(weight or 1) for name, _, weight in (part.partition("=") for part in text.split(","))}
        Impair(weights)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return weights


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text!r}")
        return int(text)

    return number


def main() -> None:
    started = time.perf_counter()
    data = Path(os.environ.get("QUAC_DATA", "data")) / "bsds"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data / "train", help="folder of clean photographs")
    parser.add_argument("--val", type=Path, default=data / "val" if (data / "val").is_dir() else None)
    parser.add_argument("--config", default="restoration_small", help="of registry/diffusers, or a .json file")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="qacon")
    parser.add_argument(
        "--start", type=Path, help="go on from the weights of this pipeline, with other --lr, --patch, …"
    )
    parser.add_argument("--steps", type=whole(1), default=2500)
    parser.add_argument(
        "--max-minutes", type=float, help="end after the step in which they do: the learning rate falls with the time"
    )
    parser.add_argument(
        "--batch-size", type=whole(1), default=32, help="over all processes; many, of many degradations"
    )
    parser.add_argument("--patch", type=whole(16), default=32)
    parser.add_argument(
        "--degradations", type=weighted, help="NAME or NAME=WEIGHT, comma-separated: how often each is drawn"
    )
    parser.add_argument("--clean", type=float, default=0.2, help="share of the patches that are left as they are")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--loss", choices=("rmse", "psnr"), default="rmse", help="psnr: to go on with, after --start")
    parser.add_argument("--ema-decay", type=float, default=0.995)
    parser.add_argument("--shift", type=float, default=64.0, help="of the pipeline's scheduler, for several steps")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, for GPUs and --activation silu")
    parser.add_argument("--num-workers", type=whole(0), default=0)
    parser.add_argument("--log-every", type=whole(1), default=50)
    parser.add_argument("--checkpoint-every", type=whole(1), default=250)
    parser.add_argument("--validate-every", type=whole(1), default=500)
    parser.add_argument("--val-limit", type=whole(1), default=4, help="photographs that are restored while training")
    parser.add_argument("--work", type=Path, help="checkpoints and validation pictures; default: OUT-work")
    parser.add_argument("--out", type=Path, default=Path("restorer"), help="the pipeline")
    parser.add_argument("--scores", type=Path, help="JSON of scores on --val: one step, and ten at severity 3")
    parser.add_argument(
        "--score-crop", type=whole(16), default=192, help="side of the middle of each picture that is judged"
    )
    parser.add_argument("--store-fp16", action="store_true", help="round the weights to float16: half the file")
    args = parser.parse_args()
    args.work = args.work or args.out.with_name(f"{args.out.name}-work")
    if args.scores is not None and args.val is None:
        parser.error("--scores needs --val")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr must be above 0, got {args.lr}")
    if not 0 <= args.ema_decay < 1:
        parser.error(f"--ema-decay must be from 0 to 1, got {args.ema_decay}")
    levels = len(config_of(args.config).get("block_out_channels", (224, 448, 672, 896)))  # as UNet2DModel's
    if args.patch % (multiple := 2 ** (levels - 1)):
        parser.error(f"--patch must be a multiple of {multiple} for --config {args.config}, got {args.patch}")
    if args.start is not None and not (args.start / "unet" / "config.json").is_file():
        parser.error(f"--start {args.start} is no folder of a saved pipeline")
    if not 0 <= args.clean <= 1:
        parser.error(f"--clean must be a share from 0 to 1, got {args.clean}")
    if not 0 < args.shift < math.inf:
        parser.error(f"--shift must be above 0, got {args.shift}")
    if args.max_minutes is not None and not 0 < args.max_minutes < math.inf:
        parser.error(f"--max-minutes must be above 0, got {args.max_minutes}")
    device = torch.device(default_device())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(nccl=True) as processes:
        if args.batch_size % processes.world_size:
            parser.error(f"--batch-size must be a multiple of the {processes.world_size} processes")
        if args.val is not None and processes.rank == 0:
            photographs(args.val)  # what cannot be read is said before the work, not after it
        pipe, ema = train(args, processes, device, started)
    if processes.rank == 0:
        finish(args, pipe, ema)


def finish(args: argparse.Namespace, pipe: Any, ema: EMAModel) -> None:
    """Write the pipeline and its scores."""
    ema.copy_to(pipe.unet.eval().parameters())
    if args.store_fp16:
        pipe.unet.half()
    pipe.save_pretrained(args.out)
    if args.scores is not None and args.val is not None:
        pipe.unet.float()  # as it is loaded
        pictures = [middle(picture, args.score_crop) for picture in photographs(args.val)]
        results = {"1 steps": scores(pipe, pictures, 1), "10 steps": scores(pipe, pictures, 10, (3,))}
        results = {"args": fixed(args), **results}
        args.scores.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
