"""Tries leanwan on another tree made from Wan2.1, at toy width in fp32, its code as it is.

    python -m benchmarks.other_trees CHECKOUT [--package wan/modules]

Every module of the folder that defines Wan's VAE, a DiT with `blocks` or the T5 encoder is built with random weights
and run as it is, then with `attach`: the VAE by tiles, the others streamed through the virtual GPU, the DiT by chunks
too.
Printed are the largest differences, or what was refused and why; and whether the tree, undone, gives what it gave.

Nothing else of the tree is imported. Its libraries that are missing here are replaced by empty stand-ins, and its
attention by PyTorch's.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

from leanwan import attach
from virtual_gpu import LACK, VirtualGPU

ROOT = Path(__file__).resolve().parents[1]
GRID, TOKENS = (3, 16, 18), 216  # of the DiT's latents; the tokens are four chunks of 64
DIT = {
    "model_type": "t2v", "dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 3, "freq_dim": 16, "text_dim": 20,
    "text_len": 512, "in_dim": 16, "out_dim": 16, "vace_layers": [0, 2], "vace_in_dim": 16,
}  # fmt: skip
VAE = {
    "dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True],
}  # fmt: skip
T5 = {
    "vocab": 50, "dim": 32, "dim_attn": 32, "dim_ffn": 64, "num_heads": 4, "num_layers": 3, "num_buckets": 8,
    "shared_pos": False, "dropout": 0.0,
}  # fmt: skip


def modules_of(checkout: Path, folder: str) -> Iterator[Any]:
    """Imports the modules of a checkout's folder one by one, without running the __init__.py of its packages."""
    sys.path.insert(0, str(checkout))
    package = ""
    for part in Path(folder).parts:
        package = f"{package}.{part}".lstrip(".")
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(checkout / package.replace(".", "/"))]
    for path in sorted((checkout / folder).glob("*.py")):
        if path.stem == "__init__":
            continue
        try:
            yield _imported(f"{package}.{path.stem}")
        except Exception as error:  # the tree may need anything that is missing here
            print(f"{path.stem}: not imported ({type(error).__name__}: {str(error)[:80]})")


def _imported(name: str) -> Any:
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name in sys.modules:
                raise
            stand_in = types.ModuleType(error.name)
            stand_in.__spec__, stand_in.__path__ = ModuleSpec(error.name, None), []
            vars(stand_in)["__getattr__"] = _anything
            sys.modules[error.name] = stand_in


def _anything(name: str) -> Any:
    """An attribute of a missing library's stand-in."""
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)


def built(make: Callable[..., nn.Module], sizes: dict[str, Any]) -> nn.Module:
    """A model with random weights; sizes that its class does not take are left out."""
    known = inspect.signature(make).parameters
    torch.manual_seed(0)
    model = make(**{name: value for name, value in sizes.items() if name in known})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.float().eval().requires_grad_(False)


def compare(
    what: str, call: Callable[[], torch.Tensor], attach: Callable[[], Any], plain: Callable[[], torch.Tensor]
) -> None:
    """Prints how far `call` with `attach` applied is from `plain`, and whether `plain` is the same after the undo."""
    expected = plain()
    try:
        undo = attach()
    except (ValueError, TypeError) as error:
        print(f"{what}: refused: {error}")
        return
    try:
        difference = (call().cpu() - expected).abs().max().item()
    finally:
        undo()
    undone = "as before" if torch.equal(plain(), expected) else "NOT as before"
    print(f"{what}: {difference:.1e} of {expected.abs().max():.1f}, undone {undone}")


