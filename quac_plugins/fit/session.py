"""The session of one fit: it opens a network, keeps the untouched host as its teacher, and puts everything back."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quac_plugins.core.host.facts import facts_of
from quac_plugins.core.inject.adapter import adapter_state, is_fresh, load_adapter_state
from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.fingerprint import fingerprint
from quac_plugins.core.inject.images import SETTINGS, Images
from quac_plugins.core.inject.surgery import Injection, inject, injection_of, remove, take_prior, unwrap
from quac_plugins.core.inject.trace import Trace, trace
from quac_plugins.core.module_names import tensor_names
from quac_plugins.core.options import QualityOptions
from quac_plugins.core.prior.comparison import Comparison, Pictures
from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.core.prior.recipe import Recipe
from quac_plugins.core.prior.sites import PriorSite, find_prior_sites
from quac_plugins.evaluate.lending import device_of, lent
from quac_plugins.evaluate.preprocessing import check_tap, taps_of
from quac_plugins.fit.checkpoint import Checkpoints
from quac_plugins.fit.photographs import Photographs
from quac_plugins.fit.report import FitReport
from quac_plugins.fit.settings import recipe_with
from quac_plugins.processes import Processes
from quac_plugins.progress import Show, progress_bar

_START = "start"  # the stage whose state is what a fit began with


class FitSession:
    """The network, photographs, recipe, device and processes of one fit; each part of the fit reads what it needs.

    Args:
        model: the host, unwrapped; the modules to fit are inside, or :meth:`put_in` injects them.
        photographs: the images that the fit learns from.
        recipe: steps, learning rate, …. None: the defaults of :class:`quac_plugins.Recipe`.
        settings: fields of the recipe by name; they replace the recipe's own values.
        device: where the fit runs. None: where the model is.
        processes: the processes that share the work.

    Attributes:
        model: the network that is fitted (the student of the distillation).
        recipe: the recipe, with ``settings`` in it.
        teacher: the untouched host while the session is open, otherwise the model.
        deeper: the places whose features are compared while the session is open.
        report: the report of the fit.
        keep: the checkpoints of the fit.
        show: shows a progress bar, see :mod:`quac_plugins.progress`.

    Raises:
        ValueError: the recipe weighs labels, and the photographs have none.
    """

    report: FitReport
    keep: Checkpoints

    def __init__(
        self,
        model: nn.Module,
        photographs: Photographs,
        recipe: Recipe | None,
        settings: dict[str, Any],
        device: str | torch.device | None,
        processes: Processes,
    ):
        self.model, self.photographs, self.processes = model, photographs, processes
        self.device = device_of(model, device)
        self.recipe = recipe_with(recipe, settings, photographs.data.seed, self.device)
        if self.recipe.label_weight and photographs.few.labels is None:
            weight = f"label_weight={self.recipe.label_weight}"
            raise ValueError(f"{weight} needs labels: give a Dataset of (image, label)")
        self.teacher: nn.Module = model
        self.deeper: list[PriorSite] = []
        self.show: Show = lambda *_: None
        self._seen = Trace()
        self._half: torch.dtype | None = None  # of a host of half precision, while it is open in float32

    def put_in(self, config: QuACConfig | PriorConfig) -> None:
        """Inject the config, initialized by the seed alone, with the normalization of the photographs."""
        mean, std = (self.photographs.settings[key] for key in ("mean", "std"))
        if config.mean is None and facts_of(self.model).normalization != (mean, std):
            config = replace(config, mean=tuple(mean), std=tuple(std))
        with torch.random.fork_rng(), _colour_images(self.photographs.size):
            torch.manual_seed(self.photographs.data.seed)
            inject(self.model, config, torch.empty(1, 3, *self.photographs.size))

    def images(self, pictures: np.ndarray) -> Tensor:
        """Convert pictures uint8 (B, H, W, 3) in RGB to the host's input, on the device."""
        return self.photographs.normalize(torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device))

    @contextlib.contextmanager
    def open(
        self,
        what: str,
        parameters: dict[str, nn.Parameter],
        sites: Sequence[str],
        *,
        deep: str | Sequence[str] | None,
        after: PriorSite | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = False,
        **others: Any,
    ) -> Iterator[FitReport]:
        """Hold the model in eval mode on the device, only ``parameters`` with gradients; restore all at the end.

        Args:
            what: the kind of the fit, ``"prior"`` or ``"qacon"``.
            parameters: the fitted parameters by name.
            sites: the names of the fitted modules' sites.
            deep: later places whose features are compared.
            after: the first site of a prior, before all later places.
            checkpoint: the folder of the states.
            progress: show a bar on a terminal.
            **others: further parts of the fit's identity.
        """
        wanted = {name: p.requires_grad for name, p in self.model.named_parameters()}
        grads = {name: p.grad for name, p in parameters.items()}
        of, data, fitted = self.photographs, self.photographs.data, sum(p.numel() for p in parameters.values())
        self.report = FitReport(what, list(sites), data.kinds, parameters=fitted, seed=data.seed)
        self.report.images, self.report.unreadable = {"all": len(of.few), "held": len(of.held)}, of.few.unreadable
        self.report.recipe = asdict(self.recipe) | {"views": of.views, "severities": data.levels}
        self.report.recipe["device"] = str(self.device)
        with (
            lent(self.model, self.device),
            torch.compiler.set_stance("force_eager"),  # compiled code does not see hooks, which collect the features
            progress_bar(progress) as self.show,
        ):
            narrow = _widened(self.model)
            self._half = narrow[0][1] if narrow else None
            try:
                for parameter in self.model.parameters():
                    parameter.requires_grad_(False)
                for parameter in parameters.values():
                    parameter.requires_grad_(True)
                self.teacher = remove(copy.deepcopy(self.model)).requires_grad_(False)
                self.teacher.eval()  # on its own: hosts whose train() returns nothing are many
                self._check_host()
                self.processes.same(adapter_state(self.model).values())  # whatever their seeds were
                self.deeper = self._deep_sites(deep, after)
                self.keep = self._checkpoints(checkpoint, what=what, deep=deep, **others)
                yield self.report
            finally:
                self.teacher = self.model
                for tensor, dtype in narrow:
                    tensor.data = tensor.data.to(dtype)
                for name, parameter in self.model.named_parameters():
                    parameter.requires_grad_(wanted[name])
                for name, parameter in parameters.items():
                    parameter.grad = grads[name]
        self._finish()

    def compare(self, pictures: Pictures, sites: Sequence[PriorSite] = (), **options: Any) -> Comparison:
        """Return a :class:`Comparison` of model and teacher on pictures, with its ``options``."""
        return Comparison(
            self.model, self.teacher, list(sites), self.deeper, self.photographs.normalize, pictures, self.recipe,
            self.device, **options,
        )  # fmt: skip

    def round_as_saved(self) -> None:
        """Round the injected tensors to the precision of a half precision host, before they are judged."""
        if self._half is not None:
            for tensor in adapter_state(self.model).values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(self._half))

    def _check_host(self) -> None:
        """Refuse images of another normalization than the host's, and different hosts in different processes."""
        with _colour_images(self.photographs.size):
            self._seen = trace(self.teacher, torch.empty(1, 3, *self.photographs.size))
        for tap in taps_of(self.model):
            check_tap(tap, self.photographs.settings)
        if self.processes.world_size > 1 and len(set(self.processes.gather(fingerprint(self.model)))) > 1:
            raise ValueError("the processes hold hosts of different weights: seed them alike, or load the weights")

    def _deep_sites(self, deep: str | Sequence[str] | None, after: PriorSite | None) -> list[PriorSite]:
        """Return the later places whose features are compared, all after the first site of a prior.

        Raises:
            ValueError: a name means no place, or a place before the prior.
        """
        if deep is None:
            return []
        patterns = [deep] if isinstance(deep, str) else list(deep)
        first = [after.name] if after is not None else []
        try:
            sites = find_prior_sites(self.teacher, self._seen, [*first, *patterns])
        except ValueError as error:
            raise ValueError(str(error).replace("site=", "deep=")) from None
        if after is None:
            return sites
        names = [site.name for site in sites]
        place = names.index(after.name)
        early = [name for name in names[:place] if name in patterns]
        if early:
            raise ValueError(f"deep={deep!r}: {', '.join(early)} comes before the prior, which is after {after.name!r}")
        return sites[place:]

    def _checkpoints(self, folder: str | Path | None, **others: Any) -> Checkpoints:
        """Return the checkpoints of a folder; a fit that goes on starts from its own first state."""
        if folder is None:
            return Checkpoints(None, {})
        record = injection_of(self.model) or Injection()
        forget = record.kept.pop(str(folder), None)
        if forget is not None:  # the states of an earlier fit of this model, with whose result this one begins
            forget()
        configs = [record.config, record.prior.config if record.prior is not None else None]
        key = {
            "host": fingerprint(self.model),
            "configs": [config.to_dict() for config in configs if config is not None],
            "start": self._start(),
            "recipe": asdict(self.recipe),
            "images": self.photographs.settings,
            **others,
        }
        keep = Checkpoints(folder, key, writes=self.processes.rank == 0)
        start = self.processes.of_main(lambda: keep.load(_START))
        if start is None:
            keep.save(_START, {name: tensor.detach().cpu() for name, tensor in adapter_state(self.model).items()})
        else:
            load_adapter_state(self.model, start)
        return keep

    def _start(self) -> str:
        """Return a hash of the injected tensors; "fresh" while they change no output, whatever their random values."""
        record = injection_of(self.model) or Injection()
        if record.prior is None or is_fresh(self.model):
            picture = self.photographs.crop(Image.fromarray(self.photographs.few.clean[0]))
            images = self.images(picture.permute(1, 2, 0)[None].numpy())
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

    def _finish(self) -> None:
        """Note the form of the images in the record, and keep the states until ``save_adapter`` has run."""
        record = injection_of(self.model)
        assert record is not None
        if self.keep.folder is not None:
            record.kept[str(self.keep.folder)] = self.keep.clear
        known = self.photographs.settings
        settings = {key: known[key] for key in SETTINGS if key in known} | {"input_size": list(self.photographs.size)}
        normalization = tuple(known["mean"]), tuple(known["std"])
        record.images = replace(record.images or Images(), normalization=normalization, settings=settings)
        if record.changed is not None:
            record.changed(self.model)


