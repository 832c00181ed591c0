"""Attention over whole sequences: flash-attn where it is installed, PyTorch's own otherwise."""

import importlib.util

import torch
import torch.nn.functional as F

_HAS_FLASH_3 = importlib.util.find_spec("flash_attn_interface") is not None
_HAS_FLASH_2 = importlib.util.find_spec("flash_attn") is not None


def flash_attention(q, k, v, q_lens=None, k_lens=None, softmax_scale=None, causal=False):
    """softmax(q k^T * scale) v for every head.

    Half-precision CUDA tensors go to flash-attn 3 or 2 when importable (Dao, FlashAttention-2, 2023); everything
    else to `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        q: [B, Lq, N, D].
        k: [B, Lk, N, D]; cast to v's type, as q is.
        v: [B, Lk, N, D].
        q_lens: accepted for call compatibility; rows past a sample's length are computed and mean nothing.
        k_lens: [B] integers or None: how many keys of each sample count.
        softmax_scale: default D ** -0.5.
        causal: mask keys after the query.

    Returns:
        [B, Lq, N, D] in q's type.
    """
    out_dtype = q.dtype
    q, k = q.to(v.dtype), k.to(v.dtype)
    if k_lens is None:
        out = _attend(q, k, v, softmax_scale, causal)
    else:
        lengths = k_lens.tolist()
        out = torch.cat(
            [
                _attend(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n], softmax_scale, causal)
                for i, n in enumerate(lengths)
            ]
        )
    return out.to(out_dtype)


def _attend(q, k, v, scale, causal):
    if q.device.type == "cuda" and v.dtype in (torch.float16, torch.bfloat16) and q.size(-1) <= 256:
        if _HAS_FLASH_3:
            import flash_attn_interface

            out = flash_attn_interface.flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)
            return out[0] if isinstance(out, tuple) else out
        if _HAS_FLASH_2:
            import flash_attn

            return flash_attn.flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)
