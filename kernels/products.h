// Sums of products of small matrices and the pixels of images.
//
// An image is channels-last: a matrix (pixel, channel), and a 1x1 convolution a product with it. `combine` adds such
// products up without writing any of them to memory; `multiply` sums the outer products of two images over their
// pixels, of which batch statistics and weight gradients are made. Both take a tile of pixels after the other, and hold
// a block of sums in registers. Channels that are left beside whole vectors go into narrower ones, 36 into 32 and 4, or
// into a whole one where that is less work and the result can be copied.
// Sums over pixels run over short tiles in the images' dtype and over tiles in double precision; their order never
// depends on the number of threads.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "packed.h"
#include "vectors.h"

namespace {

constexpr int64_t kCombined = 48;    // pixels of a tile of `combine`: a multiple of the rows of a block
constexpr int64_t kMultiplied = 128;  // pixels of a tile of `multiply`
constexpr int64_t kPieceBytes = 64 << 10;  // of an image that several products share
constexpr int64_t kDepth = 128;      // channels of images, so many tiles of which stay in the first-level cache
constexpr int kSums = kVectorBytes == 64 ? 24 : 12;      // vectors of sums of `combine` that are held in registers
constexpr int kSumsOfOne = kVectorBytes == 64 ? 16 : 12;
constexpr int kOuterSums = kVectorBytes == 64 ? 16 : 8;  // and of `multiply`

// ------------------------------------------------------------------------------------------------------- operands

template <class V>
inline V positive(V value) {  // what is not a number passes
  return value < 0 ? V{} : value;
}

template <class A>
struct Part {
  const A *x, *mask, *more;  // (pixel, width): x where the mask, if there is one, is positive, plus more, if any
  int64_t width;
};

template <class A>
inline void copy_row(A* to, const Part<A>& part, int64_t row, A factor = 1, int64_t ahead = 0) {
  ahead *= part.width;
  for_columns<kLanes<A>>(0, part.width, [&](int64_t c, auto n) {
    using V = Lanes<A, n>;
    const int64_t e = row * part.width + c;
    fetch(part.x + e + ahead);
    if (part.mask) fetch(part.mask + e + ahead);
    if (part.more) fetch(part.more + e + ahead);
    V value = read<V>(part.x + e);
    if (part.mask) value = read<V>(part.mask + e) <= 0 ? V{} : value;  // what is not a number passes, as it does ReLU
    if (part.more) value += read<V>(part.more + e);
    store(to + c, V(value * factor));
  });
}

template <class A>
struct Operand {  // images side by side
  std::vector<Part<A>> parts;
  int64_t width = 0;
  const A* factors = nullptr;  // one for each `image_pixels` pixels, or null
  int64_t image_pixels = 1;

  Operand(const A* x, int64_t width) : parts{{x, nullptr, nullptr, width}}, width(width) {}
  explicit Operand(Reader& reader) {
    for (int64_t n = reader.number(); n > 0; --n) {
      Part<A> part{reader.address<const A>(), reader.address<const A>(), reader.address<const A>(), reader.number()};
      parts.push_back(part);
      width += part.width;
    }
  }

  Operand times(const A* factors, int64_t image_pixels) const {
    Operand product = *this;
    product.factors = factors;
    product.image_pixels = image_pixels;
    return product;
  }

  A factor(int64_t pixel) const { return factors ? factors[pixel / image_pixels] : A(1); }

  // Rows [p0, p0 + rows), one after the other; copied unless they lie like that in memory
  const A* tile(int64_t p0, int64_t rows, Buffer<A>& buffer) const {
    if (parts.size() == 1 && !parts[0].mask && !parts[0].more && !factors) return parts[0].x + p0 * width;
    A* copy = scratch(buffer, rows * width);
    copy_to(copy, p0, rows);
    return copy;
  }

