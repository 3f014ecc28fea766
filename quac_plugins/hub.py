"""Where adapters come from: a folder, the wheel's own hub/, or the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from quac_plugins.core.inject.adapter import CONFIG_NAME, WEIGHTS_NAME, load_adapter_folder
from quac_plugins.registry import data_folder


def find_adapter(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of an adapter: ``source`` if it is one, else ``hub/source`` of the package, else from the Hub.

    Raises:
        FileNotFoundError: it is in none of these places; the message says which were looked at.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    name = str(source)
    embedded = data_folder("hub") / name
    if name and embedded.is_dir() and (embedded / CONFIG_NAME).is_file():
        return embedded
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or folder.exists():
        raise FileNotFoundError(f"no adapter at {name!r}: neither a folder, nor of the form 'org/name' of the Hub")
    from huggingface_hub import hf_hub_download

    try:
        paths = [Path(hf_hub_download(name, file, revision=revision)) for file in (CONFIG_NAME, WEIGHTS_NAME)]
    except Exception as error:
        raise FileNotFoundError(
            f"no adapter at {name!r}: there is no such folder here, and the Hub repository of that name "
            f"(revision {revision or 'main'}) could not be read: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return paths[0].parent


def load_adapter(
    model: nn.Module,
    source: str | Path,
    revision: str | None = None,
    check_host: bool = True,
    example: Tensor | None = None,
) -> nn.Module:
    """Put a saved adapter into a host, or its parameters into a host that already holds the same.

    Args:
        model: a fresh host, or one with the same injection. A prior that was never fitted makes room for the adapter's.
        source: a folder that :func:`save_adapter` wrote, a name of ``hub/``, or ``"org/name"`` on the Hub.
        revision: branch, tag or commit (Hub only).
        check_host: refuse a host of another architecture than the adapter was made for, and for an adapter with a
            degradation prior one with other weights; activations alone are warned of other weights.
        example: images as a fresh host gets them, where :func:`inject` needs them.

    Returns:
        The model, in place. On any error it is as it was before.

    Raises:
        FileNotFoundError: there is no adapter there.
        ValueError: the adapter is damaged or does not fit; the message names the first tensors at fault.

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
