"""Loading adapters from a folder, the wheel's own hub/, or the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from quac_plugins.core.inject.adapter import load_adapter_folder
from quac_plugins.core.inject.adapter_files import WEIGHTS_NAME
from quac_plugins.core.inject.example import Example
from quac_plugins.hub.fetch import fetch
from quac_plugins.hub.published import find_published
from quac_plugins.hub.verify import refuse_pickles


def find_adapter(source: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of an adapter, verified.

    ``source`` is a folder, a published name (``NAME.TAG`` of the registry, embedded in the package or on the Hub), or
    ``"org/name"`` on the Hub, tried in this order. The environment variable ``QUAC_HUB`` names an organization of the
    Hub whose ``QUAC_HUB/NAME.TAG`` replaces the published adapter.

    Raises:
        FileNotFoundError: the adapter is in none of these places; the message lists the tried ones.
        PermissionError, ConnectionError: the Hub refused access, or cannot be reached.
        ValueError: a file differs from the published one, or the weights are a pickle.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / WEIGHTS_NAME).exists():
            refuse_pickles((path.name for path in folder.iterdir()), str(folder), WEIGHTS_NAME)
        return folder
    name = str(source)
    published = find_published(name, known_to_host=True)
    if published is not None:
        if published.kind != "adapter":
            raise FileNotFoundError(
                f"{name!r} is a whole model and no adapter: timm.create_model({name!r}, pretrained=True)"
            )
        return published.folder(revision)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or folder.exists():
        raise FileNotFoundError(
            f"no adapter at {name!r}: neither a folder, nor a published name, nor of the form 'org/name' of the Hub"
        )
    return fetch(name, revision)


def load_adapter(
    model: nn.Module,
    source: str | Path,
    revision: str | None = None,
    check_host: bool = True,
    example: Example | None = None,
) -> nn.Module:
    """Put a saved adapter into a host, or its parameters into a host that already holds the same.

    Args:
        model: a fresh host, or one with the same injection. A prior that was never fitted makes room for the adapter's.
        source: a folder of :func:`save_adapter`, a published name (``quac list --pretrained``), or ``"org/name"`` on
            the Hub.
        revision: branch, tag or commit (Hub only).
        check_host: refuse a host with another architecture or normalization than the adapter's host. Other weights are
            an error for an adapter with a degradation prior, and a warning for activations alone. False: the tap undoes
            the adapter's normalization.
        example: images for a fresh host, if their shape differs from the shape in the adapter.

    Returns:
        The model, changed in place. After any error the model is as before.

    Raises:
        FileNotFoundError: the source holds no adapter.
        PermissionError, ConnectionError: the Hub refused access, or cannot be reached.
        ValueError: the adapter is damaged, or does not fit the host or its images; the message names the fault.
        RuntimeError: the host runs neither on images of the adapter's shape nor on images of its own size.

    Example:
        >>> import tempfile, timm, quac_plugins as quac
        >>> model = timm.create_model("test_resnet_qacon")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = quac.save_adapter(model, folder)
        ...     model = quac.load_adapter(quac.remove(model), folder)
        >>> quac.injection_of(model).config.activation
        'qacon'
    """
    return load_adapter_folder(model, find_adapter(source, revision), check_host, example)
