"""From the Hub to a verified local folder, through huggingface_hub's own cache, offline mode and tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quac_plugins.core.files import copy_files, disk_errors, read_json
from quac_plugins.core.inject.saved import CONFIG_NAME, WEIGHTS_NAME
from quac_plugins.hub.verify import check_cached, check_file, refuse_pickles

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
    """Fetch files of one commit of a repository; interrupted downloads go on, what the cache has is not sent again.

    Args:
        repo_id: ``"org/name"``.
        revision: branch, tag or commit; None: main.
        files: what must be there; the last one holds the weights.
        optional: what is fetched if it is there.
        sha256, size: of the weights, where they are known beforehand.
        force: fetch again what the cache has.
        token: as everywhere on the Hub: None is the one of ``hf auth login`` or ``HF_TOKEN``.
        cache_dir: in the place of ``HF_HUB_CACHE``.

    Returns:
        The folder of the commit in the cache.

    Raises:
        FileNotFoundError: there is no such repository, revision or file, or it is not in the cache and the Hub cannot
            be reached; the message says which.
        PermissionError: the repository is gated.
        ConnectionError: the Hub answered with an error.
        ValueError: the name is not one of a repository, a file is not what the Hub or the caller says, the Hub says
            of a file no hash to compare it with, or the weights are a pickle.
    """
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    commit, folder = revision, Path()
    for name in (*files, *optional):
        try:
            path = _verified(repo_id, name, commit, force, token, cache_dir)
        except LocalEntryNotFoundError as error:
            if name in optional:
                continue
            raise _explained(error, repo_id, revision) from error
        except EntryNotFoundError as error:
            if name in optional:
                continue
            raise _incomplete(repo_id, commit, name, token) from error
        except Exception as error:
            raise _explained(error, repo_id, revision) from error
        folder = path.parents[name.count("/")]
        commit = folder.name  # the files of one commit belong together, whatever is pushed meanwhile
        if name == files[-1]:
            check_file(path, sha256, size)
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
        folder: where to copy it; None leaves it in the cache.
        revision: branch, tag or commit.
        force: fetch again what the cache has.
        token: None is the one of ``hf auth login`` or ``HF_TOKEN``.
        overwrite: replace other files of the same names (config, weights, README.md, metrics.json) in the folder.

    Returns:
        The folder that holds it: ``load_adapter(model, folder)`` reads an adapter,
        ``timm.create_model("local-dir:FOLDER", pretrained=True)`` a model.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError, ValueError: see :func:`fetch`.
        FileExistsError: another file of such a name is in the folder; nothing was written.
    """
    options: dict[str, Any] = {"optional": EXTRAS, "force": force, "token": token}
    try:
        found = fetch(repo_id, revision, files=ADAPTER_FILES, **options)
    except FileNotFoundError as error:
        if not isinstance(error, _NotAnAdapter):
            raise
        found = fetch(repo_id, revision, files=MODEL_FILES, **options)
    if folder is None:
        return found
    wanted = (*ADAPTER_FILES, *MODEL_FILES, *EXTRAS)
    return copy_files([path for path in found.iterdir() if path.name in wanted], folder, overwrite)


def model_config(folder: Path) -> dict[str, Any]:
    """What the config of a whole model says; ValueError if it is none."""
    values = read_json(folder / MODEL_FILES[0])
    if not isinstance(values, dict):
        raise ValueError(f"{folder / MODEL_FILES[0]} holds a {type(values).__name__}, not the config of a model")
    return values


class _NotAnAdapter(FileNotFoundError):
    """The repository holds a whole model."""


def _verified(
    repo_id: str, name: str, revision: str | None, force: bool, token: str | bool | None, cache_dir: str | Path | None
) -> Path:
    """The cache's file, with the bytes that the Hub has; huggingface_hub looks at their number alone."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    cache = Path(cache_dir or constants.HF_HUB_CACHE)

    def download(again: bool) -> Path:
        options: Any = {"revision": revision, "force_download": again, "token": token, "cache_dir": cache}
        with _one_at_a_time(repo_id, name, cache), disk_errors(cache):
            return Path(hf_hub_download(repo_id, name, library_name="quac-plugins", **options))

    def told() -> str | None:
        if constants.HF_HUB_OFFLINE:
            return None
        return get_hf_file_metadata(hf_hub_url(repo_id, name, revision=revision), token=token).etag

    path = download(force)
    try:
        check_cached(path, told)
    except ValueError:
        if force or constants.HF_HUB_OFFLINE:
            raise
        check_cached(path := download(True), told)  # it may have been damaged here, and not where it comes from
    return path


_PATIENCE = 30
"""Seconds that one waits for another's download before both go on, with huggingface_hub's own lock between them."""


@contextlib.contextmanager
def _one_at_a_time(repo_id: str, name: str, cache: Path) -> Iterator[None]:
    """Let the others that want the same file wait.

    Of two that fetch a file at once, huggingface_hub 0.23 lets the second take away the link that the first one was
    given, and make it again; the first would miss the file in between.
    """
    from filelock import FileLock
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield
        return
    path = cache / ".locks" / f"quac-plugins--{repo_id}--{name}.lock".replace("/", "--")
    with contextlib.ExitStack() as held:
        # without, in a cache that may only be read or where nothing can be locked, and if the other takes too long
        with contextlib.suppress(OSError, NotImplementedError):
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path, timeout=_PATIENCE, mode=0o664))
        yield


def _incomplete(repo_id: str, revision: str | None, name: str, token: str | bool | None) -> Exception:
    """What a repository that lacks a file holds in its place."""
    from huggingface_hub import HfApi

    try:
        names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    except Exception as error:
        return _explained(error, repo_id, revision)
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
    """An error of huggingface_hub in the words of this package; others as they are."""
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
    """Whether a connection failed, as huggingface_hub's HTTP libraries say it; not all of their errors are OSErrors."""
    return isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in _HTTP


_HTTP = ("urllib3", "requests", "httpx", "httpx2", "httpcore")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
