"""What code asks of a device's memory, request by request, and what the allocator takes from the device for it."""