  void copy_to(A* to, int64_t p0, int64_t rows) const {
    for (const auto& part : parts) {
      for (int64_t p = 0; p < rows; ++p) copy_row(to + p * width, part, p0 + p, factor(p0 + p), rows);
      to += part.width;
    }
  }
};

template <class A>
std::deque<Operand<A>> read_operands(Reader& reader) {  // a deque keeps its elements where they are
  std::deque<Operand<A>> operands;
  for (int64_t n = reader.number(); n > 0; --n) operands.emplace_back(reader);
  return operands;
}

template <class A>
std::vector<Part<A>> image(A* data, int64_t width) {
  return {{data, nullptr, nullptr, width}};
}

// -------------------------------------------------------------------------------------------------------- combine

template <class A>
struct Input {  // of a product: rows (pixel, depth), and a matrix (depth, result) with `pitch` elements between its rows
  const A* x;
  int64_t depth;
  const A* matrix;
  int64_t pitch;
};

template <class A>
struct Addend {  // of a result, as wide as that: rows (pixel, result), times a factor
  const A* x;
  A factor;
};

template <class A>
struct Start {  // what products are added to: rows with `pitch` elements between them, 0 for a single one
  const A* first;
  int64_t pitch;
  const std::vector<Addend<A>>& addends;  // what is added to their sum
};

template <class A>
struct Target {  // rows (pixel, result) for the sums: where they are positive if `relu`, where a mask is if there is one
  A* sums;
  int64_t width;
  bool relu = false;
  A* positives = nullptr;  // room for their positive part, where that is wanted too
  const A* mask = nullptr;
  bool is_near = false;  // whether it, and what it is made of, is in the cache
};

template <class A, int R>
struct Rows {  // of a matrix: addresses that need few registers, one of them for every four rows
  static constexpr int kBases = (R + 3) / 4;
  const char* base[kBases];
  int64_t step, three;  // bytes from a row to the next one, and three times as many

  Rows(const A* first, int64_t pitch) : step(pitch * sizeof(A)), three(3 * step) {
    for (int b = 0; b < kBases; ++b) base[b] = (const char*)first + 4 * b * step;
    opaque(step), opaque(three);
  }
  A at(int r) const {
    const int64_t offset[] = {0, step, 2 * step, three};
    return *(const A*)(base[r / 4] + offset[r % 4]);
  }
  void advance(int64_t count) {
    for (auto& address : base) address += count * sizeof(A);
  }
};

// What is fetched of the next rows, besides addends: x and the sums; and their positive part
enum class Fetch { kNothing, kSums, kPositives };

// target[p + r][c + v] = start + sum over inputs and k of x[p + r][k] * matrix[k][c + v] + addends: R rows, V vectors of
// n columns. Meanwhile the next R rows are fetched. Not to be inlined: what surrounds it would take its registers.
template <class A, int n, int R, int V, Fetch kFetch>
__attribute__((noinline)) void combine_block(const Input<A>* input, int64_t inputs, const Start<A>& start,
                                             const Target<A>& target, int64_t p, int64_t c) {
  using Vector = Lanes<A, n>;
  Vector sum[R][V];
  const int64_t width = target.width;
  const auto for_sums = [&](const auto& f) {  // unrolled, since what has a variable index is kept in memory
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) f(sum[r][v], (p + r) * width + c + v * n, r, v);
  };
  for_sums([&](Vector& s, int64_t, int r, int v) {
    s = read<Vector>(start.first + (p + r) * start.pitch + c + v * n);
  });
  constexpr int64_t line = 64 / sizeof(A);
  const A *next_sums = target.sums + (p + R) * width, *next_positives = target.positives;
  if constexpr (kFetch == Fetch::kPositives) next_positives += (p + R) * width;
  for (const Input<A>* end = input + inputs; input != end; ++input) {
    const A* matrix = input->matrix + c;
    Rows<A, R> x(input->x + p * input->depth, input->depth);
    const A* next = input->x + (p + R) * input->depth;
    for (int64_t k = 0; k < input->depth; ++k, matrix += input->pitch, x.advance(1)) {
      if constexpr (kFetch != Fetch::kNothing) fetch(next + k * line), fetch(next_sums + k * line);
      if constexpr (kFetch == Fetch::kPositives) fetch(next_positives + k * line);
      Vector row[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) row[v] = read<Vector>(matrix + v * n);
      for_sums([&](Vector& s, int64_t, int r, int v) { s += row[v] * x.at(r); });
    }
    next_sums += input->depth * line;
    if constexpr (kFetch == Fetch::kPositives) next_positives += input->depth * line;
  }
  for (const auto& addend : start.addends)
    for_sums([&](Vector& s, int64_t e, int, int) {
      fetch(addend.x + e + R * width);
      s += addend.factor * read<Vector>(addend.x + e);
    });
  if (target.relu) for_sums([](Vector& s, int64_t, int, int) { s = positive(s); });
  if (target.mask)
    for_sums([&](Vector& s, int64_t e, int, int) { s = read<Vector>(target.mask + e) <= 0 ? Vector{} : s; });
  for_sums([&](Vector& s, int64_t e, int, int) { store(target.sums + e, s); });
  if (target.positives)
    for_sums([&](Vector& s, int64_t e, int, int) { store(target.positives + e, positive(s)); });
}

