"""What both fits need: pictures as the host takes them, the untouched host as teacher, processes that share work."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quac_plugins.core.inject.adapter import adapter_state, is_fresh, load_adapter_state
from quac_plugins.core.inject.fingerprint import fingerprint
from quac_plugins.core.inject.images import SETTINGS, Images
from quac_plugins.core.inject.surgery import Injection, injection_of, remove, unwrap
from quac_plugins.core.inject.trace import Trace, trace
from quac_plugins.core.options import QualityOptions, whole_number
from quac_plugins.core.parts import tensor_names
from quac_plugins.core.prior.comparison import Pictures
from quac_plugins.core.prior.recipe import Recipe
from quac_plugins.core.prior.sites import PriorSite, find_prior_sites
from quac_plugins.core.prior.training import Fit, Share
from quac_plugins.degradations import check_severity, corruption_names
from quac_plugins.evaluate.preprocessing import Crop, check_tap, data_config, is_bgr, taps_of
from quac_plugins.evaluate.processes import is_main_process, process_group
from quac_plugins.fit.checkpoint import Checkpoints
from quac_plugins.fit.draws import Degrade, Draws, held_out, make_draws, own_degradations
from quac_plugins.fit.report import FitReport
from quac_plugins.fit.settings import number_from
from quac_plugins.fit.sources import few_images
from quac_plugins.fit.start import colour_images

T = TypeVar("T")
_START = "start"  # the stage whose state is what a fit began with


@dataclass
class Data:
    """Where the pictures of a fit come from, and how many are drawn; see :func:`quac_plugins.fit_prior`."""

    images: Any = None
    pairs: Any = None
    degrade: Degrade | None = None
    corruptions: str | Sequence[str] | None = None
    severity: int | Sequence[int] = 3
    limit: int | None = None
    views: int | None = None
    draws: int | None = None
    clean_share: float | None = None
    held_out: float = 0.2
    seed: int = 0
    num_workers: int = 0
    mean: Any = None
    std: Any = None
    input_size: Any = None
    crop_pct: float | None = None
    interpolation: str | None = None


class Session:
    """One call of a fit: reads the pictures once, lends teacher and student out, and puts the model back as it was.

    Args:
        model: what is fitted; unwrapped.
        data: the pictures.
        device: where to fit; None: where the model is.
        pictures: how many degraded ones a fit aims at.
        planned: the config of what is fitted.
        most_views: of an image, unless the user says how many.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        device: str | torch.device | None,
        pictures: int,
        planned: QualityOptions,
        most_views: int = 12,
    ):
        self.model, self.data = model, data
        for what, value in (("views", data.views), ("draws", data.draws), ("limit", data.limit)):
            if value is not None:
                whole_number(what, value)
        for what, value in (("seed", data.seed), ("num_workers", data.num_workers)):
            whole_number(what, value, 0)
        if not number_from(0, data.held_out) or not 0 < data.held_out < 1:
            raise ValueError(f"held_out must be above 0 and below 1, got {data.held_out!r}")
        if data.clean_share is not None and not (number_from(0, data.clean_share) and data.clean_share < 1):
            raise ValueError(f"clean_share must be at least 0 and below 1, got {data.clean_share!r}")
        if data.pairs is not None and (data.corruptions is not None or data.degrade is not None):
            raise ValueError("give either pairs, which are degraded already, or corruptions and degrade, not both")
        self.own = own_degradations(data.degrade)
        by_default = "all" if data.pairs is None and not self.own else ()
        names = corruption_names(by_default if data.corruptions is None else data.corruptions)
        self.kinds = [*names, *self.own] or ["pairs"]
        if data.pairs is None and not (names or self.own):
            raise ValueError("no corruptions to fit on: give names, such as corruptions=['fog'], or degrade, or pairs")
        levels = list(data.severity) if isinstance(data.severity, Iterable) else [data.severity]
        self.names, self.severities = names, [check_severity(level) for level in levels] if names else []
        mean, std = data.mean, data.std
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together; give both or neither")
        if mean is None and std is None:  # what is to be put in may know the images of its host
            mean, std = planned.mean, planned.std
        self.config = data_config(
            model,
            mean=mean,
            std=std,
            input_size=data.input_size,
            crop_pct=data.crop_pct,
            interpolation=data.interpolation,
        )
        self.home = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.device = self.home if device is None else torch.device(device)
        self.crop = Crop(self.config, keep_ready=data.crop_pct is None)
        self.size: tuple[int, int] = tuple(self.config["input_size"][-2:])
        self.few = few_images(data.images, pairs=data.pairs, limit=data.limit, seed=data.seed)
        self.train, self.held = held_out(len(self.few), data.held_out, data.seed)
        if not self.held:
            warnings.warn("of one image none can be held out: what is kept is the best on that image", stacklevel=3)
        # about as many pictures whatever the number of images and corruptions; at least one of each
        per_image = pictures / max(1, len(self.few))
        self.views = data.views or int(min(most_views, max(2, per_image)))
        self.teacher: nn.Module = model
        self.seen = Trace()
        self.share = Share()
        self.group: Any = None  # of processes; None: the default one
        self.half: torch.dtype | None = None  # of a host of half precision, while it is open in float32

    def draws(
        self,
        kinds: list[str],
        clean_share: float,
        draws: int | None,
        views: int | None = None,
        severities: Sequence[int] | None = None,
        images: Sequence[int] | None = None,
    ) -> Draws:
        """Pictures of some of the degradations (of the pairs, where these are given) and images.

        By default of all images, at the user's severities. Other corruptions may be named than those of the fit.
        """
        return make_draws(
            self.few if images is None else self.few.only(images),
            self.size,
            corruptions=[kind for kind in kinds if kind not in self.own and kind != "pairs"],
            severities=severities or self.severities,
            views=views or self.views,
            draws=(self.data.draws if severities is None else None) or draws or 1,
            clean_share=clean_share,
            degrade={kind: self.own[kind] for kind in kinds if kind in self.own} or None,
            seed=self.data.seed,
            workers=self.data.num_workers,
            crop=self.crop,
        )

    def pictures(self, draws: Draws) -> Pictures:
        """The draws, split by image into those that are fitted on and those held out."""
        image = np.asarray(draws.image)[draws.view]
        held = np.isin(image, self.held)
        labels = None if self.few.labels is None else np.asarray(self.few.labels)[np.asarray(draws.image)]
        return Pictures(
            draws.clean,
            draws.degraded,
            np.asarray(draws.view),
            np.flatnonzero(~held),
            np.flatnonzero(held),
            labels,
            np.asarray(draws.image),
        )

    def check_labels(self, recipe: Recipe) -> None:
        """ValueError if labels are to be used and there are none."""
        if recipe.label_weight and self.few.labels is None:
            raise ValueError(f"label_weight={recipe.label_weight} needs labels: give a Dataset of (image, label)")

    def normalize(self, pictures: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) in RGB → what the host takes."""
        mean, std = (pictures.new_tensor(self.config[key], dtype=torch.float32) for key in ("mean", "std"))
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        if is_bgr(self.model):
            pictures = pictures.flip(-1)
        images = ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        return images.to(dtype).contiguous(memory_format=torch.channels_last)

    def deep_sites(self, deep: str | Sequence[str] | None, after: PriorSite | None = None) -> list[PriorSite]:
        """The later places whose features are compared: those that come after the first site of a prior.

        Raises:
            ValueError: a name is that of no place, or all of them come before the prior.
        """
        if deep is None:
            return []
        patterns = [deep] if isinstance(deep, str) else list(deep)
        first = [after.name] if after is not None else []
        try:
            found = find_prior_sites(self.teacher, self.seen, [*first, *patterns])
        except ValueError as error:
            raise ValueError(str(error).replace("site=", "deep=")) from None
        if after is None:
            return found
        names = [site.name for site in found]
        place = names.index(after.name)
        early = [name for name in names[:place] if name in patterns]
        if early:
            raise ValueError(f"deep={deep!r}: {', '.join(early)} comes before the prior, which is after {after.name!r}")
        return found[place:]

    @contextlib.contextmanager
    def open(self, parameters: dict[str, nn.Parameter]) -> Iterator[Session]:
        """Student in eval mode on the device, only ``parameters`` with gradients; afterwards everything as it was."""
        modes = {module: module.training for module in self.model.modules()}
        wanted = {name: p.requires_grad for name, p in self.model.named_parameters()}
        grads = {name: p.grad for name, p in parameters.items()}
        with (
            process_group() as (rank, world_size),
            _cpu_group(world_size) as self.group,
            _same_generators(self.device),
            torch.compiler.set_stance("force_eager"),  # compiled code does not see hooks, which collect the features
        ):
            narrow = _widened(self.model)
            self.half = narrow[0][1] if narrow else None
            try:
                self.model.to(self.device).eval()
                for parameter in self.model.parameters():
                    parameter.requires_grad_(False)
                for parameter in parameters.values():
                    parameter.requires_grad_(True)
                self.teacher = remove(copy.deepcopy(self.model)).requires_grad_(False)
                self.teacher.eval()  # on its own: hosts whose train() returns nothing are many
                self.share = Share(rank, world_size, self._average) if world_size > 1 else Share()
                self._check_host()
                if world_size > 1:  # the same start everywhere, whatever the seeds of the processes were
                    for tensor in adapter_state(self.model).values():
                        there = tensor.detach().cpu().contiguous()
                        dist.broadcast(there, 0, group=self.group)
                        tensor.copy_(there)
                yield self
            finally:
                self.teacher = self.model
                self.model.to(self.home)
                for tensor, dtype in narrow:
                    tensor.data = tensor.data.to(dtype)
                for module, mode in modes.items():
                    module.training = mode
                for name, parameter in self.model.named_parameters():
                    parameter.requires_grad_(wanted[name])
                for name, parameter in parameters.items():
                    parameter.grad = grads[name]

    def round_as_saved(self) -> None:
        """Round what was put in to the precision that a host of half precision keeps it in, before it is judged."""
        if self.half is not None:
            for tensor in adapter_state(self.model).values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(self.half))

    def _check_host(self) -> None:
        """Refuse what could only give wrong numbers: other images than the host's, other hosts in other processes."""
        with colour_images(self.size):
            self.seen = trace(self.teacher, torch.empty(1, 3, *self.size))
        for tap in taps_of(self.model):
            check_tap(tap, self.config)
        if self.share.world_size > 1:
            hosts: list[Any] = [None] * self.share.world_size
            dist.all_gather_object(hosts, fingerprint(self.model), group=self.group)
            if len(set(hosts)) > 1:
                raise ValueError("the processes hold hosts of different weights: seed them alike, or load the weights")

    def checkpoints(self, folder: str | Path | None, recipe: Recipe, **others: Any) -> Checkpoints:
        """The states in a folder, which one process writes. A fit that goes on begins with what it began with."""
        if folder is None:
            return Checkpoints(None, {})
        forget = (injection_of(self.model) or Injection()).kept.pop(str(folder), None)
        if forget is not None:  # the states of an earlier fit of this model, with whose result this one begins
            forget()
        keep = Checkpoints(folder, self.key(recipe, **others), writes=self.share.rank == 0)
        start = self.of_main(lambda: keep.load(_START))
        if start is None:
            keep.save(_START, {name: tensor.detach().cpu() for name, tensor in adapter_state(self.model).items()})
        else:
            load_adapter_state(self.model, start)
        return keep

    def finish(self, keep: Checkpoints) -> None:
        """Note with what was fitted on which images, and let the states lie until ``save_adapter`` has written it."""
        record = injection_of(self.model)
        assert record is not None
        if keep.folder is not None:
            record.kept[str(keep.folder)] = keep.clear
        settings = {key: self.config[key] for key in SETTINGS if key in self.config}
        settings["input_size"] = list(self.size)
        normalization = tuple(self.config["mean"]), tuple(self.config["std"])
        record.images = replace(record.images or Images(), normalization=normalization, settings=settings)
        if record.changed is not None:
            record.changed(self.model)

    def _average(self, tensor: Tensor) -> Tensor:
        """The mean over all processes."""
        there = tensor.detach().cpu().double() if tensor.numel() == 1 else tensor.detach().cpu()
        dist.all_reduce(there, group=self.group)
        return (there / dist.get_world_size()).to(tensor)

    def of_main(self, function: Callable[[], T]) -> T:
        """What a function returns, or raises, in the first process; in all of them."""
        if self.share.world_size == 1:
            return function()
        box: list[Any] = [None, None]
        if self.share.rank == 0:
            try:
                box[0] = function()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, group=self.group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def fit(self, stage: str, fit: Fit, keep: Checkpoints, report: FitReport, progress: Any) -> None:
        """Run one stage, going on where an earlier run was interrupted."""
        of = digest_of(fit.pictures) if keep.folder is not None else ""
        try:
            state = self.of_main(lambda: keep.load(stage, of))
            if state is not None:
                try:
                    fit.load_state_dict(state)
                except (KeyError, TypeError, ValueError, RuntimeError) as error:
                    raise keep.damaged(stage, error) from error
            outcome = fit.run(
                progress=lambda step, loss: progress(stage, step, fit.recipe.steps, loss),
                checkpoint=lambda: keep.save(stage, fit.state_dict(), of),
            )
        finally:
            fit.close()
        keep.save(stage, fit.state_dict(), of)
        report.stages[stage] = {
            "curve": outcome.curve,
            "best_step": outcome.best_step,
            "first": outcome.untouched,
            "best": fit.best if math.isfinite(fit.best) else math.nan,
            "stopped": outcome.stopped,
            "strength": outcome.strength,
        }

    def key(self, recipe: Recipe, **others: Any) -> dict[str, Any]:
        """What makes this fit another one than the next, but for its pictures: for the trust in states in a folder."""
        return {
            "host": fingerprint(self.model),
            "configs": [config.to_dict() for config in self._configs()],
            "start": self._start(),
            "recipe": asdict(recipe),
            "images": self.config,
            **others,
        }

    def _configs(self) -> list[QualityOptions]:
        """Of what was put in."""
        record = injection_of(self.model) or Injection()
        found = [record.config, record.prior.config if record.prior is not None else None]
        return [config for config in found if config is not None]

    def _start(self) -> str:
        """A hash of all that was put in; "fresh" while it changes nothing, so that how it was drawn does not matter."""
        record = injection_of(self.model) or Injection()
        if record.prior is None or is_fresh(self.model):
            picture = self.crop(Image.fromarray(self.few.clean[0]))
            images = self.normalize(picture.permute(1, 2, 0)[None].to(self.device))
            with torch.no_grad():
                ours, theirs = (tree_leaves(network(images)) for network in (self.model, self.teacher))
            tensors = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Tensor)]
            if all(torch.equal(a, b) for a, b in tensors):
                return "fresh"
        digest = hashlib.sha256()
        for name, tensor in sorted(adapter_state(self.model).items()):
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(name.encode() + content.numpy().tobytes())
        return digest.hexdigest()

    def report(self, what: str, sites: list[str], kinds: list[str], recipe: Recipe, parameters: int) -> FitReport:
        """An empty report."""
        images = {"all": len(self.few), "held": len(self.held)}
        options = {**asdict(recipe), "views": self.views, "severities": self.severities, "device": str(self.device)}
        return FitReport(
            what=what,
            sites=sites,
            kinds=kinds,
            images=images,
            parameters=parameters,
            unreadable=self.few.unreadable,
            recipe=options,
            seed=self.data.seed,
        )

    def multiply_adds(self) -> float | None:
        """Multiply-adds of what was put in over the host's, for one image (torch's counter)."""
        from torch.utils.flop_counter import FlopCounterMode

        image = self.normalize(torch.zeros(1, *self.size, 3, dtype=torch.uint8, device=self.device))
        counts = []
        try:
            for network in (self.model, self.teacher):
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    network(image)
                counts.append(counter.get_total_flops())
        except Exception:  # operations that it does not know; a finished fit is not to be lost over it
            return None
        return counts[0] / counts[1] - 1 if counts[1] else None


