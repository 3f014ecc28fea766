"""Networks of diffusers with QuAC inside: ``QuACUNet2DModel`` for ``UNet2DModel``, and so for every other of them.

A class keeps its host's arguments, parameter names and methods. Its config has one more entry, ``quac``, the options of
:class:`quac_plugins.QuACConfig`; its ``forward`` has one more argument, ``q`` (B, Q), the quality features.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import diffusers
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from torch import Tensor, nn

from quac_plugins.core.deprecated import renamed
from quac_plugins.core.inject import QuACConfig, inject, injection_of
from quac_plugins.core.inject.example import Example
from quac_plugins.core.options import check_foreign, named, read_options
from quac_plugins.core.quality.given import use_q
from quac_plugins.diffusers.blocks import with_activations, without_activations
from quac_plugins.diffusers.examples import example_of
from quac_plugins.hub.load import load_adapter
from quac_plugins.hub.networks import verified_network, weights_in
from quac_plugins.hub.verify import no_larger_than

PREFIX = "QuAC"
_DEFAULTS = {"norm": "layer"}  # batches are small, and one image must train
_LOADING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class QuACMixin:
    """The base of the networks with QuAC inside; ``host_class`` is the network's own class."""

    host_class: ClassVar[Any]

    @classmethod
    def from_host(cls, host: Any, quac: QuACConfig | Mapping[str, Any] | None = None, example: Any = None) -> Any:
        """Put QuAC into a network of diffusers, in place: its class becomes this class.

        Args:
            host: of ``host_class``; a subclass of it has a class of its own, see :func:`add_to_model`.
            quac: a dict of options; the other options are QuACConfig's, with ``norm="layer"``, since a batch of one
                image must train. A QuACConfig stays unchanged.
            example: the network's arguments, if its config does not tell them; see
                :func:`quac_plugins.inject`.

        Raises:
            TypeError: the host is of another class.
            ValueError: an option is unknown, or a site does not exist.
        """
        config = options_of(quac)  # before anything is changed
        with cls._of(host):
            host._put_in(config, example)
        return host

    @classmethod
    def from_adapter(cls, host: Any, source: Any, revision: str | None = None, example: Any = None) -> Any:
        """Load an adapter of :func:`quac_plugins.save_adapter` into a network of diffusers, in place.

        Args:
            host, example: as of :meth:`from_host`.
            source, revision: see :func:`quac_plugins.load_adapter`.

        Raises:
            TypeError: the host is of another class.
            FileNotFoundError, PermissionError, ConnectionError, ValueError: see :func:`quac_plugins.load_adapter`. The
                host is as it was.
        """
        with cls._of(host):
            example = example if example is not None else example_of(host)
            load_adapter(with_activations(host), source, revision=revision, example=example)
            host._note()
        return host

    @classmethod
    @contextmanager
    def _of(cls, host: Any) -> Iterator[None]:
        """Make this class the class of a network; on an error the network is as before."""
        if type(host) is not cls.host_class:
            raise TypeError(f"{cls.__name__} is made of a {cls.host_class.__name__}, got {type(host).__name__}")
        host.__class__ = cls
        try:
            yield
        except BaseException:
            without_activations(host)
            host.__class__ = cls.host_class
            raise

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, quac: Any = None, **kwargs: Any) -> Any:
        """Load a network that :meth:`save_pretrained` wrote, or one of the host's class, which gets QuAC inside.

        Args:
            pretrained_model_name_or_path: a folder, or ``"org/name"`` on the Hub.
            quac: options for a network that was saved without QuAC; for one that was saved with a quality function of
                the user's own, ``{"quality": the function}``.
            **kwargs: of ``ModelMixin.from_pretrained``: ``subfolder``, ``variant``, ``torch_dtype``, ``revision``, …
                Only safetensors are read.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: see :func:`quac_plugins.hub.fetch.fetch`.
            ValueError: ``quac`` for a network that holds QuAC already; weights of what was put in are missing; a file
                is not what the Hub says; or the config asks for what no config of somebody else's may ask for.
        """
        pretrained_model_name_or_path, kwargs = verified_network(pretrained_model_name_or_path, kwargs)
        loading = {key: value for key, value in kwargs.items() if key in _LOADING}
        config: Any = cls.load_config(pretrained_model_name_or_path, **loading)  # type: ignore[attr-defined]
        with named(str(pretrained_model_name_or_path)):
            check_foreign(config)
        weights = weights_in(pretrained_model_name_or_path, kwargs)
        if "quac" not in config:
            host: Any = cls.host_class
            with no_larger_than(weights):
                loaded = host.from_pretrained(pretrained_model_name_or_path, **kwargs)
            cls.from_host(loaded[0] if isinstance(loaded, tuple) else loaded, quac)
            return loaded
        with named(f"{pretrained_model_name_or_path}: quac"):
            check_foreign(config["quac"])
        is_callable = str(config["quac"].get("quality")).startswith("callable:")
        if is_callable and isinstance(quac, Mapping) and list(quac) == ["quality"]:
            kwargs["quac"] = {**config["quac"], **quac}
        elif quac is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path} was saved with QuAC inside ({config['quac']}); load it without quac="
            )
        with no_larger_than(weights):
            loaded = _aligned(super().from_pretrained(pretrained_model_name_or_path, **kwargs))  # type: ignore[misc]
        model: nn.Module = loaded[0] if isinstance(loaded, tuple) else loaded
        absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if absent and kwargs.get("device_map") is None:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no weights of {absent[0]!r} and {len(absent) - 1} others, where "
                f"its config ({config['quac']}) puts QuAC: it was saved by another version, or the config was changed"
            )
        return loaded

    def enable_layerwise_casting(self: Any, *args: Any, **kwargs: Any) -> None:
        """Call ``ModelMixin.enable_layerwise_casting``, but keep the dtype of injected modules, as for norms.

        It is small, and its drivers read their dtype from weights that would not have been cast yet.
        """
        patterns, record = self._skip_layerwise_casting_patterns, injection_of(self)
        assert record is not None
        sites = [*record.sites, *(record.prior.sites if record.prior is not None else ())]
        names = [rf"^{re.escape(site.name)}(\.|$)" for site in sites]
        self._skip_layerwise_casting_patterns = [*(patterns or ()), *names]
        try:
            super().enable_layerwise_casting(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._skip_layerwise_casting_patterns = patterns

    def _put_in(self: Any, quac: QuACConfig | Mapping[str, Any] | None, example: Example | None = None) -> None:
        config = options_of(quac)
        with_activations(self)
        with named("quac"):
            inject(self, config, example if example is not None else example_of(self))
        self._note()

    def _note(self: Any) -> None:
        """Write the record of the injection into the config; after a removal, take the host's class again."""
        record = injection_of(self)
        assert record is not None
        _write_config(self)
        record.changed, record.removed = _write_config, _be_host


def _write_config(model: Any) -> None:
    """Write the options of the injection into the network's config."""
    record = injection_of(model)
    assert record is not None
    assert record.config is not None
    model.register_to_config(quac=record.options_to_save())


def _be_host(model: Any) -> None:
    """Give a network without QuAC inside its host's class again."""
    model.__class__ = model.host_class
    without_activations(model)
    model._internal_dict = FrozenDict({key: value for key, value in model.config.items() if key != "quac"})


def _aligned(loaded: Any) -> Any:
    """Copy parameters into aligned memory; ``loaded`` is a network, or a tuple that begins with a network.

    diffusers leaves them in the file's mapped memory, at any multiple of 4 bytes, and the kernels of small layers round
    otherwise there: a loaded network would not equal the saved one to the last bit.
    """
    model: nn.Module = loaded[0] if isinstance(loaded, tuple) else loaded
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return loaded


def options_of(quac: QuACConfig | Mapping[str, Any] | None) -> QuACConfig:
    """Return options as a config with ``tap="given"``: a network of diffusers sees latents or noisy samples.

    Raises:
        ValueError: an option is unknown, or its value is wrong; the message begins with ``quac``.
    """
    options = _DEFAULTS if quac is None else {**_DEFAULTS, **quac} if isinstance(quac, Mapping) else quac
    return replace(read_options(QuACConfig, options, "quac"), tap="given")


@functools.cache
def quac_class(host: Any) -> Any:
    """Return the class of networks like ``host``, a class of diffusers, with QuAC inside.

    Raises:
        TypeError: ``host`` is no model class of diffusers.

    Example:
        >>> from diffusers import UNet2DModel
        >>> quac_class(UNet2DModel).__name__
        'QuACUNet2DModel'
    """
    if not is_network(host):
        raise TypeError(f"{getattr(host, '__name__', host)} is no model of diffusers")

    def __init__(self: Any, *args: Any, quac: Any = None, **kwargs: Any) -> None:
        host.__init__(self, *args, **kwargs)
        self._put_in(quac)

    @renamed(quality="q")
    def forward(self: Any, *args: Any, q: Tensor | None = None, **kwargs: Any) -> Any:
        if q is None:
            return host.forward(self, *args, **kwargs)
        with use_q(self, q):
            return host.forward(self, *args, **kwargs)

    forward.__doc__ = f"""{host.__name__}.forward with the quality features.

    Args:
        q: (B, Q) of the degraded images, a row for each row of the sample. Without them
            ``with quac_plugins.use_q(model, q)`` must be in force.
    """
    added = inspect.Parameter("quac", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = with_argument(host.__init__, added)  # type: ignore[attr-defined]
    added = inspect.Parameter("q", inspect.Parameter.KEYWORD_ONLY, default=None)
    forward.__signature__ = with_argument(host.forward, added)  # type: ignore[attr-defined]
    name = PREFIX + host.__name__
    doc = f"{host.__name__} with QuAC inside; ``quac`` are options of :class:`quac_plugins.QuACConfig`."
    body = {"__init__": __init__, "forward": forward, "host_class": host, "__module__": __name__, "__doc__": doc}
    return type(name, (QuACMixin, host), body)


def is_network(host: Any) -> bool:
    """Return whether ``host`` is a model class of diffusers."""
    return isinstance(host, type) and issubclass(host, ModelMixin)


def with_argument(function: Any, parameter: inspect.Parameter) -> inspect.Signature:
    """Return the signature of a function with one more argument by name."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    return signature.replace(parameters=[*parameters[:at], parameter, *parameters[at:]])


def add_to_model(model: Any, quac: Any = None, example: Any = None) -> Any:
    """Put QuAC into a network of diffusers, in place, whatever its class; see :meth:`QuACMixin.from_host`.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
        ...                    up_block_types=("UpBlock2D",) * 2)
        >>> type(add_to_model(unet, {"where": "all"})).__name__
        'QuACUNet2DModel'
    """
    if injection_of(model) is not None:
        raise ValueError(f"{type(model).__name__} already holds QuAC; call quac_plugins.remove(model) first")
    host: Any = type(model)
    return quac_class(host).from_host(model, quac, example)


def __getattr__(name: str) -> Any:
    """Return the class ``QuACNAME`` for any network NAME of diffusers."""
    host = getattr(diffusers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not is_network(host):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return quac_class(host)


# the libraries whose classes a pipeline on the Hub may name
LOADABLE_CLASSES[__name__] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}

QuACUNet2DModel = quac_class(diffusers.UNet2DModel)
QuACUNet2DConditionModel = quac_class(diffusers.UNet2DConditionModel)
