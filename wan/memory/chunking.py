"""Tokens through the DiT's layers in chunks.

The forward pass itself, whole or in chunks, is modules/forward.py; this sets it up on a built model.
"""

import functools

from ..modules.forward import dit_forward
from ..utils.errors import InputError

SMALLEST_CHUNK = 64  # tokens; below it, matrix products round otherwise than whole ones


def check_chunk(tokens):
    """Raises InputError unless `tokens` is 0 (whole) or a usable chunk."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or (tokens != 0 and tokens < SMALLEST_CHUNK):
        raise InputError(f"--dit_chunk {tokens}: give 0 for all tokens, or a number from {SMALLEST_CHUNK}")


def apply_chunking(model, tokens):
    """Makes a DiT work through its layers `tokens` tokens at a time, 0 for all.

    A model whose class does not use modules/forward.py, but names its modules as checkpoints do, gets that forward
    pass with the call signature of its own.

    Raises InputError for a number of tokens that cannot work.
    """
    check_chunk(tokens)
    if not hasattr(model, "chunk"):
        model.forward = functools.partial(dit_forward, model)
    model.chunk = tokens
