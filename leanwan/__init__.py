"""Less memory for models of the Wan family that are built already, whatever tree their code is in.

`attach` applies any of the options to a pipeline and returns a function that undoes them. Its parts are functions of
their own, each of which returns its undo: `apply_tiling` and `visit_by_halves` for a VAE, `apply_chunking` for a DiT,
`visit_when_called` for any module; `Streamer` is a context manager for modules that are called in turn.

The package knows layers and tensors: no task, no checkpoint file, no program. It needs torch, einops and psutil.
"""

from .lazy import lazily

__version__ = "0.2.0"

_HOMES = {
    "InputError": "errors",
    "MemoryOptions": "options",
    "Streamer": "streaming",
    "apply_chunking": "dit.chunks",
    "apply_tiling": "vae.tiles",
    "attach": "foreign",
    "visit_by_halves": "residency",
    "visit_when_called": "residency",
}

__all__ = list(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