def check_fit(model: nn.Module, config: QualityOptions | None, kind: type) -> None:
    """Raise a TypeError for a model or a config of a wrong type."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}; timm.create_model(name) makes one")
    if config is not None and not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}")


def parameters_of(model: nn.Module, prefixes: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the injected parameters by name, without parameters of the host's own activations."""
    record, name_of = injection_of(model) or Injection(), tensor_names(unwrap(model))
    parameters = [(name_of(name), parameter) for name, parameter in unwrap(model).named_parameters()]
    return {n: p for n, p in parameters if n.startswith(tuple(prefixes)) and record.name_in_host(n) is None}


@contextlib.contextmanager
def unharmed(model: nn.Module) -> Iterator[None]:
    """Restore the injected tensors, or remove new ones, after any error or interruption inside the context.

    Gradients are on and autocast is off inside the context, whatever the caller's modes.
    """
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for kind in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            modes.enter_context(torch.autocast(kind, enabled=False))
        before = injection_of(model)
        had_prior = before is not None and before.prior is not None
        state = {name: tensor.clone() for name, tensor in adapter_state(model).items()} if before is not None else {}
        try:
            yield
        except BaseException:
            now = injection_of(model)
            if now is not None and before is None:
                remove(model)
            elif now is not None:
                if now.prior is not None and not had_prior:
                    take_prior(model)
                load_adapter_state(model, state)
            raise


@contextlib.contextmanager
def _colour_images(size: tuple[int, int]) -> Iterator[None]:
    """Turn the error of a host that does not run on photographs into a ValueError: the host cannot be fitted."""
    try:
        yield
    except RuntimeError as error:
        shape = f"(B, 3, {size[0]}, {size[1]})"
        said = str(error).partition(" Give images it takes")[0]
        raise ValueError(
            f"only hosts that take colour images, here {shape}, can be fitted (input_size gives another size): {said}"
        ) from None


def _widened(model: nn.Module) -> list[tuple[Tensor, torch.dtype]]:
    """Cast a half precision host to float32, which keeps a fit's small steps, and return its tensors' dtypes."""
    half = (torch.float16, torch.bfloat16)
    narrow = [(t, t.dtype) for t in (*model.parameters(), *model.buffers()) if t.dtype in half]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    return narrow
