// The evaluation of a derived network: passes over feature maps, done for a few images after the other.
//
// In evaluation no image depends on another one, and batch norms are part of the convolutions. So all passes are done for
// as many images as have room for their feature maps in the second-level cache, then for the next ones. Threads share
// the images; where there are fewer pieces than threads, they share the loops of each pass instead. inference_cpu.py
// writes the list of passes; feature maps lie in an arena of each thread, channels-last.

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "depthwise.h"
#include "packed.h"
#include "products.h"

namespace {

constexpr double kEps = 1e-5;  // of batch norm

inline void check(int failed) {
  if (failed) throw std::bad_alloc();
}

template <class A>
struct Norm {  // of `channels` channels: slope * v + shift
  int64_t channels;
  const A *scales, *shifts, *mean, *var;  // scales and shifts are null for ones and zeros

  explicit Norm(Reader& reader)
      : channels(reader.number()), scales(reader.address<const A>()), shifts(reader.address<const A>()),
        mean(reader.address<const A>()), var(reader.address<const A>()) {}

  double slope(int64_t c) const { return (scales ? double(scales[c]) : 1) / std::sqrt(double(var[c]) + kEps); }
  double shift(int64_t c) const { return (shifts ? double(shifts[c]) : 0) - slope(c) * double(mean[c]); }
};

template <class A>
struct Sums {  // what one pass adds up, and the images that it reads
  std::deque<Operand<A>> operands;
  std::vector<Combination<A>> results;

  const Operand<A>& operand(A* data, int64_t width) {
    const int64_t packed[] = {1, int64_t(data), 0, 0, width};
    Reader reader(packed);
    return operands.emplace_back(reader);
  }
};

template <class A>
class Network {  // the passes of one thread
 public:
  // room: for the feature maps of `images` images; outside: the images that the network reads and writes
  Network(const int64_t* packed, char* room, int64_t images, char* const* outside)
      : reader(packed), room(room), images(images), outside(outside) {
    for (int64_t n = reader.number(); n > 0; --n) add_pass();
  }

  void run(int64_t first, int64_t count) const {
    for (const auto& pass : passes) pass(first, count);
  }

 private:
  using Pass = std::function<void(int64_t, int64_t)>;  // (first image, number of images)

  A* map() {  // a feature map, or null
    const int64_t offset = reader.number();
    return offset < 0 ? nullptr : (A*)(room + offset * images);
  }

  void add_pass() {
    switch (reader.number()) {
      case 0: return passes.push_back(sum());
      case 1: return passes.push_back(depthwise_convolution());
      case 2: return passes.push_back(other());
      case 3: return passes.push_back(normalize());
      default: return passes.push_back(hand_on());
    }
  }

  // Results side by side, or one and its positive part: addends and normalised products
  Pass sum() {
    auto sums = std::make_shared<Sums<A>>();
    const int64_t pixels = reader.number(), relu = reader.number();
    std::vector<Part<A>> parts;
    for (int64_t n = reader.number(); n > 0; --n) {
      A* result = map();
      parts.push_back({result, nullptr, nullptr, reader.number()});
    }
    A* const positives = map();
    std::vector<A*> addends;
    for (int64_t n = reader.number(); n > 0; --n) addends.push_back(map());
    auto& result = sums->results.emplace_back(parts, relu, !positives && addends.empty());
    result.is_near = true;
    result.positives = positives;
    for (A* addend : addends) result.add(sums->operand(addend, result.width), A(1));
    for (int64_t n = reader.number(); n > 0; --n) add_product(*sums, result);
    return [=](int64_t, int64_t count) { combine(count * pixels, sums->results); };
  }

  // An image's columns of weights, each normalised, with a bias where they are the first columns
  void add_product(Sums<A>& sums, Combination<A>& result) {
    A* x = map();
    const int64_t width = reader.number(), k0 = reader.number(), K = reader.number();
    auto& matrix = result.add(sums.operand(x, width)).matrix;
    int64_t c0 = 0;
    for (int64_t n = reader.number(); n > 0; --n) {
      const A* weight = reader.address<const A>() + k0;
      const Norm<A> norm(reader);
      for (int64_t c = 0; c < norm.channels; ++c, weight += K) {
        const double slope = norm.slope(c);
        if (k0 == 0) result.bias[c0 + c] += norm.shift(c);
        for (int64_t k = 0; k < width; ++k) matrix[k * result.width + c0 + c] = A(slope * weight[k]);
      }
      c0 += norm.channels;
    }
  }

  Pass depthwise_convolution() {
    const Depthwise p(reader);
    const auto taps = turned_taps(reader.address<const A>(), p, round_up(p.C, kLanes<A>), false);
    A *x = map(), *y = map();
    return [=](int64_t, int64_t count) {
      Depthwise of_all = p;
      of_all.N = count;
      depthwise(of_all, (const A*)x, 1, taps, y, p.H, p.W, p.Ho(), p.Wo());
    };
  }