def _widened(model: nn.Module) -> list[tuple[Tensor, torch.dtype]]:
    """Give a host of half precision float32 for the time of a fit, whose small steps it would lose; what was what."""
    half = (torch.float16, torch.bfloat16)
    narrow = [(t, t.dtype) for t in (*model.parameters(), *model.buffers()) if t.dtype in half]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    return narrow


@contextlib.contextmanager
def _same_generators(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _cpu_group(world_size: int) -> Iterator[Any]:
    """A group that exchanges tensors of the CPU: the user's own, or one beside it where that is for GPUs alone."""
    if world_size == 1 or dist.get_backend() == "gloo":
        yield None
        return
    group = dist.new_group(backend="gloo")
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


@contextlib.contextmanager
def progress_bar(show: bool) -> Iterator[Callable[[str, int, int, float], None]]:
    """A function that shows where a fit is: a bar on a terminal with rich, else nothing."""
    import sys

    if not show or not is_main_process() or not sys.stderr.isatty():
        yield lambda stage, step, steps, loss: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda stage, step, steps, loss: None
        return
    tasks: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:

        def show_step(stage: str, step: int, steps: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=steps)
            bar.update(tasks[stage], completed=step, description=f"{stage}: loss {loss:.3f}")

        yield show_step


def parameters_of(model: nn.Module, prefixes: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters that were put in, by name, without those of the host's own activations that they keep."""
    record, name_of = injection_of(model) or Injection(), tensor_names(unwrap(model))
    found = [(name_of(name), parameter) for name, parameter in unwrap(model).named_parameters()]
    return {n: p for n, p in found if n.startswith(tuple(prefixes)) and record.name_in_host(n) is None}


def digest_of(pictures: Pictures) -> str:
    """A hash of pictures, and of which are for what."""
    digest = hashlib.sha256()
    for array in (pictures.clean, pictures.degraded, pictures.view, pictures.train, pictures.held, pictures.labels):
        if array is not None:
            digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
