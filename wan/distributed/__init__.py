"""Several processes, a GPU each, that make one video: the same bits as one process makes.

torchrun starts them. The first rank leads: it runs the request as a single process does, and the others follow its
calls. Ranks share the two passes of guidance (CFG), the tokens of a pass, the tiles of the VAE, and with FSDP the
weights. Work is cut where chunks, heads and tiles are cut, so that each number is computed as in one process.

Nothing of torch.distributed is imported before ranks are joined.
"""

import os


def started_as_one_of_several() -> bool:
    """Whether torchrun, or something like it, started this process and others beside it."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("0", "1")
