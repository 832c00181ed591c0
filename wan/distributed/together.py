"""The work that ranks share: passes of the DiT, and the VAE's tiles. The first rank tells the others what to do."""

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

    With an odd number of ranks all ranks share the tokens of the prompt's pass, then those of the negative prompt's.

    Args:
        ranks: all ranks of the run.
        model: returns the DiT, which every rank has.
        opened: makes, from a list of prompts and further arguments, a context that yields a function for the flows.
    """

    def __init__(self, ranks: Ranks, model: Callable[[], Any], opened: Opened):
        self._ranks, self._model, self._opened = ranks, model, opened

    @contextlib.contextmanager
    def opened(self, prompts: Sequence[int], *args: Any) -> Iterator[Flows]:
        """On the lead: as the `opened` that was given, computed by all ranks; the flows are those of one process."""

        def flows(latent: torch.Tensor, step: int) -> list[torch.Tensor]:
            with self._ranks.step("flows", latent, step):
                return share(latent, step)

        with self._ranks.session("denoise", prompts, *args), self._share(prompts, *args) as share:
            yield flows

    def follow(self, prompts: Sequence[int], *args: Any) -> None:
        """On the others: computes this rank's share while the lead has the context open."""
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
    """Deals the VAE's tiles to the ranks in turn; see leanwan.vae.tiles.Share. Every rank gets all results."""

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
    """Layers around `encode` and `decode` of the lead's VAE that make the others do the same, by `vae_handlers`."""

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
    """The handlers of the others for the lead's encoding and decoding."""

    def encode(videos: list[torch.Tensor]) -> None:
        vae().encode(videos)

    def decode(zs: list[torch.Tensor], stored: Any) -> None:
        vae().decode(zs, stored=stored)
        if stored is not None:
            ranks.gather(stored.finite)

    return {"encode": encode, "decode": decode}