// The same for all rows and columns of a tile; its sums may be where it starts
template <class A>
void combine_tile(const Input<A>* input, int64_t inputs, const Start<A>& start, const Target<A>& target,
                  int64_t rows) {
  constexpr int L = kLanes<A>;
  const auto columns = [&](int64_t c, auto n, auto V) {
    constexpr int R = V == 2 ? kSums / 2 : kSumsOfOne;
    const auto block = c || target.is_near ? combine_block<A, n, R, V, Fetch::kNothing>  // the first columns' got all
                       : target.positives  ? combine_block<A, n, R, V, Fetch::kPositives>
                                           : combine_block<A, n, R, V, Fetch::kSums>;
    constexpr bool by_eight = V == 2 && R > 8;  // such as the last sixteen: a block of four waits for its own sums
    int64_t p = 0;
    for (; p + R <= rows && !(by_eight && rows - p == 16); p += R) block(input, inputs, start, target, p, c);
    if constexpr (by_eight)
      for (; p + 8 <= rows; p += 8) combine_block<A, n, 8, V, Fetch::kNothing>(input, inputs, start, target, p, c);
    if constexpr (V == 2)
      for (; p + 4 <= rows; p += 4) combine_block<A, n, 4, V, Fetch::kNothing>(input, inputs, start, target, p, c);
    for (; p < rows; ++p) combine_block<A, n, 1, V, Fetch::kNothing>(input, inputs, start, target, p, c);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  int64_t c = 0;
  for (; c + 2 * L <= target.width; c += 2 * L) columns(c, std::integral_constant<int, L>(), two);
  for_columns<L>(c, target.width, [&](int64_t c, auto n) { columns(c, n, one); });
}

// The same of inputs of any depth: as many at a time as stay in the cache
template <class A>
void combine_tile(const std::vector<Input<A>>& inputs, const Start<A>& start, const Target<A>& target, int64_t rows) {
  const std::vector<Addend<A>> none;
  for (size_t first = 0, last = 0; first < inputs.size() || !last; first = last) {
    int64_t depth = 0;
    for (; last < inputs.size() && (last == first || depth + inputs[last].depth <= kDepth); ++last)
      depth += inputs[last].depth;
    const A* begun = first ? target.sums : start.first;
    const int64_t pitch = first ? target.width : start.pitch;
    if (last == inputs.size())
      return combine_tile(inputs.data() + first, last - first, {begun, pitch, start.addends}, target, rows);
    const Target<A> sums{target.sums, target.width, false, nullptr, nullptr, target.is_near};
    combine_tile(inputs.data() + first, last - first, {begun, pitch, none}, sums, rows);
  }
}

template <class A>
struct Source {
  const Operand<A>* operand;
  Buffer<A> matrix;     // (channel of the operand, channel of the result)
  std::vector<double> bias;  // added with the operand's factors, where it has some
};

template <class A>
struct Buffers {  // of a thread
  Buffer<A> sums, bias;
  std::deque<Buffer<A>> copies;
  std::vector<Input<A>> inputs;
  std::vector<Addend<A>> addends;

  Buffer<A>& copy(size_t k) {
    while (copies.size() <= k) copies.emplace_back();
    return copies[k];
  }
};

template <class A>
struct Combination {  // results = bias + sum over sources of matrix * operand, where that is positive if `relu`
  std::vector<Part<A>> results;  // side by side
  bool relu, is_near = false, in_place;
  A* positives = nullptr;  // room for the only result's positive part, where that is wanted too
  std::vector<double> bias;
  std::vector<Source<A>> sources;
  std::vector<std::pair<const Operand<A>*, A>> addends;  // of an only result, times a number
  int64_t channels = 0, width;

  // may_copy: whether an only result of few channels may be made wider first; not with addends or a positive part
  Combination(std::vector<Part<A>> images, bool relu, bool may_copy = false) : results(std::move(images)), relu(relu) {
    constexpr int L = kLanes<A>;
    for (const auto& result : results) channels += result.width;
    const int64_t padded = round_up(channels, channels % L > L / 2 ? L : 4);  // of few vectors, if of narrower ones
    in_place = results.size() == 1 && !(may_copy && channels < 2 * L && channels < padded);
    width = in_place ? channels : padded;
    bias.resize(width);
  }

  // A source whose matrix is to be filled in: row k says what the operand's channel k adds to the results
  Source<A>& add(const Operand<A>& operand) {
    sources.push_back({&operand, Buffer<A>(operand.width * width), std::vector<double>(width)});
    return sources.back();
  }
  void add(const Operand<A>& operand, A factor) { addends.push_back({&operand, factor}); }

  void run(int64_t p0, int64_t rows, Buffers<A>& buffers) const {
    A* out = in_place ? const_cast<A*>(results[0].x) + p0 * width : scratch(buffers.sums, rows * width);
    buffers.bias.assign(bias.begin(), bias.end());
    buffers.addends.clear(), buffers.inputs.clear();
    size_t k = 0;
    for (const auto& [operand, factor] : addends)
      buffers.addends.push_back({operand->tile(p0, rows, buffers.copy(k++)), factor});
    for (const auto& source : sources) {
      const int64_t depth = source.operand->width;
      buffers.inputs.push_back(
          {source.operand->tile(p0, rows, buffers.copy(k++)), depth, source.matrix.data(), width});
    }
    for (const auto& source : sources)
      if (source.operand->factors) add_bias(source, p0, rows, buffers.copy(k++), buffers.inputs);
    const Target<A> target{out, width, relu, positives ? positives + p0 * width : nullptr, nullptr, is_near};
    combine_tile(buffers.inputs, Start<A>{buffers.bias.data(), 0, buffers.addends}, target, rows);
    if (in_place) return;
    for (const auto& result : results) {
      A* to = const_cast<A*>(result.x) + p0 * result.width;
      for (int64_t p = 0; p < rows; ++p, to += result.width) {
        if (!is_near) fetch_run(to + rows * result.width, result.width);
        copy_row(to, Part<A>{out + p * width, nullptr, nullptr, result.width}, 0);
      }
      out += result.width;
    }
  }

 private:
  // A source's bias as an input of one channel, which has the factors of the images
  void add_bias(const Source<A>& source, int64_t p0, int64_t rows, Buffer<A>& buffer,
                std::vector<Input<A>>& inputs) const {
    A* room = scratch(buffer, rows + width);
    for (int64_t p = 0; p < rows; ++p) room[p] = source.operand->factor(p0 + p);
    std::copy_n(source.bias.begin(), width, room + rows);
    inputs.push_back({room, 1, room + rows, width});
  }
};

template <class A>
void combine(int64_t pixels, const std::vector<Combination<A>>& combinations) {
  at::parallel_for(0, (pixels + kCombined - 1) / kCombined, 4, [&](int64_t begin, int64_t end) {
    thread_local Buffers<A> buffers;
    for (int64_t tile = begin; tile < end; ++tile)
      for (const auto& combination : combinations)
        combination.run(tile * kCombined, std::min(kCombined, pixels - tile * kCombined), buffers);
  });
}

// ------------------------------------------------------------------------------------------------------- multiply

// sums[r][c] += the tile's sum over p of a[p][r] * b[p][c]: R rows, V vectors of n columns. Meanwhile the next tile is
// fetched: of a, of b, of both or of neither.
template <class A, int n, int R, int V, bool kFetchA, bool kFetchB>
__attribute__((noinline)) void multiply_block(const A* a, int64_t a_width, const A* b, int64_t b_width, int64_t rows,
                                              double* sums, int64_t pitch) {
  using Vector = Lanes<A, n>;
  const int64_t a_ahead = rows * a_width, b_ahead = rows * b_width;
  Vector sum[R][V] = {};
  for (int64_t p = 0; p < rows; ++p, a += a_width, b += b_width) {
    Vector row[V];
    if constexpr (kFetchA) fetch(a + a_ahead);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      if constexpr (kFetchB) fetch(b + b_ahead + v * n);
      row[v] = read<Vector>(b + v * n);
      if constexpr (n > 1) in_register(row[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += row[v] * a[r];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)  // unrolled, since what has a variable index is kept in memory
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) add_to(sums + r * pitch + v * n, sum[r][v]);
}

// The same for all; of a symmetric result, the part above the diagonal. Of b, and of a if it is no copy, the next tile
// is fetched.
template <class A>
void multiply_tile(const A* a, int64_t a_width, bool a_is_copy, const A* b, int64_t b_width, int64_t rows, double* sums,
                   int64_t pitch, bool is_symmetric = false) {
  constexpr int L = kLanes<A>;
  const auto columns = [&](int64_t c, auto n, auto V) {
    constexpr int R = kOuterSums / V;
    const int64_t height = is_symmetric ? std::min<int64_t>(a_width, c + V * n) : a_width;
    const bool fetches_a = c == 0 && !a_is_copy;
    const auto visit = [&](int64_t r, auto R) {
      const auto rest = fetches_a ? multiply_block<A, n, R, V, true, false> : multiply_block<A, n, R, V, false, false>;
      const auto first = fetches_a ? multiply_block<A, n, R, V, true, true> : multiply_block<A, n, R, V, false, true>;
      (r ? rest : first)(a + r, a_width, b + c, b_width, rows, sums + r * pitch + c, pitch);
    };
    int64_t r = 0;
    for (; r + R <= height; r += R) visit(r, std::integral_constant<int, R>());
    for (; r + 4 <= height; r += 4) visit(r, std::integral_constant<int, 4>());
    for (; r < height; ++r) visit(r, std::integral_constant<int, 1>());
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  int64_t c = 0;
  for (; c + 2 * L <= b_width; c += 2 * L) columns(c, std::integral_constant<int, L>(), two);
  for_columns<L>(c, b_width, [&](int64_t c, auto n) { columns(c, n, one); });
}

// sums[i][c] += sum over rows of the i-th of the S values(p, c, V()), V being the vector that begins with column c. Four
// rows at a time, since a sum waits for the one before.
template <class A, int S, class F>
inline void add_rows(int64_t rows, int64_t C, const std::array<double*, S>& sums, const F& values) {
  for_columns<kLanes<A>>(0, C, [&](int64_t c, auto n) {
    using V = Lanes<A, n>;
    V sum[4][S] = {};
    const auto add = [&](int64_t p, V* to) {
      const std::array<V, S> value = values(p, c, V());
      for (int i = 0; i < S; ++i) to[i] += value[i];
    };
    int64_t p = 0;
    for (; p + 4 <= rows; p += 4)
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) add(p + r, sum[r]);
    for (; p < rows; ++p) add(p, sum[0]);
    for (int i = 0; i < S; ++i) add_to(sums[i] + c, V((sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i])));
  });
}

template <class A>
double dot(const A* x, const A* y, int64_t count) {
  constexpr int L = kLanes<A>;
  double lanes[L] = {}, sum = 0;
  const auto product = [&](int64_t p, int64_t c, auto zero) {
    using V = decltype(zero);
    return std::array<V, 1>{read<V>(x + p * L + c) * read<V>(y + p * L + c)};
  };
  add_rows<A, 1>(count / L, L, {lanes}, product);
  for (const double lane : lanes) sum += lane;
  for (int64_t e = count / L * L; e < count; ++e) sum += x[e] * y[e];
  return sum;
}

template <class A>
struct Product {
  const Operand<A>&a, &b;
  const bool is_dot;           // the sum of all elements of a * b instead
  const bool is_symmetric;
  std::vector<double> result;  // (channel of a, channel of b)
  std::vector<double> sum;     // of a alone

  Product(const Operand<A>& a, const Operand<A>& b, bool is_dot = false)
      : a(a), b(b), is_dot(is_dot), is_symmetric(&a == &b) {}

  int64_t size() const { return is_dot ? 1 : a.width * (b.width + 1); }

  // Add the pixels [begin, end) to partial sums (a.width, b.width), followed by those of a alone
  void run(int64_t begin, int64_t end, double* partial, Buffer<A>& a_copy, Buffer<A>& b_copy) const {
    for (int64_t p0 = begin; p0 < end; p0 += kMultiplied) {
      const int64_t rows = std::min(kMultiplied, end - p0);
      const A* x = a.tile(p0, rows, a_copy);
      const A* y = is_symmetric ? x : b.tile(p0, rows, b_copy);
      if (is_dot) {
        *partial += dot(x, y, rows * a.width);
        continue;
      }
      multiply_tile(x, a.width, x == a_copy.data(), y, b.width, rows, partial, b.width, is_symmetric);
      add_rows<A, 1>(rows, a.width, {partial + a.width * b.width}, [&](int64_t p, int64_t c, auto zero) {
        return std::array{read<decltype(zero)>(x + p * a.width + c)};
      });
    }
  }

  void finish(const double* partial, int64_t chunks) {
    std::vector<double> total(partial, partial + size());
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t e = 0; e < size(); ++e) total[e] += partial[chunk * size() + e];
    sum.assign(total.end() - (is_dot ? 0 : a.width), total.end());
    total.resize(total.size() - sum.size());
    if (is_symmetric)
      for (int64_t r = 0; r < a.width; ++r)
        for (int64_t c = 0; c < r; ++c) total[r * b.width + c] = total[c * b.width + r];
    result = std::move(total);
  }
};

