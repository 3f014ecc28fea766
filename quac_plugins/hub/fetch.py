"""From the Hub to a verified local folder, through huggingface_hub's own cache, offline mode and tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quac_plugins.core.files import copy_files, disk_errors, read_json
from quac_plugins.core.inject.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from quac_plugins.hub.verify import check_cached, check_file, check_hash, refuse_pickles

ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME)
MODEL_FILES = ("config.json", "model.safetensors")  # as timm saves a whole model
PIPELINE_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
)
FILES = {"adapter": ADAPTER_FILES, "model": MODEL_FILES, "pipeline": PIPELINE_FILES}  # of a kind; the last: weights
EXTRAS = ("README.md", "metrics.json")


def fetch(
    repo_id: str,
    revision: str | None = None,
    *,
    files: tuple[str, ...] = ADAPTER_FILES,
    optional: tuple[str, ...] = (),
    sha256: str | None = None,
    size: int | None = None,
    force: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Fetch files of one commit of a repository; interrupted downloads go on, and cached files are not sent again.

    Args:
        repo_id: ``"org/name"``.
        revision: branch, tag or commit; None: main.
        files: the required files; the last one holds the weights.
        optional: files that are fetched if they exist.
        sha256, size: hash, and size in bytes, of the weights, if they are known beforehand.
        force: fetch cached files again.
        token: the Hub's token. None: the token of ``hf auth login`` or ``HF_TOKEN``.
        cache_dir: the cache folder. None: ``HF_HUB_CACHE``.

    Returns:
        The folder of the commit in the cache.

    Raises:
        FileNotFoundError: the repository, revision or file does not exist, or is not in the cache while the Hub cannot
            be reached; the message tells which.
        PermissionError: the repository is gated.
        ConnectionError: the Hub answered with an error.
        ValueError: the name is no repository's; a file has another hash than the Hub or the caller tells; no hash is
            known to compare (offline, for a file with another kind of ETag); or the weights are a pickle.
    """
    wanted = (*files, *optional)
    folder = _snapshot(repo_id, revision, wanted, force, token, cache_dir)
    for name in wanted:
        if (folder / name).is_file():
            _verify(repo_id, folder, name, force, token, cache_dir)
        elif name in files:
            raise _incomplete(repo_id, revision, folder.name, name, token)
    check_file(folder / files[-1], sha256, size)
    return folder


