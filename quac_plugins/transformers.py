"""Models of transformers with QuAC inside: ``QuACViTForImageClassification`` for ``ViTForImageClassification``, …

A class keeps its host's arguments, parameter names and methods, so that the Trainer and the pipelines take it. What is
inside stands in its config: ``quac``, the options of :class:`quac_plugins.QuACConfig`, and ``quac_prior``, those of
:class:`quac_plugins.PriorConfig`. So ``save_pretrained`` and ``from_pretrained`` keep it.

    >>> from transformers import ViTConfig
    >>> from quac_plugins.transformers import QuACViTForImageClassification
    >>> sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
    >>> options = dict(activation="qgelu", where="all", mean=(0.5,) * 3, std=(0.5,) * 3)
    >>> model = QuACViTForImageClassification(ViTConfig(**sizes, quac=options))
    >>> model.config.quac["activation"]
    'qgelu'
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import transformers
from torch import nn

from quac_plugins.core.inject import PriorConfig, QuACConfig, inject, injection_of
from quac_plugins.core.inject.surgery import all_or_nothing
from quac_plugins.core.options import check_foreign, named, read_options
from quac_plugins.hub.networks import verified_network, weights_in
from quac_plugins.hub.verify import no_larger_than

PREFIX = "QuAC"
_KEYS: dict[str, Any] = {"quac": QuACConfig, "quac_prior": PriorConfig}
_LOADING = ("subfolder",)


class QuACMixin:
    """The base of the models with QuAC inside; ``host_class`` is the model's own class."""

    host_class: ClassVar[Any]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        self.host_class.__init__(self, config, *args, **kwargs)
        _put_in(self, {key: getattr(config, key, None) for key in _KEYS})

    @classmethod
    def from_host(
        cls,
        host: Any,
        quac: QuACConfig | Mapping[str, Any] | None = None,
        quac_prior: PriorConfig | Mapping[str, Any] | None = None,
    ) -> Any:
        """Make a model of transformers one of this class, in place, with what is inside it, and what is given put in.

        Args:
            host: of ``host_class``, plain, or what :func:`quac_plugins.inject`, ``fit_prior`` or ``load_adapter`` has
                put something into.
            quac, quac_prior: options of what is put in now. A plain host gets QuACConfig's defaults where neither is
                given. Mean and std are those of the image processor, and have to be given.

        Raises:
            TypeError: the host is of another class.
            ValueError: an option is not known, or a site is not there; the host is as it was.
        """
        if type(host) is not cls.host_class:
            raise TypeError(f"{cls.__name__} is made of a {cls.host_class.__name__}, got {type(host).__name__}")
        if injection_of(host) is None and quac is None and quac_prior is None:
            quac = QuACConfig()
        _put_in(host, {"quac": quac, "quac_prior": quac_prior})
        host.__class__ = cls
        return host

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, quac: Any = None, quac_prior: Any = None, **kwargs: Any
    ) -> Any:
        """Load a model that :meth:`save_pretrained` wrote, or one of the host's class, which gets QuAC inside.

        Args:
            pretrained_model_name_or_path: a folder, or ``"org/name"`` on the Hub.
            *args, **kwargs: of ``PreTrainedModel.from_pretrained``. Only safetensors are read.
            quac, quac_prior: options for a model that was saved without QuAC, see :meth:`from_host`.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: see :func:`quac_plugins.hub.fetch.fetch`.
            ValueError: options for a model that holds QuAC already; tensors of what was put in are missing; a file is
                not what the Hub says; or the config asks for what no config of somebody else's may ask for.
        """
        source, kwargs = verified_network(pretrained_model_name_or_path, kwargs, "model")
        told = kwargs.get("config")
        if not isinstance(told, transformers.PretrainedConfig):
            inside = {key: value for key, value in kwargs.items() if key in _LOADING}
            told, _ = transformers.PretrainedConfig.get_config_dict(told or source, **inside)
        else:
            told = told.to_dict()
        with no_larger_than(weights_in(source, kwargs)):
            if not any(told.get(key) for key in _KEYS):
                loaded: Any = cls.host_class.from_pretrained(source, *args, **kwargs)
                cls.from_host(loaded[0] if isinstance(loaded, tuple) else loaded, quac, quac_prior)
                return loaded
            for key in _KEYS:
                if told.get(key):
                    with named(f"{pretrained_model_name_or_path}: {key}"):
                        check_foreign(told[key])
            if quac is not None or quac_prior is not None:
                raise ValueError(
                    f"{pretrained_model_name_or_path} was saved with QuAC inside "
                    f"({', '.join(key for key in _KEYS if told.get(key))}); load it without quac= and quac_prior="
                )
            asked = kwargs.pop("output_loading_info", False)
            model, found = super().from_pretrained(  # type: ignore[misc]
                source, *args, **kwargs, output_loading_info=True
            )
        record = injection_of(model)
        assert record is not None
        missing = [name for name in found["missing_keys"] if name.startswith(record.prefixes())]
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no weights of {min(missing)!r} and {len(missing) - 1} others, "
                "where its config puts QuAC: it was saved by another version, or the config was changed"
            )
        return (model, found) if asked else model


def _put_in(model: Any, options: Mapping[str, Any]) -> None:
    """Inject the modules of a config's keys, and keep the model's config in step from now on."""
    configs = [read_options(_KEYS[key], given, key) for key, given in options.items() if given]
    with all_or_nothing(model):
        for config in configs:
            inject(model, config)
    record = injection_of(model)
    if record is not None:
        _write_config(model)
        record.changed, record.removed = _write_config, _be_host


def _write_config(model: nn.Module) -> None:
    """Write the options of the injection into the model's config."""
    record, config = injection_of(model), model.config
    assert record is not None
    held = {"quac": record.config is not None, "quac_prior": record.prior is not None}
    for key, is_there in held.items():
        if is_there:
            setattr(config, key, record.options_to_save(prior=key == "quac_prior"))
        elif hasattr(config, key):
            delattr(config, key)


def _be_host(model: Any) -> None:
    """Give a model without an injection its host's class again."""
    model.__class__ = getattr(model, "host_class", type(model))
    for key in _KEYS:
        if hasattr(model.config, key):
            delattr(model.config, key)


@functools.cache
def quac_class(host: Any) -> Any:
    """Return the class of models like ``host``, a class of transformers, with QuAC inside.

    Raises:
        TypeError: ``host`` is no model class of transformers.

    Example:
        >>> from transformers import ResNetForImageClassification
        >>> quac_class(ResNetForImageClassification).__name__
        'QuACResNetForImageClassification'
    """
    if not _is_model(host):
        raise TypeError(f"{getattr(host, '__name__', host)} is no model of transformers")
    doc = f"{host.__name__} with QuAC inside; ``config.quac`` are options of :class:`quac_plugins.QuACConfig`."
    body = {"host_class": host, "__module__": __name__, "__doc__": doc}
    return type(PREFIX + host.__name__, (QuACMixin, host), body)


def _is_model(host: Any) -> bool:
    return isinstance(host, type) and issubclass(host, transformers.PreTrainedModel)


def __getattr__(name: str) -> Any:
    """Return the class ``QuACNAME`` for any model NAME of transformers."""
    host = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not _is_model(host):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return quac_class(host)
