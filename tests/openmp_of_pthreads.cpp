// The OpenMP that at::parallel_for needs, of threads that are started and joined for every loop: ThreadSanitizer follows
// pthread_create and pthread_join, and knows nothing of how libgomp's threads wait for each other.
//
// Linked into the libraries of kernels/ by `make races`, with -Bsymbolic: PyTorch's own loops keep libgomp.

#include <pthread.h>

constexpr int kThreads = 4;  // whatever number the tests set

namespace at {

int get_num_threads() { return kThreads; }

}  // namespace at

namespace {

thread_local int number = 0;

struct Share {
  void (*function)(void*);
  void* data;
  int number;
};

void* run(void* argument) {
  const Share* share = static_cast<const Share*>(argument);
  number = share->number;
  share->function(share->data);
  return nullptr;
}

}  // namespace

extern "C" {

int omp_get_num_threads() { return kThreads; }
int omp_get_thread_num() { return number; }

void GOMP_parallel(void (*function)(void*), void* data, unsigned, unsigned) {
  pthread_t threads[kThreads];
  Share shares[kThreads];
  for (int k = 1; k < kThreads; ++k) {
    shares[k] = {function, data, k};
    pthread_create(&threads[k], nullptr, run, &shares[k]);
  }
  function(data);
  for (int k = 1; k < kThreads; ++k) pthread_join(threads[k], nullptr);
}
}
