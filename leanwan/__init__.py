"""Less memory for models that are built already: nothing here knows a task.

`attach` does all of it, for this package's pipelines' kin in other trees; its parts are functions of their own, each
of which returns its undo: `apply_tiling` and `visit_by_halves` for a VAE, `visit_when_called` for any module,
`apply_chunking` for a DiT, and `Streamer`, a context manager, for modules that are called in turn.

It needs of the package this folder and what its files import, of modules/ and utils/, under a package of any name.
"""

from .lazy import lazily

_HOMES = {
    "MemoryOptions": "options",
    "Streamer": "streaming",
    "apply_chunking": "chunking",
    "apply_tiling": "vae_tiling",
    "attach": "retrofit",
    "visit_by_halves": "residency",
    "visit_when_called": "residency",
}

__all__ = list(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