class Vae:
    """Calls a VAE's module as the VAE classes of the trees do."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.scale = [torch.zeros(16), torch.ones(16)]

    def encode(self, videos: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.model.encode(video[None], self.scale).float()[0] for video in videos]

    def decode(self, zs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.model.decode(z[None], self.scale).float().clamp(-1, 1)[0] for z in zs]


def try_vae(name: str, make: Callable[..., nn.Module], attach: Callable[..., Any]) -> None:
    vae = Vae(built(make, VAE))
    video, latent = torch.rand(3, 5, 128, 160) * 2 - 1, torch.randn(16, 2, 16, 20)
    for method, value in (("encode", video), ("decode", latent)):

        def call(method: str = method, value: torch.Tensor = value) -> torch.Tensor:
            return getattr(vae, method)([value])[0]

        compare(
            f"{name}, {method}, attach(vae_tile=64)",
            call,
            lambda: attach({"vae": vae}, device="cpu", vae_tile=64),
            call,
        )


def try_dit(name: str, make: Callable[..., nn.Module], attach: Callable[..., Any], kind: str) -> None:
    image = kind == "i2v"
    model = built(make, DIT | {"model_type": kind, "in_dim": 36 if image else 16})
    torch.manual_seed(1)
    inputs = {"x": torch.randn(16, *GRID), "context": torch.randn(5, 20), "y": torch.randn(20, *GRID)}
    features, wanted = torch.randn(1, 257, 1280), inspect.signature(model.forward).parameters

    def call(device: str) -> torch.Tensor:
        there: dict[str, Any] = {
            key: [value.to(device)] for key, value in inputs.items() if key != "y" or image
        }
        there |= {"t": torch.tensor([500.0]).to(device), "seq_len": TOKENS}
        if image and "clip_fea" in wanted:
            there["clip_fea"] = features.to(device)
        if "vace_context" in wanted:
            there["vace_context"] = there["x"]
        return torch.as_tensor(model(**there)[0]).float()

    try:
        call("cpu")
    except Exception as error:
        print(
            f"{name}, {kind}: its forward takes inputs of its own ({type(error).__name__}: {str(error)[:80]})"
        )
        return
    in_ram = {"dit_stream": 0.0, "dit_chunk": 64, "activation_offload": True}
    for options, device in (({"dit_stream": 0.0}, "vgpu:0"), ({"dit_chunk": 64}, "cpu"), (in_ram, "vgpu:0")):
        compare(
            f"{name}, {kind}, attach({_listed(options)})",
            partial(call, device),
            partial(attach, {"model": model}, device=device, **options),
            lambda: call("cpu"),
        )
    model.blocks[-1].another = nn.Linear(2, 2)
    compare(
        f"{name}, {kind}, a layer more, attach(dit_chunk=64)",
        lambda: call("cpu"),
        lambda: attach({"model": model}, device="cpu", dit_chunk=64),
        lambda: call("cpu"),
    )


def try_experts(name: str, make: Callable[..., nn.Module], attach: Callable[..., Any]) -> None:
    """Tries two models of which one at a time is on the device, moved as Wan2.2 moves its experts."""
    experts = {"low_noise_model": built(make, DIT), "high_noise_model": built(make, DIT)}
    torch.manual_seed(1)
    x, context, t = torch.randn(16, *GRID), torch.randn(5, 20), torch.tensor([500.0])

    def call(device: str) -> torch.Tensor:
        flows = []
        for key, model in experts.items():
            for other in experts.values():
                if other is not model:
                    other.to("cpu")
            model.to(device)
            flows.append(model([x.to(device)], t.to(device), [context.to(device)], TOKENS)[0].cpu())
            assert key
        return torch.cat(flows)

    compare(
        f"{name}, two experts, attach(dit_stream=0)",
        lambda: call("vgpu:0"),
        lambda: attach(experts, device="vgpu:0", dit_stream=0.0),
        lambda: call("cpu"),
    )


def try_t5(name: str, make: Callable[..., nn.Module], attach: Callable[..., Any]) -> None:
    model, ids = built(make, T5), torch.arange(7)[None]
    compare(
        f"{name}, attach(t5_stream=True)",
        lambda: model(ids.to("vgpu:0")),
        lambda: attach({"text_encoder": SimpleNamespace(model=model)}, device="vgpu:0", t5_stream=True),
        lambda: model(ids),
    )


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value:g}" for key, value in options.items())


def main() -> None:
    warnings.simplefilter("ignore")  # about CUDA's autocast, which is not available
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder of the other tree")
    parser.add_argument("--package", default="wan/modules", help="folder of its models (default wan/modules)")
    args = parser.parse_args()
    if LACK:
        parser.error(LACK)
    run(args.checkout.resolve(), args.package)


@torch.no_grad()
def run(checkout: Path, package: str) -> None:
    from upstream_driver import stand_ins
    from upstream_driver.surroundings import attention

    stand_ins.install()
    torch.cuda.current_device = lambda: 0  # a default argument of T5's asks for it
    with VirtualGPU():
        for module in modules_of(checkout, package):
            if hasattr(module, "flash_attention"):
                module.flash_attention = attention
            for name, made in list(vars(module).items()):
                if not inspect.isclass(made) or made.__module__ != module.__name__:
                    continue
                title = f"{module.__name__.rpartition('.')[2]}.{name}"
                try:
                    if name == "WanVAE_":
                        try_vae(title, made, attach)
                    elif name == "T5Encoder":
                        try_t5(title, made, attach)
                    elif name.endswith("WanModel"):
                        for kind in ("vace",) if "Vace" in name else ("t2v", "i2v"):
                            try_dit(title, made, attach, kind)
                        if (
                            name == "WanModel"
                            and "clip_fea" not in inspect.signature(made.forward).parameters  # type: ignore[attr-defined]
                        ):
                            try_experts(title, made, attach)
                except Exception as error:
                    print(f"{title}: not tried ({type(error).__name__}: {str(error)[:100]})")


if __name__ == "__main__":
    main()
