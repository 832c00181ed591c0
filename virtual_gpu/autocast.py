"""Autocast for the virtual GPU: the operators that CUDA's autocast casts, cast alike, so that memory counts agree.

Not modelled: the cache of cast weights, which CUDA keeps for weights that require grad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def _names(text: str) -> list[str]:
    return text.split()


LOWER_PRECISION = _names("""
    _convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm
    bmm chain_matmul linalg_multi_dot scaled_dot_product_attention
""")
FLOAT32 = _names("""
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm group_norm rms_norm cosine_similarity mse_loss
    l1_loss dist cdist renorm logsumexp upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa
""")
FLOAT32_RESULT = _names("""
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm sum
    sum.dim_IntList
""")
WIDEST = _names("addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add")

_KEY = "AutocastPrivateUse1"
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_others = torch.library.Library("_", "IMPL", _KEY)  # unregisters when it is collected
_others.fallback(torch.library.fallthrough_kernel)


def register(library: torch.library.Library, device_type: str) -> None:
    """Implement autocast for a device type that PyTorch knows as PrivateUse1."""

    def eligible(value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.device.type == device_type
            and value.is_floating_point()
            and value.dtype is not torch.float64
        )

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return [cast(v, dtype) for v in value]
        return value.to(dtype) if eligible(value) else value

    def widest(values: Iterable[Any]) -> torch.dtype:
        dtype = torch.get_autocast_dtype(device_type)
        return torch.float32 if any(eligible(v) and v.dtype is torch.float32 for v in values) else dtype

    def kernel(func: Callable, policy: list[str]) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_KEYS):
                if policy is FLOAT32_RESULT:
                    if eligible(args[0]) and not any(
                        isinstance(v, torch.dtype) for v in [*args, *kwargs.values()]
                    ):
                        kwargs["dtype"] = torch.float32
                    return func(*args, **kwargs)
                if policy is LOWER_PRECISION:
                    dtype = torch.get_autocast_dtype(device_type)
                else:
                    dtype = torch.float32 if policy is FLOAT32 else widest([*args, *kwargs.values()])
                return func(*cast(args, dtype), **{k: cast(v, dtype) for k, v in kwargs.items()})

        return run

    for policy in (LOWER_PRECISION, FLOAT32, FLOAT32_RESULT, WIDEST):
        for name in policy:
            packet, _, overload = name.partition(".")
            func = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, kernel(func, policy), _KEY)