  // What is left to an entry point of another library. Its first number is that of images, or of so many pixels in
  // each; the others are numbers, feature maps, or images from outside, of so many elements each
  Pass other() {
    const auto entry = (Entry)reader.number();
    const int64_t dtype = reader.number(), each = reader.number();
    std::vector<int64_t> packed{0};
    std::vector<std::pair<size_t, int64_t>> of_image;  // places in `packed`, and the bytes from one image to the next
    for (int64_t n = reader.number(); n > 0; --n) {
      const int64_t kind = reader.number();
      packed.push_back(kind == 0 ? reader.number() : kind == 1 ? int64_t(map()) : int64_t(outside[reader.number()]));
      if (kind == 2) of_image.emplace_back(packed.size() - 1, reader.number() * sizeof(A));
    }
    return [=](int64_t first, int64_t count) {
      auto of_all = packed;
      of_all[0] = count * each;
      for (const auto& [place, bytes] : of_image) of_all[place] += first * bytes;
      check(entry(dtype, of_all.data()));
    };
  }

  // Of an image from outside, the norm and its positive part; either may be missing
  Pass normalize() {
    const A* from = (const A*)outside[reader.number()];
    const int64_t pixels = reader.number();
    const Norm<A> norm(reader);
    A *plain = map(), *positives = map();
    const int64_t C = norm.channels;
    std::vector<A> slope(C), shift(C);
    for (int64_t c = 0; c < C; ++c) slope[c] = A(norm.slope(c)), shift[c] = A(norm.shift(c));
    return [=](int64_t first, int64_t count) {
      at::parallel_for(0, count * pixels, std::max<int64_t>(1, 16384 / C), [&](int64_t begin, int64_t end) {
        for_columns<kLanes<A>>(0, C, [&](int64_t c, auto n) {
          using V = Lanes<A, n>;
          const V of_v = read<V>(&slope[c]), constant = read<V>(&shift[c]);
          for (int64_t p = begin; p < end; ++p) {
            const V value = read<V>(from + (first * pixels + p) * C + c) * of_v + constant;
            if (plain) store(plain + p * C + c, value);
            if (positives) store(positives + p * C + c, positive(value));
          }
        });
      });
    };
  }

  // Feature maps side by side
  Pass hand_on() {
    A* to = (A*)outside[reader.number()];
    const int64_t pixels = reader.number();
    std::vector<std::pair<const A*, int64_t>> parts;
    int64_t width = 0;
    for (int64_t n = reader.number(); n > 0; --n) {
      A* part = map();
      parts.emplace_back(part, reader.number());
      width += parts.back().second;
    }
    return [=](int64_t first, int64_t count) {
      int64_t c0 = 0;
      for (const auto& [part, C] : parts) {
        for (int64_t p = 0; p < count * pixels; ++p)
          copy_run(to + (first * pixels + p) * width + c0, part + p * C, C);
        c0 += C;
      }
    };
  }

  Reader reader;
  char* room;
  int64_t images;
  char* const* outside;
  std::vector<Pass> passes;
};

template <class A>
void evaluate(const int64_t* packed, int64_t bytes, int64_t N, int64_t images, char* const* outside) {
  const int64_t pieces = (N + images - 1) / images, threads = at::get_num_threads();
  std::atomic<int64_t> next{0};  // threads take pieces as they come free: what is in a cache serves one piece only
  const auto evaluate_pieces = [&](int64_t, int64_t) {
    thread_local std::vector<char> memory;
    if (int64_t(memory.size()) < bytes * images + 64) memory.resize(bytes * images + 64);
    const Network<A> network(packed, (char*)round_up(int64_t(memory.data()), 64), images, outside);
    for (int64_t piece; (piece = next++) < pieces;)
      network.run(piece * images, std::min(images, N - piece * images));
  };
  if (pieces < threads)
    evaluate_pieces(0, 1);
  else
    at::parallel_for(0, threads, 1, evaluate_pieces);
}

}  // namespace

// packed: the passes; bytes: what the feature maps of an image need; N images, `images` at a time; outside: addresses.
// Returns 0, or 1 when out of memory.
extern "C" int inference_evaluate(int64_t is_double, const int64_t* packed, int64_t bytes, int64_t N, int64_t images,
                                  char* const* outside) {
  try {
    if (is_double)
      evaluate<double>(packed, bytes, N, images, outside);
    else
      evaluate<float>(packed, bytes, N, images, outside);
    return 0;
  } catch (const std::exception&) {  // std::length_error too: sizes past any memory
    return 1;
  }
}
