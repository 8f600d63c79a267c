// How the functions that compute a pass are called: a dtype, and numbers and addresses packed into one array.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

using Entry = int (*)(int64_t dtype, const int64_t* packed);  // returns 0, or 1 when out of memory

class Reader {  // of packed numbers, one after the other
 public:
  explicit Reader(const int64_t* next) : next(next) {}
  int64_t number() { return *next++; }
  double real() {  // whose bits are the number
    double value;
    std::memcpy(&value, next++, sizeof value);
    return value;
  }
  template <class T>
  T* address() {
    return (T*)*next++;
  }

 private:
  const int64_t* next;
};

}  // namespace
