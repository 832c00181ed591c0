#include "lock.h"
#include <dlfcn.h>
#include <mutex>

namespace stand_in {

static std::recursive_mutex& mutex() {
  static auto* it = new std::recursive_mutex; // never destroyed: threads may outlive this library's globals
  return *it;
}

template <class F> static F python(const char* name) { return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name)); }

Lock::Lock() {
  if (mutex().try_lock()) return;
  static auto holds = python<int (*)()>("PyGILState_Check");
  static auto give = python<void* (*)()>("PyEval_SaveThread");
  static auto take = python<void (*)(void*)>("PyEval_RestoreThread");
  void* thread = holds && give && take && holds() ? give() : nullptr;
  mutex().lock();
  if (thread) take(thread);
}

Lock::~Lock() { mutex().unlock(); }

} // namespace stand_in
