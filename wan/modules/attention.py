"""Attention over whole sequences: flash-attn where it is installed and works, PyTorch's own otherwise, or as chosen.

The choice of a kernel here depends on the device, the type and the width of the heads, never on the number of queries.
In every kernel a row's result depends on its own query and all keys.
"""

import functools
import importlib
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F

from leanwan.errors import InputError

log = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
SCORE_BYTES = 2**27  # of scores that exist at a time where no fused kernel avoids them
FUSED, IN_PIECES, SAGE = "PyTorch's", "PyTorch's, by pieces of rows", "SageAttention's"
CHOICES = ("auto", "sdpa", "flash", "sage")
_FLASH_ATTN = {3: "flash_attn_interface", 2: "flash_attn"}
_INSTALL = {
    "flash": "flash-attn, `pip install flash-attn --no-build-isolation`",
    "sage": "SageAttention, `pip install sageattention`",
}
_SAGE_WIDTH = 128  # of the widest heads that SageAttention takes


def check_attention(choice: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError if the kernels of a choice cannot run; for lack of a package, with how to install it.

    Args:
        choice: "auto" is flash-attn where it is installed and runs, else PyTorch's; "sdpa" PyTorch's; "flash"
            flash-attn; "sage" SageAttention (Zhang et al., 2024), which quantises queries and keys to 8 bits.
        device: where attention will compute.
        dtype: of queries, keys and values.
    """
    if choice == "auto" and device.type == "cuda":
        load_flash_attn()  # a broken package is logged now
    if choice in _INSTALL and (problem := _why_not(choice, device, dtype)):
        raise InputError(f"{problem}; give auto or sdpa", "attention", choice)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: torch.Tensor | None = None,
    k_lens: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    dtype: torch.dtype | None = None,
    version: int | None = None,
    *,
    choice: str = "auto",
) -> torch.Tensor:
    """softmax(q k^T * scale) v for every head.

    Args:
        q: [B, Lq, N, D].
        k: [B, Lk, N, D]; cast to v's type, as q is.
        v: [B, Lk, N, D].
        q_lens: no effect; rows past a sample's length are computed and mean nothing.
        k_lens: [B] integers or None: how many keys of each sample count.
        dropout_p: 0.
        softmax_scale: default D ** -0.5.
        q_scale: factor of the queries.
        causal: mask keys after the query; as many keys as queries.
        window_size: (-1, -1).
        deterministic: no effect; the forward pass always is.
        dtype: what to compute fp32 input in, or None for fp32.
        version: no effect; the newest flash-attn that runs on the device is used.
        choice: of kernels, see check_attention.

    Returns:
        [B, Lq, N, D] in q's type.

    Raises:
        ValueError: dropout, a window, or a causal mask over unlike lengths.
        InputError: the chosen kernels do not take such heads.
    """
    if dropout_p:
        raise ValueError(f"dropout_p {dropout_p}: attention without dropout only, leave it at 0")
    if tuple(window_size) != (-1, -1):
        raise ValueError(f"window_size {window_size}: attention over all keys only, leave it at (-1, -1)")
    if causal and (q.size(1) != k.size(1) or k_lens is not None):
        raise ValueError("causal: as many keys as queries only, without k_lens")
    out_dtype = q.dtype
    kept = v.dtype if dtype is None or v.dtype in HALF else dtype
    q, k, v = q.to(kept), k.to(kept), v.to(kept)
    if q_scale is not None:
        q = q * q_scale
    kernel = kernel_of(q, k, v, causal, choice)
    _tell(kernel, q.device.type, q.dtype)
    if k_lens is None:
        out = _attend(kernel, q, k, v, softmax_scale, causal)
    else:
        parts = [
            _attend(kernel, q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n], softmax_scale, causal)
            for i, n in enumerate(k_lens.tolist())
        ]
        out = torch.cat(parts)
    return out.to(out_dtype)


@functools.cache
def load_flash_attn() -> dict[int, Callable]:
    """The attention function of each version of flash-attn that is installed and can be imported.

    Imported at the first call. A version that is installed but broken is logged once.
    """
    functions = {}
    for version, name in _FLASH_ATTN.items():
        if function := _imported(name, "flash_attn_varlen_func", f"flash-attn {version}"):
            functions[version] = function
    return functions


@functools.cache
def load_sage() -> Callable | None:
    """SageAttention's function, imported at the first call; None if it is not installed or cannot be imported."""
    return _imported("sageattention", "sageattn", "SageAttention")


def kernel_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False, choice: str = "auto"
) -> str:
    """The kernel that flash_attention takes for tensors of one type, as choose_kernel names it.

    Raises InputError if the chosen kernels do not take such tensors.
    """
    if choice == "sage":
        if q.dtype not in HALF or q.size(-1) > _SAGE_WIDTH:
            raise _unfit(choice, q)
        return SAGE
    if q.device.type != "cuda":
        if choice == "flash":
            raise _unfit(choice, q)
        return FUSED  # a CPU's kernel is; for other devices whose kernel is not, there is no way by pieces
    call = torch.backends.cuda.SDPAParams(*(x.transpose(1, 2) for x in (q, k, v)), None, 0.0, causal, False)
    fused = torch.backends.cuda.can_use_flash_attention(call)
    fused = fused or torch.backends.cuda.can_use_efficient_attention(call)
    capability = torch.cuda.get_device_capability(q.device)
    versions = () if choice == "sdpa" else tuple(load_flash_attn())
    kernel = choose_kernel(q.dtype, q.size(-1), capability, versions, fused)
    if choice == "flash" and kernel in (FUSED, IN_PIECES):
        raise _unfit(choice, q)
    return kernel


