"""Adapters: only the parameters that were put in, with their config, saved apart from the host (PEFT's manner).

``adapter_config.json`` describes, ``adapter_model.safetensors`` holds the tensors under their names in the host's state
dict. Loading checks everything against the host before the host is touched.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quac_plugins.core.hooks import PRIOR_NAME
from quac_plugins.core.inject.config import QuACConfig
from quac_plugins.core.inject.example import Example
from quac_plugins.core.inject.fingerprint import describe_host, same_weights
from quac_plugins.core.inject.savable import check_savable
from quac_plugins.core.inject.saved import (
    CONFIG_NAME,
    FORMATS,
    WEIGHTS_NAME,
    Saved,
    read_adapter,
    read_config,
    write_adapter,
)
from quac_plugins.core.inject.surgery import (
    Injection,
    PriorInjection,
    build_prior,
    inject,
    injection_of,
    modules_inside,
    nothing_inside,
    remove,
    take_prior,
    unwrap,
)
from quac_plugins.core.options import QualityOptions
from quac_plugins.core.parts import parts, tensor_names
from quac_plugins.core.prior.config import PriorConfig
from quac_plugins.core.prior.fdm import FDM
from quac_plugins.core.prior.routed import Gate
from quac_plugins.core.quality.context import QualityContext
from quac_plugins.core.quality.table import QualityFunction, resolve_quality


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of what was put in, under their names in the host's state dict.

    Raises:
        ValueError: the model holds no QuAC, or a part that holds some of it has been replaced.
    """
    record = _record(model)
    modules_inside(model)
    name_of, prefixes = tensor_names(unwrap(model)), record.prefixes()
    named = ((name_of(name), tensor) for name, tensor in unwrap(model).state_dict().items())
    return {n: tensor for n, tensor in named if n.startswith(prefixes) and record.name_in_host(n) is None}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what :func:`adapter_state` gave back in.

    Not by ``load_state_dict(strict=False)`` of the whole: a host's layers may set what they miss there, as detectron2's
    frozen batch norms their statistics.

    Raises:
        KeyError: a name that is not of what was put in.
    """
    here = adapter_state(model)
    with torch.no_grad():
        for name, tensor in state.items():
            here[name].copy_(tensor)


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Save what was put into a host: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Both files are written beside and then renamed, and the config holds the hash of the other: whoever reads while a
    save goes on, or after one that was killed, gets the old adapter or the new one. Other files in the folder stay. The
    states that a fit has kept in its ``checkpoint`` folder are deleted once this is done.

    Args:
        model: a model with QuAC inside.
        folder: made if it does not exist.

    Returns:
        The folder.

    Raises:
        ValueError: the model holds no QuAC, a part that holds some of it has been replaced, or nobody could load it:
            another adapter's layers are inside what was put in, a layer of it is pruned or parametrized, a tensor holds
            NaN or is on the meta device.
        OSError: it cannot be written, as on a full disk; an adapter that was there is as it was.

    Example:
        >>> import tempfile, timm, quac_plugins as quac
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(p.name for p in quac.save_adapter(timm.create_model("test_resnet_qacon"), folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder = write_files(model, folder)
    record = _record(model)
    while record.kept:
        record.kept.popitem()[1]()
    return folder


def write_files(model: nn.Module, folder: str | Path) -> Path:
    """:func:`save_adapter` for a folder that is not to last, so that a fit's states stay."""
    record = _record(model)
    state = adapter_state(model)
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
    """What an adapter is, by its checked config: host, options, sites.

    Raises:
        FileNotFoundError: there is no config.
        ValueError: it is damaged.
    """
    saved = read_config(Path(folder) / CONFIG_NAME)
    found: dict[str, Any] = {"host": saved.host.get("architecture"), "host_weights": saved.host.get("fingerprint")}
    if saved.config is not None:
        found |= {"activations": saved.config.to_dict(), "sites": [site.name for site in saved.sites]}
    if saved.prior is not None:
        found |= {"prior": saved.prior.to_dict(), "prior_sites": [site.name for site in saved.prior_sites]}
    return found


def load_adapter_folder(
    model: nn.Module, folder: Path, check_host: bool = True, example: Example | None = None
) -> nn.Module:
    """See :func:`quac_plugins.load_adapter`; from a local folder."""
    saved, state = read_adapter(folder)
    if check_host:
        _check_host(model, saved)
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
    changed = _record(model).changed
    if changed is not None:
        changed(unwrap(model))
    return model


