// Vectors and columns: what the C++ files of this folder share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

template <class A, int n>
struct LanesOf {
  typedef A type __attribute__((vector_size(n * sizeof(A))));
};
template <class A>
struct LanesOf<A, 1> {
  using type = A;
};
template <class A, int n>
using Lanes = typename LanesOf<A, n>::type;  // n numbers; one of them is no vector
template <class A>
using Vec = Lanes<A, kLanes<A>>;

template <class V, class A>
inline V read(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
inline Vec<A> load(const A* p) {
  return read<Vec<A>>(p);
}

template <class V, class A>
inline void store(A* p, const V& v) {
  std::memcpy(p, &v, sizeof(v));
}

// Add numbers of either dtype to as many doubles
template <class V>
inline void add_to(double* sums, V values) {
  if constexpr (std::is_arithmetic_v<V>) {
    *sums += values;
  } else {
    using Doubles = Lanes<double, sizeof(V) / sizeof(values[0])>;
    store(sums, Doubles(read<Doubles>(sums) + __builtin_convertvector(values, Doubles)));
  }
}

// Compilers like to read a vector again from memory at each use; the load ports have no time for that here.
template <class V>
inline void in_register(V& vector) {
#if defined(__x86_64__)
  asm("" : "+v"(vector));
#elif defined(__aarch64__)
  asm("" : "+w"(vector));
#endif
}

// Ask for a line of memory that will be read, or written, soon: whoever works on one place asks for the next
template <class T>
inline void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// The same of many. Always inlined, since compilers drop calls of what only asks.
template <class T>
__attribute__((always_inline)) inline void fetch_run(const T* p, int64_t count) {
  for (int64_t e = 0; e < count; e += 64 / int64_t(sizeof(T))) fetch(p + e);
}

// A number or address of which the compiler knows nothing, so that it does not compute anew what follows from it
template <class T>
inline void opaque(T& value) {
  asm("" : "+r"(value));
}

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

template <class A>
struct Aligned {  // an allocator: a vector that straddles two lines of the cache takes twice as long to read
  using value_type = A;
  Aligned() = default;
  template <class B>
  Aligned(const Aligned<B>&) {}
  A* allocate(size_t count) { return static_cast<A*>(::operator new(count * sizeof(A), std::align_val_t(64))); }
  void deallocate(A* data, size_t) { ::operator delete(data, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <class A>
using Buffer = std::vector<A, Aligned<A>>;

template <class A>
A* scratch(Buffer<A>& buffer, int64_t size) {
  if (int64_t(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// f(c, n) for the columns [c, width), n at a time: n is a constant, `most` as long as there are so many, then half of it
// down to four, then one
template <int most, class F>
inline void for_columns(int64_t c, int64_t width, const F& f) {
  for (; c + most <= width; c += most) f(c, std::integral_constant<int, most>());
  if constexpr (most > 1) for_columns<(most > 4 ? most / 2 : 1)>(c, width, f);
}

template <class A>
inline void fill_run(A* dst, int64_t count) {  // with zeros
  for_columns<kLanes<A>>(0, count, [&](int64_t c, auto n) { store(dst + c, Lanes<A, n>{}); });
}

// Most runs are a pixel's channels, which are copied sooner than a function is called
template <class A>
inline void copy_run(A* dst, const A* src, int64_t count) {
  if constexpr (std::is_floating_point_v<A>)
    if (count <= 8 * kLanes<A>)
      return for_columns<kLanes<A>>(0, count, [&](int64_t c, auto n) { store(dst + c, read<Lanes<A, n>>(src + c)); });
  std::copy_n(src, count, dst);
}

}  // namespace