def choose_kernel(
    dtype: torch.dtype, width: int, capability: tuple[int, int], flash_attn: tuple[int, ...], fused: bool
) -> str:
    """The kernel for a call on a CUDA device.

    Args:
        dtype: of queries, keys and values.
        width: of a head.
        capability: of the device.
        flash_attn: versions that can be imported.
        fused: whether PyTorch has a kernel for the call that holds no scores, see fused_on.

    Returns:
        "flash-attn 3", "flash-attn 2", FUSED or IN_PIECES.
    """
    if dtype in HALF and width <= 256:
        if 3 in flash_attn and capability[0] == 9:
            return "flash-attn 3"
        if 2 in flash_attn and capability >= (8, 0):
            return "flash-attn 2"
    return FUSED if fused else IN_PIECES


def fused_on(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether PyTorch has a kernel that holds no scores on such a card, for heads of usual widths. For a card that is
    present kernel_of asks PyTorch itself."""
    return dtype != torch.bfloat16 or capability >= (8, 0)


def piece_of(rows: int, keys: int, heads: int, itemsize: int = 4, batch: int = 1) -> tuple[int, int]:
    """(rows, heads) that attend_in_pieces takes at a time; itemsize: bytes of a score."""
    row_bytes = batch * keys * itemsize
    step = max(1, min(rows, SCORE_BYTES // row_bytes))
    return step, max(1, min(heads, SCORE_BYTES // (row_bytes * rows)))


def attend_in_pieces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """Attention that holds at most SCORE_BYTES of scores, or one row, at a time; each row's softmax is whole.

    16-bit tensors are computed in fp32, a few heads at a time.

    Args, returns:
        [B, L, N, D].
    """
    rows, keys = q.size(1), k.size(1)
    compute = torch.float32 if q.dtype in HALF else q.dtype
    step, heads = piece_of(rows, keys, q.size(2), compute.itemsize, q.size(0))
    out = torch.empty(*q.shape[:-1], v.size(-1), dtype=q.dtype, device=q.device)
    for h in range(0, q.size(2), heads):
        group = slice(h, h + heads)
        key, value = (x[:, :, group].transpose(1, 2).to(compute) for x in (k, v))
        for start in range(0, rows, step):
            piece = slice(start, start + step)
            query = q[:, piece, group].transpose(1, 2).to(compute)
            mask = None
            if causal:
                positions = torch.arange(keys, device=q.device)
                mask = positions <= positions[piece, None]
            result = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
            out[:, piece, group] = result.transpose(1, 2)
            del query, result  # before the next ones come
        del key, value
    return out


def _attend(
    kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool
) -> torch.Tensor:
    if kernel == IN_PIECES:
        return attend_in_pieces(q, k, v, scale, causal)
    if kernel == SAGE:
        return load_sage()(q, k, v, tensor_layout="NHD", is_causal=causal, sm_scale=scale)
    if kernel == FUSED:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)
    # The function for sequences of unlike lengths: the other one splits the keys if there are few queries, so chunks of
    # queries would round differently.
    function = load_flash_attn()[int(kernel[-1])]
    batch, rows, keys = q.size(0), q.size(1), k.size(1)
    ends = [torch.arange(batch + 1, dtype=torch.int32, device=q.device) * n for n in (rows, keys)]
    packed = (x.flatten(0, 1) for x in (q, k, v))
    out = function(*packed, *ends, rows, keys, softmax_scale=scale, causal=causal)
    out = out[0] if isinstance(out, tuple) else out
    return out.unflatten(0, (batch, rows))


def _imported(module: str, name: str, package: str) -> Callable | None:
    """A function of an optional package; None if the package is absent, or broken, which is logged."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a binary that does not fit raises
        if not (isinstance(error, ModuleNotFoundError) and error.name == module):
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            log.warning(f"{package} cannot be imported, attention goes on without it ({reason})")
        return None


def _why_not(choice: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of a choice cannot run, and what to do; None if they can."""
    if device.type != "cuda":
        return f"computes on CUDA devices only, not on {device.type}"
    if dtype not in HALF:
        return f"computes in bf16 and fp16 only, this model computes in {_name(dtype)}"
    if not (load_flash_attn() if choice == "flash" else load_sage()):
        return f"the package is absent or broken, install {_INSTALL[choice]}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return (
            f"needs compute capability 8.0 (RTX 30) or newer, {device} has {'.'.join(map(str, capability))}"
        )
    if choice == "flash" and choose_kernel(dtype, 128, capability, tuple(load_flash_attn()), True) == FUSED:
        return "the installed flash-attn 3 is for compute capability 9 only: install flash-attn 2"
    return None


def _unfit(choice: str, q: torch.Tensor) -> InputError:
    problem = f"takes no heads of width {q.size(-1)} in {_name(q.dtype)} on {q.device.type}, give auto"
    return InputError(problem, "attention", choice)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _tell(kernel: str, device: str, dtype: torch.dtype) -> None:
    log.info(f"Attention in {_name(dtype)} on {device}: {kernel}")
