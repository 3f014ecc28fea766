"""Checkpoints of interrupted fits: a folder keeps the state of each stage, which only the same fit may use."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from quac_plugins.core.files import write_file


class Checkpoints:
    """The states of a fit in a folder, one file a stage.

    Args:
        folder: the folder, which is made if it does not exist. None: no state is kept.
        key: the identity of the fit (host, pictures, recipe, …), JSON-serializable; a state with another key is not
            used.
        writes: whether this process writes; one of several does.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, key: dict[str, Any], writes: bool = True):
        self.folder = Path(folder) if folder is not None else None
        self.digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self.writes = writes
        self._own: set[Path] = set()  # files of this very fit
        self._made = self.folder is not None and not self.folder.exists()  # by this fit, be it in an earlier process
        if self.folder is not None and writes:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"checkpoint={str(folder)!r}: no folder can be made there: {error}") from error

    def _path(self, stage: str) -> Path | None:
        return None if self.folder is None else self.folder / f"fit-{stage}.pt"

    def load(self, stage: str, of: str = "") -> dict[str, Any] | None:
        """Return the state of a stage, or None if there is none.

        Args:
            stage: the name of the stage.
            of: a further part of the key, such as a hash of the stage's pictures.

        Raises:
            ValueError: the state belongs to another fit, or is damaged.
        """
        path = self._path(stage)
        if path is None or not path.is_file():
            return None
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            digest, state, is_complete = stored["digest"], stored["state"], bool(stored["made"])
        except Exception as error:  # a damaged archive raises anything, from KeyError to UnpicklingError
            raise ValueError(
                f"{path} is no state of a fit that can be read ({type(error).__name__}); delete it to start again"
            ) from error
        if digest != self.digest + of:
            raise ValueError(
                f"{path} belongs to another fit (other images, corruptions, options, or another host); delete it, or "
                "give another folder"
            )
        self._own.add(path)
        self._made = self._made or is_complete
        return state

    def damaged(self, stage: str, error: Exception) -> ValueError:
        """Return the error for a damaged state."""
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        return ValueError(f"{self._path(stage)} is no whole state of this fit: it {what}; delete it to start again")

    def save(self, stage: str, state: dict[str, Any], of: str = "") -> None:
        """Write the state of a stage, whole or not at all.

        A state that cannot be written, as on a full disk, is a warning: the fit itself goes on.
        """
        path = self._path(stage)
        if path is None or not self.writes:
            return
        buffer = io.BytesIO()  # torch tells of a full disk in words of its own
        torch.save({"digest": self.digest + of, "state": state, "made": self._made}, buffer)
        try:
            write_file(path, buffer.getvalue())
        except OSError as error:
            warnings.warn(f"{error}. The fit goes on, but could not be resumed from here", stacklevel=3)
            return
        self._own.add(path)

    def clear(self) -> None:
        """Delete the states of this fit, and nothing else, once the fit is saved."""
        if self.folder is None or not self.writes:
            return
        for path in self._own:
            path.unlink(missing_ok=True)
        if self._made:
            with contextlib.suppress(OSError):  # there is something else in it
                self.folder.rmdir()
