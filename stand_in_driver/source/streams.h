// Streams: queues of work that run in order, each as late as the events between them allow or at once.
#pragma once
#include <cstdint>
#include <functional>

namespace stand_in {

using Work = std::function<void()>;

// Whether the handle is a stream that exists.
bool is_stream(void* stream);

// Puts work at the end of a stream. Unless it is late, it runs before this returns, after all that is before it.
void submit(void* stream, Work work, bool late);

// Runs the work of a stream, all of it or the first pieces up to number `until` since it was made.
void drain(void* stream, uint64_t until = UINT64_MAX);

void drain_all();

} // namespace stand_in
