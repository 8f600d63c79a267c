// The calls of a recorded pass, one after the other; and the sum of tensors, which in a pass is of its gradients.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

#include "packed.h"
#include "vectors.h"

namespace {

template <class A>
void add(Reader reader) {
  constexpr int64_t kPiece = 4096;
  const int64_t count = reader.number();
  A* sum = reader.address<A>();
  std::vector<const A*> addends;
  for (int64_t n = reader.number(); n > 0; --n) addends.push_back(reader.address<const A>());
  at::parallel_for(0, (count + kPiece - 1) / kPiece, 8, [&](int64_t begin, int64_t end) {
    for_columns<kLanes<A>>(begin * kPiece, std::min(count, end * kPiece), [&](int64_t e, auto n) {
      using V = Lanes<A, n>;
      V total = read<V>(addends[0] + e);
      for (size_t k = 1; k < addends.size(); ++k) total += read<V>(addends[k] + e);
      store(sum + e, total);
    });
  });
}

}  // namespace

// Each returns 0, or 1 when out of memory.
extern "C" {

// packed: how many elements, the address of the sum, how many addends, their addresses
int recorded_add(int64_t is_double, const int64_t* packed) {
  try {
    is_double ? add<double>(Reader(packed)) : add<float>(Reader(packed));
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

// numbers: of each of the calls an entry point, its dtype, and where its packed numbers begin; then those. slots: pairs
// of a place among them and of the base that is added there.
int recorded_run(int64_t calls, const int64_t* numbers, int64_t count, const int64_t* slots, int64_t of_slots,
                 const int64_t* bases) {
  try {
    std::vector<int64_t> own(numbers, numbers + count);
    for (const int64_t* slot = slots; slot < slots + 2 * of_slots; slot += 2) own[slot[0]] += bases[slot[1]];
    for (const int64_t* call = own.data(); call < own.data() + 3 * calls; call += 3)
      if (((Entry)call[0])(call[1], own.data() + call[2])) return 1;
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
}
