"""Decides whether this PyTorch can have a virtual GPU."""

from __future__ import annotations

import unittest

import torch
from torch.utils import backend_registration

set_up = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)

# Why there can be no virtual GPU, in a line; empty if there can.
LACK = "" if set_up else f"the virtual GPU needs PyTorch 2.10 or newer, this is {torch.__version__}"


class UnsupportedError(unittest.SkipTest):
    """This PyTorch can have no virtual GPU. Test runners skip the test that meets it, and tell the message."""


def require() -> None:
    """Raises UnsupportedError if this PyTorch can have no virtual GPU."""
    if LACK:
        raise UnsupportedError(LACK)
