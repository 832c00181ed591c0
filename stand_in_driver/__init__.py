"""PyTorch's own CUDA code on a machine without a card, over a driver that computes nothing. Linux only.

    python -m stand_in_driver [--capacity GIB] [--capability 8.6] [--no_values] COMMAND

The caching allocator, streams, events, page-locked memory, generators, autocast and out-of-memory are PyTorch's;
`source/` is a library that answers what they ask of CUDA's runtime, driver and cuBLAS. Memory of the card is memory
of the process, and kernels do nothing: what they would compute, `values.py` computes on the CPU, or nobody does.
"""
