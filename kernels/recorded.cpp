// The calls of a recorded pass, one after the other.

#include <cstdint>
#include <exception>
#include <vector>

#include "packed.h"

// numbers: of each of the calls an entry point, its dtype, and where its packed numbers begin; then those. slots: pairs
// of a place among them and of the base that is added there. Returns 0, or 1 when out of memory.
extern "C" int recorded_run(int64_t calls, const int64_t* numbers, int64_t count, const int64_t* slots,
                            int64_t of_slots, const int64_t* bases) {
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