def _check_host(model: nn.Module, saved: Saved) -> None:
    here = describe_host(model)
    name, fingerprint = saved.host.get("architecture"), saved.host.get("fingerprint")
    if name != here["architecture"]:
        raise ValueError(
            f"the adapter in {saved.folder} was made for {name!r}, this host is {here['architecture']!r} "
            "(load_adapter(…, check_host=False) tries all the same)"
        )
    if same_weights(fingerprint, here["fingerprint"]):
        return
    message = (
        f"the adapter in {saved.folder} was made for {name!r} with other weights than this host has (fingerprint "
        f"{fingerprint}, here {here['fingerprint']}; tag {saved.host.get('tag')!r}, here {here['tag']!r})"
    )
    if saved.prior is not None:  # it undoes the drift of these very features; on others it is noise
        raise ValueError(
            f"{message}. Load those weights into the host first (load_adapter(…, check_host=False) tries all the same)"
        )
    warnings.warn(message, stacklevel=4)


def _qualities(record: Injection) -> list[QualityFunction]:
    """The quality functions that are read by what was put in."""
    found = [record.quality, record.prior.quality if record.prior is not None else None]
    return [quality for quality in found if quality is not None]


def _tell_other_use(model: nn.Module, saved: Saved) -> None:
    """What a host that held such a prior says of its use goes before the adapter, but not without a word."""
    here = _record(model).prior
    for quality in _qualities(_record(model)):
        if saved.qualities.get(quality.name, quality.weights) != quality.weights:
            warnings.warn(
                f"the adapter in {saved.folder} was saved with other weights of the quality function {quality.name!r} "
                f"({saved.qualities[quality.name]}, here {quality.weights}), as another version of quac-plugins has "
                "them: what it does may differ; evaluate it, or fit it again",
                stacklevel=4,
            )
    if saved.prior is not None and here is not None and saved.prior.top_k != here.config.top_k:
        warnings.warn(
            f"the adapter in {saved.folder} was saved with top_k={saved.prior.top_k}; the prior of this host keeps its "
            f"own, {here.config.top_k}",
            stacklevel=4,
        )


def _holds(model: nn.Module, config: QualityOptions) -> bool:
    record = injection_of(model)
    return record is not None and (record.config if isinstance(config, QuACConfig) else record.prior) is not None


def _make_room(
    model: nn.Module, saved: Saved, state: dict[str, Tensor], example: Example | None
) -> Callable[[], object]:
    """Put what the adapter holds into a host that holds nothing yet, or a prior that is as it was created.

    Returns:
        How to make the host what it was.
    """
    record = injection_of(model)
    try:
        if record is None:
            try:
                if saved.config is not None:
                    inject(model, saved.config, example)
                if saved.prior is not None:
                    _inject_prior(model, saved, state, example)
            except Exception:
                if injection_of(model) is not None:
                    remove(model)
                raise
            return lambda: remove(model)
        if record.prior is None or saved.prior is None or not is_fresh(model) or _same_prior(saved, record.prior):
            return lambda: None
        put_back = take_prior(model)
        try:
            _inject_prior(model, saved, state, example)
        except Exception:
            put_back()
            raise
        return lambda: (take_prior(model), put_back())
    except ValueError as error:
        raise _refused(saved, str(error)) from error


def _same_prior(saved: Saved, here: PriorInjection) -> bool:
    assert saved.prior is not None
    names = [site.name for site in here.sites], [site.name for site in saved.prior_sites]
    return names[0] == names[1] and not _prior_differences(saved.prior, here.config)


def _inject_prior(model: nn.Module, saved: Saved, state: dict[str, Tensor], example: Example | None) -> None:
    """At the adapter's own sites: a rule such as "auto" is not asked twice."""
    assert saved.prior is not None
    known = parts(unwrap(model))
    problems = [
        f"site {site.name!r} is in the adapter, not in this host"
        for site in saved.prior_sites
        if site.name not in known
    ]
    problems += _prior_shapes(saved, state)
    if problems:
        raise ValueError("; ".join(problems[:5]))
    patterns = [rf"re:^{re.escape(site.name)}\Z" for site in saved.prior_sites]
    inject(model, replace(saved.prior, site=patterns), example)
    _prior_of(model).config = saved.prior


