"""Operators whose libraries do not work on the stand-in: they give their results' memory and no more.

cuDNN's convolution and cuSOLVER's systems of equations. What calls them stays CUDA's own code: layouts, bias, which
library is chosen.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

_libraries: list[torch.library.Library] = []  # an implementation lasts as long as its library


def convolution(
    x: torch.Tensor, weight: torch.Tensor, padding: Any, stride: Any, dilation: Any, *_: Any
) -> torch.Tensor:
    """As cuDNN's: [N, C, ...] and [O, C / groups, ...] give [N, O, ...]; what is not contiguous is copied first."""
    x, weight = x.contiguous(), weight.contiguous()
    sizes = [
        (size + 2 * pad - step * (kernel - 1) - 1) // move + 1
        for size, kernel, pad, move, step in zip(x.shape[2:], weight.shape[2:], padding, stride, dilation)
    ]
    return x.new_empty([x.shape[0], weight.shape[0], *sizes])


def solve(
    a: torch.Tensor, b: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As cuSOLVER's: solution, LU decomposition, pivots and error codes."""
    pivots = a.new_empty(a.shape[:-1], dtype=torch.int32)
    return torch.empty_like(b), torch.empty_like(a), pivots, a.new_zeros(a.shape[:-2], dtype=torch.int32)


def install() -> None:
    """For CUDA tensors, in this process."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they replace CUDA's is what they are for
        library.impl("cudnn_convolution", convolution, "CUDA")
        library.impl("_linalg_solve_ex", solve, "CUDA")
    _libraries.append(library)
