"""Adapters: only the parameters that were put in, with their config, saved apart from the host (PEFT's manner).

``adapter_config.json`` describes, ``adapter_model.safetensors`` holds the tensors under their names in the host's state
dict. Loading checks everything against the host before the host is touched.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quac_plugins.core.hooks import PRIOR_NAME
from quac_plugins.core.host.facts import facts_of
from quac_plugins.core.inject.adapter_files import (
    CONFIG_NAME,
    FORMATS,
    WEIGHTS_NAME,
    Saved,
    read_adapter,
    read_config,
    write_adapter,
)
from quac_plugins.core.inject.bounds import bound_problems
from quac_plugins.core.inject.compare import (
    differences,
    prior_differences,
    site_problems,
    tensor_problems,
    without_normalization,
)
from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.containers import leave_out
from quac_plugins.core.inject.example import Example
from quac_plugins.core.inject.fingerprint import describe_host, same_weights
from quac_plugins.core.inject.images import in_words, same
from quac_plugins.core.inject.record import (
    Injection,
    PriorInjection,
    injection_of,
    modules_inside,
    nothing_inside,
    unwrap,
)
from quac_plugins.core.inject.savable import check_savable
from quac_plugins.core.inject.sites import Site, usable_sites
from quac_plugins.core.inject.surgery import build_priors, inject_at, remove, take_prior
from quac_plugins.core.inject.trace import Trace
from quac_plugins.core.module_names import parts, tensor_names
from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.core.prior.fdm import FDM
from quac_plugins.core.prior.routed import Gate
from quac_plugins.core.prior.sites import PriorSite, find_prior_sites, usable_prior_sites
from quac_plugins.core.quality.context import QualityContext
from quac_plugins.core.quality.registry import QualityFunction, resolve_quality

C = TypeVar("C", QuACConfig, PriorConfig)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that were put into a model, under their names in the host's state dict.

    Raises:
        ValueError: the model holds no QuAC, or a part that holds some of it has been replaced.
    """
    record = _record(model)
    modules_inside(model)
    name_of, prefixes = tensor_names(unwrap(model)), record.prefixes()
    named = ((name_of(name), tensor) for name, tensor in unwrap(model).state_dict().items())
    return {n: tensor for n, tensor in named if n.startswith(prefixes) and record.name_in_host(n) is None}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of :func:`adapter_state` into a model.

    ``load_state_dict(strict=False)`` would not do: layers of the host may reset tensors that are missing, such as the
    statistics of detectron2's frozen batch norms.

    Raises:
        KeyError: a name is no tensor that was put in.
    """
    tensors = adapter_state(model)
    with torch.no_grad():
        for name, tensor in state.items():
            tensors[name].copy_(tensor)


def save_adapter(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Save the adapter of a model: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Both files are written under other names and then renamed, and the config holds the hash of the tensors' file: a
    reader gets the old or the new adapter, also during a save and after a killed one. Other files in the folder stay.
    After the save, the states that a fit has kept in its ``checkpoint`` folder are deleted.

    Args:
        model: a model with QuAC inside.
        folder: the folder, which is made if it does not exist.
        dtype: the dtype of the saved floating point tensors, such as ``torch.float16`` for half the bytes; a host loads
            them in its own dtype. None: the dtype of each tensor.

    Returns:
        The folder.

    Raises:
        ValueError: the model holds no QuAC; a part of the model with QuAC inside has been replaced; or nobody could
            load the adapter, since an inserted layer holds another adapter's layers, is pruned or parametrized, or has
            a tensor with NaN or on the meta device.
        OSError: a file cannot be written, as on a full disk; an earlier adapter in the folder is as before.

    Example:
        >>> import tempfile, timm, quac_plugins as quac
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(p.name for p in quac.save_adapter(timm.create_model("test_resnet_qacon"), folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder = write_files(model, folder, dtype)
    record = _record(model)
    while record.kept:
        record.kept.popitem()[1]()
    return folder


def write_files(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Do the same as :func:`save_adapter` for a temporary folder: the states of a fit stay."""
    record = _record(model)
    state = adapter_state(model)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating point dtype of torch, such as torch.float16, got {dtype!r}")
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    for prefix in record.prefixes():
        if wrapped := [name for name in state if name.startswith(prefix) and "base_layer." in name[len(prefix) :]]:
            raise ValueError(
                f"{wrapped[0]!r}: a layer that was put in is inside another adapter's (LoRA); merge or unload that one "
                "first"
            )
    check_savable(modules_inside(model), state)
    prior = record.prior
    config = {
        "peft_type": "QUAC",
        "format": FORMATS[0] if prior is None else FORMATS[1],
        "config": record.config.to_dict() if record.config is not None else None,
        "sites": [asdict(site) for site in record.sites],
        "tap": record.tap,
        "host": describe_host(model),
        "qualities": {quality.name: quality.weights for quality in _qualities(record) if quality.weights},
        "images": record.images.to_dict() if record.images is not None else None,
    }
    if prior is not None:
        config["prior"] = {
            "config": prior.config.to_dict(),
            "sites": [asdict(site) for site in prior.sites],
            "tap": prior.tap,
        }
    write_adapter(Path(folder), config, {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    return Path(folder)


def check_adapter_files(folder: str | Path) -> None:
    """Refuse a folder whose adapter no host could load.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a tensor holds NaN or infinity.
    """
    folder = Path(folder)
    for name, tensor in read_adapter(folder)[1].items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{folder / WEIGHTS_NAME}: tensor {name!r} holds NaN or infinity")


def describe_adapter(folder: str | Path) -> dict[str, Any]:
    """Describe an adapter by its checked config: host, options, sites.

    Raises:
        FileNotFoundError: the folder holds no config.
        ValueError: the config is damaged.
    """
    saved = read_config(Path(folder) / CONFIG_NAME)
    facts: dict[str, Any] = {"host": saved.host.get("architecture"), "host_weights": saved.host.get("fingerprint")}
    if saved.config is not None:
        facts |= {"activations": saved.config.to_dict(), "sites": [site.name for site in saved.sites]}
    if saved.prior is not None:
        facts |= {"prior": saved.prior.to_dict(), "prior_sites": [site.name for site in saved.prior_sites]}
    return facts


def load_adapter_folder(
    model: nn.Module, folder: Path, check_host: bool = True, example: Example | None = None
) -> nn.Module:
    """Load an adapter of a local folder; see :func:`quac_plugins.load_adapter`."""
    saved, state = read_adapter(folder)
    if check_host:
        _check_host(model, saved)
        _check_images(model, saved)
    for config, what in ((saved.config, "QuACConfig"), (saved.prior, "PriorConfig")):
        if config is not None and config.has_own_quality and not _holds(model, config):
            raise ValueError(
                f"the adapter in {folder} was made with the quality function {config.quality!r} of the user's own. Put "
                f"it in first: inject(model, {what}(quality=the function, …)), then load_adapter(model, …)"
            )
    undo = _make_room(model, saved, state, example)
    try:
        _check(model, saved, state)
    except Exception:
        undo()
        raise
    load_adapter_state(model, state)
    _tell_other_use(model, saved)
    record = _record(model)
    if saved.images is not None and record.images is not None:
        record.images = replace(record.images, settings=saved.images.settings)
    changed = record.changed
    if changed is not None:
        changed(unwrap(model))
    return model


def _check_host(model: nn.Module, saved: Saved) -> None:
    host = describe_host(model)
    name, fingerprint = saved.host.get("architecture"), saved.host.get("fingerprint")
    if name != host["architecture"]:
        raise ValueError(
            f"the adapter in {saved.folder} was made for {name!r}, this host is {host['architecture']!r} "
            "(load_adapter(…, check_host=False) tries all the same)"
        )
    if same_weights(fingerprint, host["fingerprint"]):
        return
    message = (
        f"the adapter in {saved.folder} was made for {name!r} with other weights than this host has (fingerprint "
        f"{fingerprint}, here {host['fingerprint']}; tag {saved.host.get('tag')!r}, here {host['tag']!r})"
    )
    if saved.prior is not None:  # it undoes the drift of these very features; on others it is noise
        raise ValueError(
            f"{message}. Load those weights into the host first (load_adapter(…, check_host=False) tries all the same)"
        )
    warnings.warn(message, stacklevel=4)


def _qualities(record: Injection) -> list[QualityFunction]:
    """Return the quality functions of the activations and of the prior."""
    qualities = [record.quality, record.prior.quality if record.prior is not None else None]
    return [quality for quality in qualities if quality is not None]


def _check_images(model: nn.Module, saved: Saved) -> None:
    """Refuse a host whose normalization is neither the adapter's nor the one of the adapter's host."""
    if saved.images is None:
        return
    record, wanted = injection_of(model), saved.images.normalization
    noted = record.images if record is not None else None
    host = noted.host if noted is not None else facts_of(unwrap(model)).normalization
    if host is None or same(host, wanted) or (saved.images.host is not None and same(host, saved.images.host)):
        return
    mean, std = wanted or ((0.0,), (1.0,))
    raise ValueError(
        f"the adapter in {saved.folder} is for images with {in_words(wanted)}, and this host says {in_words(host)} "
        "(its pretrained_cfg): the quality would be that of other pictures. Build the host for those images "
        f"(timm.create_model(…, pretrained_cfg_overlay=dict(mean={mean}, std={std})), --mean and --std), or take the "
        "adapter's (load_adapter(…, check_host=False))"
    )


def _tell_other_use(model: nn.Module, saved: Saved) -> None:
    """Keep the host's own options of using a prior (such as top_k) before the adapter's, with a warning."""
    prior = _record(model).prior
    for quality in _qualities(_record(model)):
        if saved.qualities.get(quality.name, quality.weights) != quality.weights:
            warnings.warn(
                f"the adapter in {saved.folder} was saved with other weights of the quality function {quality.name!r} "
                f"({saved.qualities[quality.name]}, here {quality.weights}), as another version of quac-plugins has "
                "them: what it does may differ; evaluate it, or fit it again",
                stacklevel=4,
            )
    if saved.prior is not None and prior is not None and saved.prior.top_k != prior.config.top_k:
        warnings.warn(
            f"the adapter in {saved.folder} was saved with top_k={saved.prior.top_k}; the prior of this host keeps its "
            f"own, {prior.config.top_k}",
            stacklevel=4,
        )


def _holds(model: nn.Module, config: QuACConfig | PriorConfig) -> bool:
    record = injection_of(model)
    return record is not None and (record.config if isinstance(config, QuACConfig) else record.prior) is not None


def _make_room(
    model: nn.Module, saved: Saved, state: dict[str, Tensor], example: Example | None
) -> Callable[[], object]:
    """Inject the adapter's modules into a host without any, or with a prior that is still fresh.

    Returns:
        A function that makes the host as before.
    """
    record = injection_of(model)
    try:
        if problems := bound_problems(saved, state, parts(unwrap(model))):
            raise ValueError("; ".join(problems[:5]))
        if record is None:
            _with_example(partial(_put_all_in, model, saved, state), saved, example)
            return lambda: remove(model)
        if record.prior is None or saved.prior is None or not is_fresh(model) or _same_prior(saved, record.prior):
            return lambda: None
        put_back = take_prior(model)
        try:
            _with_example(partial(_inject_prior, model, saved, state), saved, example)
        except Exception:
            put_back()
            raise
        return lambda: (take_prior(model), put_back())
    except ValueError as error:
        raise _refused(saved, str(error)) from None
    except RuntimeError as error:  # the host does not run on the images
        raise RuntimeError(str(error).replace("inject(model, config, ", "load_adapter(model, source, ")) from None


def _with_example(put_in: Callable[[Example | None], object], saved: Saved, example: Example | None) -> None:
    """Inject with the user's example, else with the image size of the adapter's host, else with the host's own size."""
    shape = saved.images.shape if saved.images is not None else None
    if example is not None or shape is None:
        put_in(example)
        return
    try:
        put_in(torch.empty(1, *shape))
    except RuntimeError:  # a host that was built for images of another size
        put_in(None)


def _put_all_in(model: nn.Module, saved: Saved, state: dict[str, Tensor], example: Example | None) -> None:
    try:
        if saved.config is not None:
            inject_at(model, _with_normalization(model, saved, saved.config), partial(_its_own, saved), example)
            _record(model).config = saved.config
        if saved.prior is not None:
            _inject_prior(model, saved, state, example)
    except Exception:
        if injection_of(model) is not None:
            remove(model)
        raise


def _its_own(saved: Saved, model: nn.Module, config: QuACConfig, seen: Trace) -> list[Site]:
    """Return the adapter's own sites: neither a saved rule nor a saved regular expression runs again."""
    wanted = {(site.name, site.after) for site in saved.sites}
    return [site for site in usable_sites(model, seen) if (site.name, site.after) in wanted]


def _with_normalization(model: nn.Module, saved: Saved, config: C) -> C:
    """Return the config with the adapter's normalization, unless the config has one or the host has the same."""
    if saved.images is None or config.mean is not None or config.tap == "given":
        return config
    if same(saved.images.normalization, facts_of(unwrap(model)).normalization):
        return config
    mean, std = saved.images.normalization or ((0.0,), (1.0,))
    return replace(config, mean=mean, std=std)  # type: ignore[type-var]


def _same_prior(saved: Saved, prior: PriorInjection) -> bool:
    assert saved.prior is not None
    names = [site.name for site in prior.sites], [site.name for site in saved.prior_sites]
    return names[0] == names[1] and not prior_differences(saved.prior, prior.config)


def _inject_prior(model: nn.Module, saved: Saved, state: dict[str, Tensor], example: Example | None) -> None:
    """Inject the adapter's prior."""
    assert saved.prior is not None
    if problems := _prior_shapes(saved, state):
        raise ValueError("; ".join(problems[:5]))
    inject_at(model, _with_normalization(model, saved, saved.prior), partial(_its_own_prior, saved), example)
    _prior_of(model).config = saved.prior


def _its_own_prior(saved: Saved, model: nn.Module, config: PriorConfig, seen: Trace) -> list[PriorSite]:
    """Find the adapter's own sites: a rule such as "auto" does not run again."""
    leave_out(model, seen)
    usable = {site.name: site for site in usable_prior_sites(model, seen)}
    if missing := [rf"re:^{re.escape(site.name)}\Z" for site in saved.prior_sites if site.name not in usable]:
        find_prior_sites(model, seen, missing)  # which says why
    return [replace(usable[site.name], margin=site.margin) for site in saved.prior_sites]


def _prior_shapes(saved: Saved, state: dict[str, Tensor]) -> list[str]:
    """List tensors that do not fit the config, on the meta device: a damaged config may ask for too much memory."""
    assert saved.prior is not None
    context = quality = None
    if saved.prior.needs_quality:
        quality = resolve_quality(saved.prior.quality)
        context = QualityContext(quality.channels)
    with torch.device("meta"):
        built = build_priors(saved.prior_sites, saved.prior, context, quality)
    expected = {
        f"{site.name}.{PRIOR_NAME}.{name}": tensor
        for site, module in zip(saved.prior_sites, built, strict=True)
        for name, tensor in module.state_dict().items()
    }
    return tensor_problems(expected, state)


def _check(model: nn.Module, saved: Saved, state: dict[str, Tensor]) -> None:
    record = _record(model)
    expected = adapter_state(model)
    problems = []
    for what, in_adapter, in_host in (
        ("a prior", saved.prior, record.prior.config if record.prior else None),
        ("activations", saved.config, record.config),
    ):
        if (in_adapter is None) != (in_host is None):
            problems.append(f"{what}: in the {'adapter' if in_host is None else 'host'} only")
    if saved.images is not None and record.images is not None:
        theirs, ours = saved.images.normalization, record.images.normalization
        if not same(theirs, ours):
            problems.append(f"images have {in_words(theirs)} in the adapter, {in_words(ours)} in this host")
        saved = replace(saved, config=without_normalization(saved.config), prior=without_normalization(saved.prior))
    if saved.config is not None and record.config is not None:
        problems += differences(saved.config, record.config)
    if saved.prior is not None and record.prior is not None:
        problems += prior_differences(saved.prior, record.prior.config)
    axes = [{(s.name, s.after): s.channel_dim for s in sites} for sites in (record.sites, saved.sites)]
    problems += site_problems(*axes)
    problems += site_problems(
        {(s.name, "prior"): (s.layout, s.prefix) for s in (record.prior.sites if record.prior else ())},
        {(s.name, "prior"): (s.layout, s.prefix) for s in saved.prior_sites},
    )
    problems += tensor_problems(expected, state)
    problems += [f"surplus tensor {name!r}" for name in state if name not in expected]
    deviations = _deviations(model)
    for name, tensor in state.items():
        dtype = expected[name].dtype if name in expected else tensor.dtype
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.to(dtype)).all()):
            problems.append(f"tensor {name!r} holds NaN or infinity (as {dtype})")
        elif name in deviations and not bool((tensor.to(dtype) > 0).all()):
            problems.append(f"tensor {name!r} holds deviations that are not positive (as {dtype})")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise _refused(saved, f"{'; '.join(problems[:5])}{more}")


def _deviations(model: nn.Module) -> set[str]:
    """Return the names of the tensors by which features, or q, are divided."""
    inside = parts(unwrap(model)).items()
    return {f"{name}.std" for name, module in inside if isinstance(module, (FDM, Gate))}


def _refused(saved: Saved, why: str) -> ValueError:
    return ValueError(f"the adapter in {saved.folder} does not fit this host, which was left as it was: {why}")


def is_fresh(model: nn.Module) -> bool:
    """Return whether the prior inside a model is still as created: neither fitted nor loaded."""
    _prior_of(model)
    priors = [module for name, module in modules_inside(model).items() if name.endswith(f".{PRIOR_NAME}")]
    inside = (m for prior in priors for m in prior.modules())
    return all(m.is_fresh for m in inside if isinstance(m, (FDM, Gate)))


def _prior_of(model: nn.Module) -> PriorInjection:
    prior = _record(model).prior
    assert prior is not None
    return prior


def _record(model: nn.Module) -> Injection:
    record = injection_of(model)
    if record is None:
        raise nothing_inside(model, "call quac_plugins.inject first")
    return record
