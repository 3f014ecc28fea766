"""Expanding q to the rows of a batch that holds every image several times."""

from __future__ import annotations

from torch import Tensor

EXPANSIONS = ("error", "interleave", "tile")


def can_expand(images: int, rows: int, how: str) -> bool:
    """Return whether the policy ``how`` can expand a q of ``images`` rows to a batch of ``rows``."""
    return rows == images or (how != "error" and images > 0 and rows % images == 0)


def expand_rows(q: Tensor, rows: int, how: str) -> Tensor:
    """Expand q (B, Q) to (rows, Q).

    Args:
        q: (B, Q), one row an image.
        rows: a multiple of B.
        how: ``"interleave"`` (the rows of one image lie together, as windows of an image do) or ``"tile"`` (the batch
            is repeated whole, as classifier-free guidance does).

    Example:
        >>> import torch
        >>> q = torch.tensor([[1.0], [2.0]])
        >>> expand_rows(q, 4, "interleave").flatten().tolist(), expand_rows(q, 4, "tile").flatten().tolist()
        ([1.0, 1.0, 2.0, 2.0], [1.0, 2.0, 1.0, 2.0])
    """
    images = q.shape[0]  # len(q) would be a constant to torch.export
    if rows == images:
        return q
    times = rows // images
    return q.repeat_interleave(times, dim=0) if how == "interleave" else q.repeat(times, 1)
