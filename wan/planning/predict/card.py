"""What a card, and PyTorch on it, take beside the tensors that the code makes."""

from __future__ import annotations

from typing import NamedTuple

from leanwan.budget import workspace_bytes

from ...modules.attention import FUSED, IN_PIECES, piece_of


class Card(NamedTuple):
    """A device, as the predictors need to know it.

    Attributes:
        capability: CUDA's compute capability; None for a device without CUDA, whose libraries take no workspaces and
            whose attention in fp32 holds all scores.
        kernel: of the DiT's attention, as modules/attention.py names it.
        exact: whether runs on it are in exact_arithmetic.
    """

    capability: tuple[int, int] | None = None
    kernel: str = FUSED
    exact: bool = False

    @property
    def workspaces(self) -> tuple[int, int]:
        """Bytes of the workspaces of cuBLAS and of cublasLt, which they keep from their first products on."""
        return workspace_bytes(self.capability, self.exact) if self.capability else (0, 0)


NOT_CUDA = Card()


def beside_attention(card: Card, heads: int, rows: int, keys: int, width: int, itemsize: int) -> list[int]:
    """Bytes of the tensors that attention holds at once beside its result, while it computes.

    The flash-attn kernels of PyTorch and of the package return the logarithm of each row's sum and the state of a
    random generator; PyTorch's memory-efficient kernel makes nothing in inference. Measured with PyTorch 2.10.

    Args:
        card: its kernel is the one that computes.
        heads, rows, keys, width: of the call; rows of all samples together.
        itemsize: bytes of a number of queries, keys and values.
    """
    scores = 4 * heads * rows * keys
    if card.kernel == IN_PIECES:
        step, group = piece_of(rows, keys, heads)
        of_keys, of_rows = 4 * group * keys * width, 4 * group * step * width  # in fp32
        fused = card.capability is not None and itemsize < 4  # kernels that refuse bf16 take fp32 pieces
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