def pull(
    repo_id: str,
    folder: str | Path | None = None,
    *,
    revision: str | None = None,
    force: bool = False,
    token: str | bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Fetch an adapter or a whole model from the Hub, with its card and figures, and verify it.

    Args:
        repo_id: ``"org/name"``.
        folder: the folder of the copy. None: the files stay in the cache.
        revision: branch, tag or commit.
        force: fetch cached files again.
        token: the Hub's token. None: the token of ``hf auth login`` or ``HF_TOKEN``.
        overwrite: replace other files of the same names (config, weights, README.md, metrics.json) in the folder.

    Returns:
        The folder of the files: ``load_adapter(model, folder)`` reads an adapter,
        ``timm.create_model("local-dir:FOLDER", pretrained=True)`` a model.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: see :func:`fetch`.
        FileExistsError: the folder holds another file of the same name; nothing was written.
    """
    options: dict[str, Any] = {"optional": EXTRAS, "force": force, "token": token}
    try:
        files = fetch(repo_id, revision, files=ADAPTER_FILES, **options)
    except FileNotFoundError as error:
        if not isinstance(error, _NotAnAdapter):
            raise
        files = fetch(repo_id, revision, files=MODEL_FILES, **options)
    if folder is None:
        return files
    wanted = (*ADAPTER_FILES, *MODEL_FILES, *EXTRAS)
    return copy_files([path for path in files.iterdir() if path.name in wanted], folder, overwrite)


def model_config(folder: Path) -> dict[str, Any]:
    """Read the config of a whole model; ValueError for any other file."""
    values = read_json(folder / MODEL_FILES[0])
    if not isinstance(values, dict):
        raise ValueError(f"{folder / MODEL_FILES[0]} holds a {type(values).__name__}, not the config of a model")
    return values


class _NotAnAdapter(FileNotFoundError):
    """The repository holds a whole model."""


def _snapshot(
    repo_id: str,
    revision: str | None,
    names: Iterable[str],
    force: bool,
    token: str | bool | None,
    cache_dir: str | Path | None,
) -> Path:
    """Fetch the existing files among ``names`` of one commit, and return the commit's folder in the cache.

    Files of one commit belong together, whatever is pushed meanwhile. If the Hub cannot be reached, the folder holds
    the cached files, all or some.
    """
    from huggingface_hub import constants, snapshot_download

    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    options: Any = {"revision": revision, "force_download": force, "token": token, "cache_dir": cache}
    try:
        with disk_errors(cache):
            folder = snapshot_download(repo_id, allow_patterns=list(names), library_name="quac-plugins", **options)
    except Exception as error:
        raise _explained(error, repo_id, revision) from error
    return Path(folder)


def _verify(
    repo_id: str, folder: Path, name: str, force: bool, token: str | bool | None, cache_dir: str | Path | None
) -> None:
    """Check that a file has the Hub's bytes; huggingface_hub compares their number alone.

    The cache names files by their ETag. If the ETag is no hash of the file, or another file's, the Hub is asked for the
    hash, and a file with another hash is fetched again: it may have been damaged here.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    path = folder / name
    try:
        return check_cached(path)
    except ValueError:
        if constants.HF_HUB_OFFLINE:
            raise
    try:
        (info,) = HfApi(token=token).get_paths_info(repo_id, name, revision=folder.name)
    except Exception as error:
        raise _explained(error, repo_id, folder.name) from error
    assert isinstance(info, RepoFile)
    said: str = info.lfs.sha256 if info.lfs is not None else info.blob_id
    try:
        check_hash(path, said)
    except ValueError:
        if force:
            raise
        _snapshot(repo_id, folder.name, (name,), True, token, cache_dir)
        check_hash(path, said)


def _incomplete(repo_id: str, revision: str | None, commit: str, name: str, token: str | bool | None) -> Exception:
    """Return the error for a repository that lacks a file, by the files that it has."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:
        names = HfApi(token=token).list_repo_files(repo_id, revision=commit)
    except Exception as error:
        missing = LocalEntryNotFoundError(f"{name} is not in the cache")
        missing.__cause__ = error
        return _explained(missing if is_network(error) else error, repo_id, revision)
    where = f"the Hub repository {repo_id!r} (revision {revision or 'main'})"
    try:
        refuse_pickles(
            names, where, WEIGHTS_NAME if name in ADAPTER_FILES else MODEL_FILES[-1] if name in MODEL_FILES else name
        )
    except ValueError as error:
        return error
    if set(MODEL_FILES) <= set(names):
        return _NotAnAdapter(
            f"{where} holds a whole model and no adapter: timm.create_model('hf-hub:{repo_id}', pretrained=True)"
        )
    return FileNotFoundError(f"{where} holds no {name}; it has {', '.join(sorted(names)[:8]) or 'nothing'}")


def _explained(error: Exception, repo_id: str, revision: str | None) -> Exception:
    """Translate an error of huggingface_hub into one of this package; other errors stay unchanged."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{where} is gated: ask for access on that page, then log in (hf auth login, HF_TOKEN)")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"no revision {revision!r} at {where}")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"there is no repository {where}, or it is private and you are not logged in as one who may read it "
            "(hf auth login, HF_TOKEN)"
        )
    if isinstance(error, OfflineModeIsEnabled) or (
        isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        return FileNotFoundError(
            f"{repo_id!r} (revision {revision or 'main'}) is not in the cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE forbids to look on the Hub"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return FileNotFoundError(
            f"{repo_id!r} (revision {revision or 'main'}) is not in the cache {constants.HF_HUB_CACHE}, and "
            f"{constants.ENDPOINT} could not be reached: {_first_line(error.__cause__ or error)}"
        )
    if isinstance(error, HfHubHTTPError) or is_network(error):
        return ConnectionError(f"{where} could not be read: {_first_line(error)}")
    return error


def is_network(error: BaseException) -> bool:
    """Return whether an error of an HTTP library means a failed connection; not all of these are OSErrors."""
    return isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in _HTTP


_HTTP = ("urllib3", "requests", "httpx", "httpx2", "httpcore")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
