"""Every memory option put on a built pipeline of the fork, and taken off, in every order, on the virtual GPU."""

import itertools
from contextlib import ExitStack

import pytest
import torch

from leanwan.dit.chunks import apply_chunking
from leanwan.residency import Component, visit_by_halves, visit_when_called
from leanwan.streaming import Streamer
from leanwan.vae.tiles import apply_tiling
from virtual_gpu import DEVICE, VirtualGPU
from wan import WanT2V, random_models
from wan.configs import WAN_CONFIGS
from wan.modules.vae import WanVAE

TASK = "t2v-tiny"


@pytest.fixture
def gpu():
    with VirtualGPU() as gpu:
        yield gpu
        assert gpu.live == 0


@pytest.fixture
def pipeline(gpu):
    pipeline = WanT2V(
        WAN_CONFIGS[TASK], random_models.checkpoint(TASK), device=DEVICE, on_event=lambda event: None
    )
    # As it comes from its file, with no option on it; the pipeline's own has some from the start.
    checkpoint = random_models.checkpoint(TASK) / pipeline.config.vae_checkpoint
    pipeline.vae = WanVAE(vae_pth=checkpoint, device="cpu", dim=pipeline.config.vae_dim)
    return pipeline


def stream(pipeline):
    """The DiT's layer groups through the device, the rest of it there; undone, all of it is home."""
    model = pipeline.model
    groups, embeddings = model.layer_groups(), model.embedding_layers()
    component = Component([model], DEVICE, [*groups, *embeddings], Streamer(groups, DEVICE))
    with ExitStack() as undo:
        undo.callback(component.leave)
        for embedding in embeddings:
            undo.callback(visit_when_called(embedding, DEVICE))
        component.arrive()
        return undo.pop_all().close


OPTIONS = {
    "dit_stream": stream,
    "dit_chunk": lambda pipeline: apply_chunking(pipeline.model, 64),
    "vae_tile": lambda pipeline: apply_tiling(pipeline.vae, 64),
    "visit_by_halves": lambda pipeline: visit_by_halves(pipeline.vae, DEVICE),
}


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flow(pipeline, streamed):
    """96 tokens through the DiT, on the device if its layers are there."""
    device = DEVICE if streamed else "cpu"
    inputs = normal(1, 16, 2, 12, 16), normal(2, 7, pipeline.model.text_embedding[0].in_features)
    latent, text = (tensor.to(device) for tensor in inputs)
    time = torch.tensor([500.0], device=device)
    with torch.no_grad():
        return pipeline.model([latent], t=time, context=[text], seq_len=96)[0].cpu()


def round_trip(pipeline):
    """A latent decoded, and frames encoded, both of more than one tile."""
    (video,) = pipeline.vae.decode([normal(3, 16, 1, 9, 2)])
    (latent,) = pipeline.vae.encode([normal(4, 3, 1, 72, 16).clamp(-1, 1)])
    return [video.cpu(), latent.cpu()]


def contents(pipeline):
    """What `vars` says of the models and of the modules in them: parameters, hooks, replaced methods."""
    found = {}
    for i, owner in enumerate([pipeline.vae, *pipeline.vae.model.modules(), *pipeline.model.modules()]):
        for key, value in vars(owner).items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            found |= {(i, key, name): entry for name, entry in inner}
    return found


def untouched(before, after):
    """Whether both hold the very same objects."""
    return before.keys() == after.keys() and all(before[key] is after[key] for key in before)


def test_options_come_and_go_in_any_order(gpu, pipeline):
    """All orders of coming; to each another order of going, so that all of these occur, too."""
    before = contents(pipeline)
    fresh = [flow(pipeline, streamed=False), *round_trip(pipeline)]
    orders = list(itertools.permutations(OPTIONS))
    for number, order in enumerate(orders):
        undo = {option: OPTIONS[option](pipeline) for option in order}
        applied = [flow(pipeline, streamed=True), *round_trip(pipeline)]
        assert torch.equal(applied[0], fresh[0]), order
        for with_options, without in zip(applied[1:], fresh[1:]):
            assert (with_options - without).abs().max() <= 1e-5 * max(1, without.abs().max()), order
        for option in orders[(7 * number + 5) % len(orders)]:
            undo[option]()
        assert untouched(before, contents(pipeline)) and gpu.live == 0, order
        again = [flow(pipeline, streamed=False), *round_trip(pipeline)]
        assert all(map(torch.equal, again, fresh)), order


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_shows_while_it_is_on_and_is_refused_twice(gpu, pipeline, option):
    before = contents(pipeline)
    assert before
    undo = OPTIONS[option](pipeline)
    assert not untouched(before, contents(pipeline))
    with pytest.raises(RuntimeError, match="applied already"):
        OPTIONS[option](pipeline)
    undo()
    assert untouched(before, contents(pipeline))
