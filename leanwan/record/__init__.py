"""Records the tensors that code makes and drops on a device, and predicts what the allocator reserves for them."""