// The products over all pixels. If `prepares`, prepare(p0, rows) is called first for the pixels that they then read.
template <class A, class F>
void multiply(int64_t pixels, std::vector<Product<A>>& products, bool prepares, const F& prepare) {
  std::vector<int64_t> offset{0};
  const int64_t chunks = std::max<int64_t>(1, std::min<int64_t>(16, pixels / 2048)), count = products.size();
  int64_t width = 1;
  for (const auto& product : products) {
    offset.push_back(offset.back() + product.size() * chunks);
    width = std::max(width, product.a.width);
  }
  std::vector<double> partial(offset.back());
  // a piece of a chunk after the other, so that what several products share stays in the cache
  const int64_t piece = std::max<int64_t>(1, kPieceBytes / sizeof(A) / (width * kMultiplied)) * kMultiplied;
  const auto visit = [&](int64_t chunk, int64_t first, int64_t last) {
    thread_local Buffer<A> a_copy, b_copy;
    const int64_t end = pixels * (chunk + 1) / chunks;
    for (int64_t p0 = pixels * chunk / chunks; p0 < end; p0 += piece) {
      const int64_t p1 = std::min(end, p0 + piece);
      if (prepares) prepare(p0, p1 - p0);
      for (int64_t k = first; k < last; ++k)
        products[k].run(p0, p1, partial.data() + offset[k] + chunk * products[k].size(), a_copy, b_copy);
    }
  };
  if (prepares)
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) visit(chunk, 0, count);
    });
  else
    at::parallel_for(0, chunks * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin / count; chunk * count < end; ++chunk)
        visit(chunk, std::max<int64_t>(0, begin - chunk * count), std::min(count, end - chunk * count));
    });
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) products[k].finish(partial.data() + offset[k], chunks);
  });
}

template <class A>
void multiply(int64_t pixels, std::vector<Product<A>>& products) {
  multiply(pixels, products, false, [](int64_t, int64_t) {});
}

}  // namespace
