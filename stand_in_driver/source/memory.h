// The card's memory and the host's page-locked memory, both pages of this process.
#pragma once
#include <cstddef>

namespace stand_in {

// Whether all of [address, address + size) is memory of the card, or page-locked memory.
bool on_card(const void* address, size_t size = 1);
bool page_locked(const void* address, size_t size = 1);

// CUDA's context takes its part of the card from the first call on that needs one.
void make_context();
bool has_context();

} // namespace stand_in
