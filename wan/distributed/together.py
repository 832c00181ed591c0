"""What the ranks do together of a pipeline's work: passes of the DiT, and the VAE's tiles. The first one asks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from leanwan.vae.tiles import Index

from ..sampling import Flows
from .ranks import Ranks
from .sequence import apply_ranks

Opened = Callable[..., contextlib.AbstractContextManager[Flows]]


class SharedPasses:
    """Passes of the DiT: prompt and negative prompt on half of the ranks each, tokens over the ranks of a half.

    With an odd number of ranks all share the tokens of the one, then of the other.

    Args:
        ranks: see there.
        model: gives the DiT, which every rank has.
        opened: makes a context, inside which the DiT gives flows, of a list of prompts and whatever else.
    """

    def __init__(self, ranks: Ranks, model: Callable[[], Any], opened: Opened):
        self._ranks, self._model, self._opened = ranks, model, opened

    @contextlib.contextmanager
    def opened(self, prompts: Sequence[int], *args: Any) -> Iterator[Flows]:
        """On the lead: as what was handed in, for all ranks. Their answers are those of one process."""

        def flows(latent: torch.Tensor, step: int) -> list[torch.Tensor]:
            with self._ranks.step("flows", latent, step):
                return share(latent, step)

        with self._ranks.session("denoise", prompts, *args), self._share(prompts, *args) as share:
            yield flows

    def follow(self, prompts: Sequence[int], *args: Any) -> None:
        """On the others, while the lead has it open."""
        with self._share(prompts, *args) as share:
            self._ranks.serve({"flows": share})

    @contextlib.contextmanager
    def _share(self, prompts: Sequence[int], *args: Any) -> Iterator[Flows]:
        ranks = self._ranks
        team, firsts = ranks.team(len(prompts)), ranks.teams(len(prompts))
        apart = len(firsts) > 1
        undo = apply_ranks(self._model(), team)
        try:
            with self._opened([prompts[team.number]] if apart else prompts, *args) as flows:

                def share(latent: torch.Tensor, step: int) -> list[torch.Tensor]:
                    found = flows(latent.to(ranks.device), step)
                    return [ranks.bring(found[0], first) for first in firsts] if apart else found

                yield share
        finally:
            undo()


class SharedTiles:
    """Tiles of the VAE over the ranks, in turn; see leanwan.vae.tiles.Share. Each rank gets all of them."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks

    def agreed(self, tile: int) -> int:
        return self._ranks.share(tile)

    def mine(self, number: int) -> bool:
        return number % self._ranks.size == self._ranks.rank

    def complete(self, target: torch.Tensor, places: Sequence[Index]) -> None:
        for number, place in enumerate(places):
            piece = target[place].contiguous()
            self._ranks.spread(piece, number % self._ranks.size)
            if not self.mine(number):
                target[place] = piece


def lead_vae(ranks: Ranks) -> Mapping[str, Callable[[Callable], Callable]]:
    """Layers around the `encode` and `decode` of the lead's VAE: the others do the same, see `vae_handlers`."""

    def encode(inner: Callable) -> Callable:
        def encoded(videos: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            with ranks.step("encode", list(videos)):
                return inner(videos)

        return encoded

    def decode(inner: Callable) -> Callable:
        def decoded(zs: Sequence[torch.Tensor], *, stored: Any = None) -> list[torch.Tensor]:
            with ranks.step("decode", list(zs), stored):
                videos = inner(zs, stored=stored)
                if stored is not None:
                    stored.finite = all(ranks.gather(stored.finite))
                return videos

        return decoded

    return {"encode": encode, "decode": decode}


def vae_handlers(ranks: Ranks, vae: Callable[[], Any]) -> dict[str, Callable[..., None]]:
    """What the others do when the lead encodes and decodes."""

    def encode(videos: list[torch.Tensor]) -> None:
        vae().encode(videos)

    def decode(zs: list[torch.Tensor], stored: Any) -> None:
        vae().decode(zs, stored=stored)
        if stored is not None:
            ranks.gather(stored.finite)

    return {"encode": encode, "decode": decode}
