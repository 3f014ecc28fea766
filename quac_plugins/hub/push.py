"""Sending an adapter or a whole model to the Hub, with a card and its figures, in one commit."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from quac_plugins.core.files import copy_files, disk_errors
from quac_plugins.core.inject.adapter import check_adapter_files, is_fresh, write_files
from quac_plugins.core.inject.adapter_files import WEIGHTS_NAME
from quac_plugins.core.inject.savable import check_savable
from quac_plugins.core.inject.surgery import injection_of, nothing_inside
from quac_plugins.evaluate.report import EvaluationReport
from quac_plugins.hub.card import make_card, read_metrics
from quac_plugins.hub.fetch import ADAPTER_FILES, EXTRAS, MODEL_FILES, is_network
from quac_plugins.hub.published import Published
from quac_plugins.hub.verify import refuse_pickles, sha256_of
from quac_plugins.registry import KINDS, is_published_name, published


@dataclass(frozen=True)
class Pushed:
    """The files of a commit, sent or (after a dry run) written to a folder.

    Attributes:
        repo_id: ``org/name``.
        files: name → (bytes, SHA-256), as a registry's entry takes them.
        commit: the commit on the Hub; None after a dry run.
        url: the address of the commit; None after a dry run.
        folder: the folder of the files after a dry run, else None.
    """

    repo_id: str
    files: dict[str, tuple[int, str]]
    commit: str | None = None
    url: str | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        """Return a line for each file."""
        lines = [f"{name}  {size} bytes  sha256 {digest}" for name, (size, digest) in self.files.items()]
        return "\n".join([self.url or f"{self.folder} (nothing was sent)", *lines])


def push(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    whole: bool | None = None,
    metrics: Any = None,
    fit: Any = None,
    base_model: str | None = None,
    license: str | None = None,
    description: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    dry_run: str | Path | None = None,
    overwrite: bool = False,
) -> Pushed:
    """Send the adapter of a model, or the whole model, to the Hub.

    The card is rendered from the model's content and from result files; no figure is typed.

    Args:
        model: a model with QuAC or a prior inside, or a folder of :func:`save_adapter` or of timm's ``save_for_hf``.
        repo_id: ``"org/name"``, which is made if it does not exist. With ``dry_run`` also a ``NAME.TAG`` of files to
            embed.
        whole: send the host's weights too. A model of timm is read back by
            ``timm.create_model("hf-hub:org/name", pretrained=True)``, one of a class ``QuACNAME`` of
            :mod:`quac_plugins.transformers` by its ``from_pretrained``. None or False: the adapter alone.
        metrics: the evaluation: an :class:`EvaluationReport`, the path of its JSON, or several of these, one for each
            seed.
        fit: the :class:`FitReport` of the fit, or the path of its JSON, for the card. None: the folder's own report,
            which `quac fit-prior` writes, if there is one.
        base_model: the name of the host's weights on the Hub, such as ``"timm/resnet50.a1_in1k"``. A model does not
            tell it; without it the card gives the weights' fingerprint alone.
        license: the license of the weights, such as ``"apache-2.0"``.
        description: a paragraph for the card.
        private: whether a new repository is private; an existing one stays unchanged.
        revision: a branch, which is made if it does not exist. None: main.
        commit_message: the message. None: it names the files.
        token: the Hub's token. None: the token of ``hf auth login`` or ``HF_TOKEN``.
        dry_run: a folder, into which the files are written; nothing is sent.
        overwrite: replace other files of the same names in the folder of ``dry_run``.

    Returns:
        The commit, and each file with its size and hash.

    Raises:
        FileNotFoundError: the folder does not exist, or holds neither an adapter nor a model.
        ValueError: the model holds nothing to send, a file is damaged or a pickle, or a figure cannot be read.
        FileExistsError: the folder of ``dry_run`` holds another file of the same name; nothing was written.
        PermissionError: the Hub refused the token.
        ConnectionError: the Hub could not be reached, or answered with an error.

    Example:
        >>> import tempfile, timm, quac_plugins as quac
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pushed = quac.push(timm.create_model("test_resnet_qacon"), "me/my-adapter", dry_run=folder)
        ...     sorted(pushed.files)
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    from huggingface_hub.utils import validate_repo_id

    from quac_plugins.fit.report import REPORT_NAME

    validate_repo_id(repo_id)
    if repo_id.count("/") != 1 and not (dry_run is not None and is_published_name(repo_id)):
        raise ValueError(f"repo_id must be 'org/name', got {repo_id!r}")
    with disk_errors(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="quac-push-") as temporary:
        folder = Path(temporary)
        _stage(model, folder, whole)
        if fit is None and isinstance(model, (str, Path)) and (Path(model) / REPORT_NAME).is_file():
            fit = Path(model) / REPORT_NAME
        reports = read_metrics(metrics)
        if reports:
            _check_whose(reports, folder / WEIGHTS_NAME)
            text = json.dumps([_without_paths(report.to_dict()) for report in reports], indent=1, allow_nan=False)
            (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
        card = make_card(folder, repo_id, reports, fit, base_model, license, description)
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = {path.name: (path.stat().st_size, sha256_of(path)) for path in sorted(folder.iterdir())}
        if dry_run is not None:
            return Pushed(repo_id, files, folder=copy_files(folder.iterdir(), dry_run, overwrite))
        what = "model" if MODEL_FILES[-1] in files else "adapter"
        message, sent = commit_message or f"Upload {what} with quac-plugins", {name: folder / name for name in files}
        info = _send(sent, repo_id, private, revision, message, token)
        return Pushed(repo_id, files, commit=info.oid, url=info.commit_url)


def push_all(organization: str, private: bool | None = None, token: str | bool | None = None) -> list[Pushed]:
    """Send every embedded model of the package, unchanged, to ``organization/NAME.TAG`` on the Hub.

    With ``QUAC_HUB=organization`` the names are then read from that organization.

    Args:
        organization: an organization or a user on the Hub.
        private, token: see :func:`push`.

    Returns:
        The commit of each model, in the order of the names.

    Raises:
        ValueError: a file has another hash than the registry's.
        PermissionError, ConnectionError: see :func:`push`; earlier models have been sent.
    """
    from huggingface_hub.utils import validate_repo_id

    models = [Published(entry.name, entry, door=door) for door in KINDS for entry in published(door).values()]
    folders = {each.name: each.folder() for each in models if each.entry is not None and each.entry.repo is None}
    pushed = []
    for name, folder in sorted(folders.items()):
        repo_id = f"{organization}/{name}"
        validate_repo_id(repo_id)
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        info = _send(files, repo_id, private, None, f"Upload {name} with quac-plugins", token)
        told = {at: (path.stat().st_size, sha256_of(path)) for at, path in files.items()}
        pushed.append(Pushed(repo_id, told, commit=info.oid, url=info.commit_url))
    return pushed


def _check_whose(reports: list[EvaluationReport], weights: Path) -> None:
    """Warn if the reports know their adapter, and none is of the adapter in this file."""
    judged = [(report.network["inside"] or {}).get("sha256") for report in reports if "inside" in report.network]
    if not weights.is_file() or len(judged) < len(reports):
        return
    pushed = sha256_of(weights)
    if not {pushed, _in_single_precision(weights)}.intersection(judged):
        names = ", ".join(dict.fromkeys(report.label for report in reports))
        warnings.warn(
            f"the figures are of {names}, and none of them of the adapter that is pushed (SHA-256 {pushed[:6]}…): "
            "quac evaluate … --adapter FOLDER --json FILE",
            stacklevel=3,
        )


def _in_single_precision(weights: Path) -> str:
    """Return the hash of a half precision adapter after a host in float32 has loaded it."""
    state = {n: t.float() if t.is_floating_point() else t for n, t in safetensors.torch.load_file(weights).items()}
    return hashlib.sha256(safetensors.torch.save(state, metadata={"format": "pt"})).hexdigest()


def _without_paths(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report with the names of files and folders alone, without paths and pictures, which are private."""
    names = [Path(path).name for path in report["unreadable"]]
    arguments = dict(report["network"].get("given") or {})
    for key, place in (("base_checkpoint", "path"), ("checkpoint", "path"), ("adapter", "name")):
        if arguments.get(key) is not None:
            arguments[key] = {**arguments[key], place: Path(arguments[key][place]).name}
    network = {**report["network"], **({"given": arguments} if arguments else {})}
    return {**report, "data": Path(report["data"]).name, "unreadable": names, "network": network, "outcomes": {}}


def _stage(model: nn.Module | str | Path, folder: Path, whole: bool | None) -> None:
    """Put the files of an adapter or of a model into a folder."""
    if isinstance(model, nn.Module):
        if whole:
            from timm.models import save_for_hf

            of_timm, own = isinstance(getattr(model, "pretrained_cfg", None), dict), hasattr(model, "host_class")
            if not of_timm and not (own and hasattr(model, "save_pretrained")):
                raise ValueError(
                    f"whole=True needs a model of timm, or one whose class keeps QuAC in its config (of transformers: "
                    f"quac_plugins.transformers.quac_class(type(model)).from_host(model)), got {type(model).__name__}; "
                    "leave it out to send the adapter"
                )
            check_savable({"": model}, dict(model.named_parameters()))
            if not of_timm:
                model.save_pretrained(folder)  # type: ignore[operator]
                return
            record = injection_of(model)
            if record is not None and record.changed is not None:
                record.changed(model)  # timm has noted the arguments as they were given, with regular expressions
            packing = model.register_state_dict_post_hook(_pack)
            try:
                save_for_hf(model, str(folder), safe_serialization=True)
            finally:
                packing.remove()
            return
        record = injection_of(model)
        if record is None:
            raise nothing_inside(model, "inject first, or give whole=True to send a model of timm")
        if record.prior is not None and record.config is None and is_fresh(model):
            raise ValueError("the prior is as it was created, so that it changes nothing; fit_prior(model, …) first")
        write_files(model, folder)
        return
    source = Path(model)
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder {source} to push")
    names = [path.name for path in source.iterdir()]
    wanted = next((files for files in (ADAPTER_FILES, MODEL_FILES) if set(files) <= set(names)), None)
    if wanted is None:
        refuse_pickles(names, str(source), WEIGHTS_NAME)
        raise FileNotFoundError(
            f"{source} holds neither an adapter ({', '.join(ADAPTER_FILES)}) nor a model ({', '.join(MODEL_FILES)})"
        )
    if wanted is ADAPTER_FILES:
        check_adapter_files(source)
    for name in (*wanted, *(n for n in EXTRAS[1:] if n in names)):
        shutil.copyfile(source / name, folder / name)
    if wanted is ADAPTER_FILES:
        check_adapter_files(folder)  # of a save that was killed here, the two may not belong together


def _pack(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Copy the tensors of a state dict into the form of safetensors: contiguous, and none a part of another."""
    for name, tensor in state.items():
        state[name] = tensor.detach().clone(memory_format=torch.contiguous_format)


def _send(
    files: dict[str, Path],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    message: str,
    token: str | bool | None,
) -> Any:
    """Send files, by their names in the repository, in one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.utils import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(token=token, library_name="quac-plugins")
    operations: Sequence[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"nothing was sent to {repo_id!r}: HF_HUB_OFFLINE forbids it; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        said = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if status in (401, 403):
            raise PermissionError(
                f"{constants.ENDPOINT} refused to write {repo_id!r} ({status}): log in with a token that may write "
                f"there (hf auth login, HF_TOKEN). It said: {said}"
            ) from error
        raise ConnectionError(f"{constants.ENDPOINT} did not take {repo_id!r} ({status}): {said}") from error
    except Exception as error:
        if not is_network(error) and not is_network(error.__cause__ or error):
            raise
        raise ConnectionError(
            f"{constants.ENDPOINT} could not be reached, or broke off: {type(error).__name__}: {error}"
        ) from error
