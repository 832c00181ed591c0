"""What a card, and PyTorch on it, take beside the tensors that the code makes."""

from __future__ import annotations

from typing import NamedTuple

from leanwan.budget import workspace_bytes

from ...modules.attention import FUSED, IN_PIECES, piece_of


class Card(NamedTuple):
    """A device, to those who predict what a run takes of it.

    Attributes:
        capability: CUDA's compute capability; None of a device that is none of CUDA's: its libraries take nothing, and
            its attention holds the scores of fp32.
        kernel: of the DiT's attention, as modules/attention.py names it.
        exact: whether runs on it are in exact_arithmetic.
    """

    capability: tuple[int, int] | None = None
    kernel: str = FUSED
    exact: bool = False

    @property
    def workspaces(self) -> tuple[int, int]:
        """Bytes that cuBLAS keeps from its first products on, and cublasLt."""
        return workspace_bytes(self.capability, self.exact) if self.capability else (0, 0)


NOT_CUDA = Card()


def beside_attention(card: Card, heads: int, rows: int, keys: int, width: int, itemsize: int) -> list[int]:
    """Bytes of the tensors that are there at once beside the result of attention, until it is done.

    PyTorch's flash-attn, and the package's, return the logarithm of each row's sum and the state of a random generator;
    its memory-efficient kernel makes nothing where nothing is trained. Measured with PyTorch 2.10's own code.

    Args:
        card: its kernel is the one that computes.
        heads, rows, keys, width: rows of all samples together.
        itemsize: bytes of a number of queries, keys and values.
    """
    scores = 4 * heads * rows * keys
    if card.kernel == IN_PIECES:
        step, group = piece_of(rows, keys, heads)
        of_keys, of_rows = 4 * group * keys * width, 4 * group * step * width  # in fp32
        fused = card.capability is not None and itemsize < 4  # in fp32, if the type was the trouble
        return [
            of_keys,
            of_keys,
            of_rows,
            of_rows,
            *([] if fused else [scores * group * step // (heads * rows)]),
        ]
    if card.capability is None:
        return [scores] if itemsize == 4 else []
    return [4 * heads * rows, 8, 8] if itemsize < 4 and card.capability >= (8, 0) else []