def _prior_shapes(saved: Saved, state: dict[str, Tensor]) -> list[str]:
    """Tensors that are not as the config says; found without memory, which a damaged config asks for too much of."""
    assert saved.prior is not None
    context = quality = None
    if saved.prior.needs_quality:
        quality = resolve_quality(saved.prior.quality)
        context = QualityContext(quality.channels)
    problems = []
    for site in saved.prior_sites:
        with torch.device("meta"):
            expected = build_prior(site, saved.prior, context, quality).state_dict()
        problems += _tensor_problems({f"{site.name}.{PRIOR_NAME}.{name}": t for name, t in expected.items()}, state)
    return problems


def _check(model: nn.Module, saved: Saved, state: dict[str, Tensor]) -> None:
    record = _record(model)
    expected = adapter_state(model)
    problems = []
    for what, there, here in (
        ("a prior", saved.prior, record.prior.config if record.prior else None),
        ("activations", saved.config, record.config),
    ):
        if (there is None) != (here is None):
            problems.append(f"{what}: in the {'adapter' if here is None else 'host'} only")
    if saved.config is not None and record.config is not None:
        problems += _differences(saved.config, record.config)
    if saved.prior is not None and record.prior is not None:
        problems += _prior_differences(saved.prior, record.prior.config)
    axes = [{(s.name, s.after): s.channel_dim for s in sites} for sites in (record.sites, saved.sites)]
    problems += _site_problems(*axes)
    problems += _site_problems(
        {(s.name, "prior"): (s.layout, s.prefix) for s in (record.prior.sites if record.prior else ())},
        {(s.name, "prior"): (s.layout, s.prefix) for s in saved.prior_sites},
    )
    problems += _tensor_problems(expected, state)
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
    """Names of tensors that features, or q, are divided by."""
    inside = parts(unwrap(model)).items()
    return {f"{name}.std" for name, module in inside if isinstance(module, (FDM, Gate))}


def _refused(saved: Saved, why: str) -> ValueError:
    return ValueError(f"the adapter in {saved.folder} does not fit this host, which was left as it was: {why}")


def _tensor_problems(expected: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    problems = [f"missing tensor {name!r}" for name in expected if name not in state]
    there = {name: (state[name], tensor) for name, tensor in expected.items() if name in state}
    problems += [
        f"tensor {name!r} has shape {tuple(found.shape)}, expected {tuple(tensor.shape)}"
        for name, (found, tensor) in there.items()
        if found.shape != tensor.shape
    ]
    problems += [
        f"tensor {name!r} holds {found.dtype}, expected {tensor.dtype}"
        for name, (found, tensor) in there.items()
        if found.is_floating_point() != tensor.is_floating_point()
    ]
    return problems


def _site_problems(here: dict[Any, Any], there: dict[Any, Any]) -> list[str]:
    problems = [f"site {key[0]!r} is in the adapter, not in this host" for key in there if key not in here]
    problems += [f"site {key[0]!r} is in this host, not in the adapter" for key in here if key not in there]
    return problems + [
        f"site {key[0]!r} has its channels on axis {there[key]}, in this host on {here[key]}"
        if isinstance(here[key], int)
        else f"site {key[0]!r} has layout {there[key]}, in this host {here[key]}"
        for key in here
        if key in there and there[key] != here[key]
    ]


def _differences(there: QuACConfig, here: QuACConfig) -> list[str]:
    """What the tensors' shapes do not show: parameters of one activation, read by another, give wrong numbers."""
    fields = ["activation", "init"]
    if here.is_driven:
        fields += ["norm", "reduction"]
    if here.activation_class.needs_quality:
        fields.append("tap")
    return _compare(there, here, fields, here.activation_class.needs_quality)


def _prior_differences(there: PriorConfig, here: PriorConfig) -> list[str]:
    return _compare(there, here, ["fdm", "fdm_width", "fdm_act", "experts"], here.needs_quality)


def _compare(there: QualityOptions, here: QualityOptions, fields: list[str], needs_quality: bool) -> list[str]:
    if needs_quality and isinstance(here.quality, str) and not there.has_own_quality:
        fields = [*fields, "quality"]
    if there.mean is not None:  # explicit there; otherwise each host brings its own, and q is that of the pictures
        fields = [*fields, "mean", "std"]
    if needs_quality:
        fields = [*fields, "channel_order"]
    known = there.to_dict(), here.to_dict()
    pairs = [(field, known[0][field], known[1][field]) for field in fields]
    return [f"{field} is {a!r} in the adapter, {b!r} in this host" for field, a, b in pairs if a != b]


def is_fresh(model: nn.Module) -> bool:
    """Whether the prior inside a model is as it was created: neither fitted nor loaded."""
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
