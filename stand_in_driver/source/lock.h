// The one lock of this library, held while work of a stream runs.
//
// Work may be a Python function, which needs Python's lock. So that two threads never hold one lock each and wait for
// the other's, whoever waits for this lock gives Python's back meanwhile.
#pragma once

namespace stand_in {

struct Lock {
  Lock();
  ~Lock();
  Lock(const Lock&) = delete;
};

} // namespace stand_in
