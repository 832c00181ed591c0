"""What the stand-in's card does, seen through PyTorch.

    python -m stand_in_driver --capacity 2 --capability 9.0 --late copies|kernels python tests/stand_in/driver.py

Prints as JSON {what was looked at: what was found}.
"""

import json
from typing import Any

import torch

MIB = 2**20
SIDE = 1024


def copies_and_kernels(waits: bool) -> tuple[bool, bool]:
    """Whether a kernel sees what a copy before it brought, and whether it is spared by a copy behind it."""
    side, computing = torch.cuda.Stream(), torch.cuda.current_stream()
    first, second = (torch.full((SIDE,), value).pin_memory() for value in (1.0, 2.0))
    on_card = torch.zeros(SIDE, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        on_card.copy_(first, non_blocking=True)
    if waits:
        computing.wait_stream(side)
    doubled = on_card * 2
    if waits:
        side.wait_stream(computing)
    with torch.cuda.stream(side):
        on_card.copy_(second, non_blocking=True)
    torch.cuda.synchronize()
    seen = doubled.unique().tolist()
    return seen != [0.0], seen != [4.0]


def out_of_memory() -> dict[str, Any]:
    """How PyTorch takes it, and that what is free can be had again."""
    free, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    try:
        torch.empty(free + MIB, dtype=torch.uint8, device="cuda")
        told = ""
    except torch.OutOfMemoryError as error:
        told = str(error)
    half = torch.empty(free // 2, dtype=torch.uint8, device="cuda")
    taken = free - torch.cuda.mem_get_info()[0] >= half.numel()
    del half
    torch.cuda.empty_cache()
    return {"total": total, "told": "Tried to allocate" in told, "taken": taken}


def grows() -> bool:
    """Whether the allocator's segments can grow."""
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (configure or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
    kept = [torch.empty(5 * MIB, dtype=torch.uint8, device="cuda") for _ in range(9)]
    (segment,) = torch.cuda.memory_snapshot()
    del kept
    torch.cuda.empty_cache()
    return segment["is_expandable"] and torch.cuda.memory_reserved() == 0


def values() -> dict[str, bool]:
    """Operators against the CPU's."""
    x = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(1))
    there, w = x.cuda(), torch.ones(4, 3, 3, 3)
    conv = torch.nn.functional.conv2d
    noise = [
        torch.randn(9, generator=torch.Generator(d).manual_seed(7), device=d).cpu() for d in ("cpu", "cuda")
    ]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        product = there[0] @ there[1].T
    return {
        "in place": torch.equal(there.clone().add_(1).mul_(x[0].cuda()).cpu(), x.add(1).mul(x[0])),
        "another type": torch.equal(there.to("cpu", torch.bfloat16), x.bfloat16()),
        "masked": torch.equal(there[there > 0].cpu(), x[x > 0]),
        "convolution": torch.equal(conv(there[None], w.cuda()).cpu(), conv(x[None], w)),
        "solved": torch.allclose(
            torch.linalg.solve(torch.eye(2).cuda() * 2, torch.ones(2).cuda()).cpu(), torch.ones(2) / 2
        ),
        "random": torch.equal(*noise),
        "autocast": product.dtype == torch.bfloat16,
        "from a thread": _in_thread(lambda: torch.equal((there * 3).cpu(), x * 3)),
    }


def _in_thread(function: Any) -> bool:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def main() -> None:
    grown = grows()
    memory = out_of_memory()
    print(
        json.dumps(
            {
                "capability": torch.cuda.get_device_capability(),
                "with waits": copies_and_kernels(True),
                "without": copies_and_kernels(False),
                "grows": grown,
                "memory": memory,
                "values": values(),
            }
        )
    )


if __name__ == "__main__":
    main()
