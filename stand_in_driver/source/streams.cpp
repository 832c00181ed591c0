// Streams and events of the runtime.
//
// A wait for an event is work too: it runs what the event stands for. So a stream that is late itself does not hurry
// the one that it waits for. A query that is answered "not ready" runs one piece of work afterwards: whoever asks
// again and again gets there.
#include "streams.h"
#include "errors.h"
#include "lock.h"
#include <cuda_runtime_api.h>
#include <chrono>
#include <deque>
#include <unordered_map>
#include <unordered_set>

namespace stand_in {

struct Queue {
  std::deque<Work> waiting;
  uint64_t submitted = 0, done = 0;
};

struct Event {
  unsigned flags = 0;
  bool recorded = false;
  void* stream = nullptr;
  uint64_t number = 0; // of the last piece of work that it stands for
  std::chrono::steady_clock::time_point time;
};

static std::unordered_map<void*, Queue> queues = {{nullptr, {}}};
static std::unordered_set<Event*> events;

// The default stream has two handles.
static void* plain(void* stream) { return stream == cudaStreamLegacy ? nullptr : stream; }

static Queue* find(void* stream) {
  auto found = queues.find(plain(stream));
  return found == queues.end() ? nullptr : &found->second;
}

bool is_stream(void* stream) {
  Lock lock;
  return find(stream);
}

void drain(void* stream, uint64_t until) {
  Lock lock;
  for (Queue* queue = find(stream); queue && !queue->waiting.empty() && queue->done < until; queue = find(stream)) {
    Work work = std::move(queue->waiting.front());
    queue->waiting.pop_front();
    work(); // may drain other streams, which does not move this one's queue
    queue->done++;
  }
}

void drain_all() {
  Lock lock;
  for (auto& entry : queues) drain(entry.first);
}

void submit(void* stream, Work work, bool late) {
  Lock lock;
  Queue* queue = find(stream);
  if (!queue) return;
  queue->waiting.push_back(std::move(work));
  queue->submitted++;
  if (!late) drain(stream);
}

static bool is_event(cudaEvent_t handle) { return events.count(reinterpret_cast<Event*>(handle)); }

static bool done(const Event& event) {
  Queue* queue = find(event.stream);
  return !event.recorded || !queue || queue->done >= event.number;
}

} // namespace stand_in

using namespace stand_in;

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  Lock lock;
  *stream = reinterpret_cast<cudaStream_t>(new char[64]);
  queues[*stream] = {};
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Lock lock;
  if (!stream || !is_stream(stream)) return failed(cudaErrorInvalidResourceHandle);
  drain(stream);
  queues.erase(stream);
  delete[] reinterpret_cast<char*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (!is_stream(stream)) return failed(cudaErrorInvalidResourceHandle);
  return drain(stream), cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Lock lock;
  Queue* queue = find(stream);
  if (!queue) return failed(cudaErrorInvalidResourceHandle);
  if (queue->waiting.empty()) return cudaSuccess;
  return drain(stream, queue->done + 1), failed(cudaErrorNotReady);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  Lock lock;
  if (!is_stream(stream) || !is_event(handle)) return failed(cudaErrorInvalidResourceHandle);
  const Event event = *reinterpret_cast<Event*>(handle);
  if (!done(event)) submit(stream, [event] { drain(event.stream, event.number); }, true);
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* count) {
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                        cudaGraph_t*, const cudaGraphNode_t**, size_t* count) {
#endif
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return submit(stream, [=] { function(data); }, false), cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  return submit(stream, [=] { function(stream, cudaSuccess, data); }, false), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return drain_all(), cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  Lock lock;
  Event* event = new Event;
  event->flags = flags;
  events.insert(event);
  return *handle = reinterpret_cast<cudaEvent_t>(event), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  Lock lock;
  if (!events.erase(reinterpret_cast<Event*>(handle))) return failed(cudaErrorInvalidResourceHandle);
  delete reinterpret_cast<Event*>(handle);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
  Lock lock;
  if (!is_stream(stream) || !is_event(handle)) return failed(cudaErrorInvalidResourceHandle);
  Event& event = *reinterpret_cast<Event*>(handle);
  event.recorded = true;
  event.stream = plain(stream);
  event.number = find(stream)->submitted;
  event.time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  return cudaEventRecordWithFlags(handle, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock;
  if (!is_event(handle)) return failed(cudaErrorInvalidResourceHandle);
  const Event event = *reinterpret_cast<Event*>(handle);
  if (done(event)) return cudaSuccess;
  return drain(event.stream, find(event.stream)->done + 1), failed(cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock;
  if (!is_event(handle)) return failed(cudaErrorInvalidResourceHandle);
  const Event event = *reinterpret_cast<Event*>(handle);
  if (event.recorded) drain(event.stream, event.number);
  return cudaSuccess;
}
// Of the host's clock, when the events were recorded: says nothing about a card.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t last) {
  Lock lock;
  if (!is_event(first) || !is_event(last)) return failed(cudaErrorInvalidResourceHandle);
  const Event &a = *reinterpret_cast<Event*>(first), &b = *reinterpret_cast<Event*>(last);
  if (!a.recorded || !b.recorded || (a.flags | b.flags) & cudaEventDisableTiming)
    return failed(cudaErrorInvalidResourceHandle);
  *milliseconds = std::chrono::duration<float, std::milli>(b.time - a.time).count();
  return cudaSuccess;
}

} // extern "C"
