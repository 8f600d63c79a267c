// Sums of products of small matrices and the pixels of images.
//
// An image is channels-last: a matrix (pixel, channel), and a 1x1 convolution a product with it. `combine` adds such
// products up without writing any of them to memory; `multiply` sums the outer products of two images over their
// pixels, of which batch statistics and weight gradients are made. Both take a tile of pixels after the other, and hold
// a block of sums in registers. Channels that are left beside whole vectors go into narrower ones: 36 are 32 and 4.
// Sums over pixels run over short tiles in the images' dtype and over tiles in double precision; their order never
// depends on the number of threads.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kCombined = 48;    // pixels of a tile of `combine`: a multiple of the rows of a block
constexpr int64_t kMultiplied = 128;  // pixels of a tile of `multiply`
constexpr int64_t kDepth = 128;      // channels of images, so many tiles of which stay in the first-level cache
constexpr int kSums = kVectorBytes == 64 ? 24 : 12;      // vectors of sums of `combine` that are held in registers
constexpr int kSumsOfOne = kVectorBytes == 64 ? 16 : 12;
constexpr int kOuterSums = kVectorBytes == 64 ? 16 : 8;  // and of `multiply`

// ------------------------------------------------------------------------------------------------------- operands

class Reader {  // of the numbers and addresses that the caller packs into one array
 public:
  explicit Reader(const int64_t* next) : next(next) {}
  int64_t number() { return *next++; }
  template <class T>
  T* address() {
    return (T*)*next++;
  }

 private:
  const int64_t* next;
};

template <class V>
inline V positive(V value) {  // what is not a number passes
  return value < 0 ? V{} : value;
}

template <class A>
inline void make_positive(const A* x, int64_t count, A* to) {
  for_columns<kLanes<A>>(0, count, [&](int64_t e, auto n) { store(to + e, positive(read<Lanes<A, n>>(x + e))); });
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
    int64_t offset = 0;
    for (const auto& part : parts) {
      for (int64_t p = 0; p < rows; ++p) copy_row(copy + p * width + offset, part, p0 + p, factor(p0 + p), rows);
      offset += part.width;
    }
    return copy;
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
struct Start {  // what is added to the products of a pixel: rows with `pitch` elements between them, 0 for a single one
  const A* first;
  int64_t pitch;
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

// out[p + r][c + v] = start + sum over inputs and k of x[p + r][k] * matrix[k][c + v]: R rows, V vectors of n columns.
// Meanwhile the next R rows are fetched.
template <class A, int n, int R, int V>
inline void combine_block(const Input<A>* input, int64_t inputs, Start<A> start, A* out, int64_t width, int64_t p,
                          int64_t c) {
  using Vector = Lanes<A, n>;
  Vector sum[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = read<Vector>(start.first + (p + r) * start.pitch + c + v * n);
  constexpr int64_t kLine = 64;
  const char* next_out = (const char*)(out + (p + R) * width);
  for (const Input<A>* end = input + inputs; input != end; ++input) {
    const A* matrix = input->matrix + c;
    Rows<A, R> x(input->x + p * input->depth, input->depth);
    const char* next = (const char*)(input->x + (p + R) * input->depth);
    for (int64_t k = 0; k < input->depth; ++k, matrix += input->pitch, x.advance(1)) {
      if constexpr (R > 1) {
        fetch(next + k * kLine);
        fetch_to_write(next_out + k * kLine);
      }
      Vector row[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) row[v] = read<Vector>(matrix + v * n);
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] += row[v] * x.at(r);
    }
    next_out += input->depth * kLine;
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + (p + r) * width + c + v * n, sum[r][v]);
}

// The same for all rows and columns of a tile; out may be where it starts
template <class A>
void combine_tile(const Input<A>* input, int64_t inputs, Start<A> start, A* out, int64_t width, int64_t rows) {
  constexpr int L = kLanes<A>;
  const auto columns = [&](int64_t c, auto n, auto V) {
    constexpr int R = V == 2 ? kSums / 2 : kSumsOfOne;
    int64_t p = 0;
    for (; p + R <= rows; p += R) combine_block<A, n, R, V>(input, inputs, start, out, width, p, c);
    for (; p < rows; ++p) combine_block<A, n, 1, V>(input, inputs, start, out, width, p, c);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  int64_t c = 0;
  for (; c + 2 * L <= width; c += 2 * L) columns(c, std::integral_constant<int, L>(), two);
  for_columns<L>(c, width, [&](int64_t c, auto n) { columns(c, n, one); });
}

template <class A>
struct Source {
  const Operand<A>* operand;
  Buffer<A> matrix;     // (channel of the operand, channel of the result)
  std::vector<double> bias;  // added with the operand's factors, where it has some
};

template <class A>
struct Buffers {  // of a thread
  Buffer<A> sums, addend, bias;
  std::vector<Buffer<A>> copies;
  std::vector<Input<A>> inputs;
};

template <class A>
struct Combination {  // results = bias + sum over sources of matrix * operand, where that is positive if `relu`
  std::vector<Part<A>> results;  // side by side
  bool relu;
  A* positives = nullptr;  // room for the only result's positive part, where that is wanted too
  std::vector<double> bias;
  std::vector<Source<A>> sources;
  std::vector<std::pair<const Operand<A>*, A>> addends;  // of an only result, times a number
  int64_t channels = 0, width;

  Combination(std::vector<Part<A>> images, bool relu) : results(std::move(images)), relu(relu) {
    for (const auto& result : results) channels += result.width;
    width = results.size() == 1 ? channels : round_up(channels, 4);
    bias.resize(width);
  }

  // A source whose matrix is to be filled in: row k says what the operand's channel k adds to the results
  Source<A>& add(const Operand<A>& operand) {
    sources.push_back({&operand, Buffer<A>(operand.width * width), std::vector<double>(width)});
    return sources.back();
  }
  void add(const Operand<A>& operand, A factor) { addends.push_back({&operand, factor}); }

  // A tile of the sums without the sources' products: whether there is more to them than the bias
  bool add_plain(int64_t p0, int64_t rows, A* out, Buffers<A>& buffers) const {
    const auto goes_by_image = [](const auto& source) { return source.operand->factors != nullptr; };
    const bool by_image = std::any_of(sources.begin(), sources.end(), goes_by_image);
    if (addends.empty() && !by_image && !sources.empty()) return false;
    for_columns<kLanes<A>>(0, width, [&](int64_t c, auto n) {
      const auto first = read<Lanes<A, n>>(&buffers.bias[c]);
      for (int64_t p = 0; p < rows; ++p) store(out + p * width + c, first);
    });
    for (const auto& [operand, factor] : addends) {
      const A* x = operand->tile(p0, rows, buffers.addend);
      for (int64_t e = 0; e < rows * width; ++e) out[e] += factor * x[e];
    }
    for (const auto& source : sources)
      for (int64_t p = 0; goes_by_image(source) && p < rows; ++p)
        for (int64_t c = 0; c < width; ++c) out[p * width + c] += source.operand->factor(p0 + p) * A(source.bias[c]);
    return true;
  }

  void run(int64_t p0, int64_t rows, Buffers<A>& buffers) const {
    const bool in_place = results.size() == 1;
    A* out = in_place ? const_cast<A*>(results[0].x) + p0 * width : scratch(buffers.sums, rows * width);
    buffers.bias.assign(bias.begin(), bias.end());
    Start<A> start{buffers.bias.data(), 0};
    if (add_plain(p0, rows, out, buffers)) start = {out, width};
    auto& inputs = buffers.inputs;
    inputs.clear();
    buffers.copies.resize(std::max(buffers.copies.size(), sources.size()));
    for (size_t k = 0; k < sources.size(); ++k) {
      const auto& source = sources[k];
      inputs.push_back({source.operand->tile(p0, rows, buffers.copies[k]), source.operand->width,
                        source.matrix.data(), width});
    }
    for (size_t first = 0, last; first < inputs.size(); first = last, start = {out, width}) {
      int64_t depth = inputs[first].depth;
      for (last = first + 1; last < inputs.size() && depth + inputs[last].depth <= kDepth; ++last)
        depth += inputs[last].depth;
      combine_tile(&inputs[first], last - first, start, out, width, rows);
    }
    if (relu) make_positive(out, rows * width, out);
    if (positives) make_positive(out, rows * width, positives + p0 * width);
    if (in_place) return;
    for (const auto& result : results) {
      A* to = const_cast<A*>(result.x) + p0 * result.width;
      for (int64_t p = 0; p < rows; ++p)
        copy_row(to + p * result.width, Part<A>{out + p * width, nullptr, nullptr, result.width}, 0);
      out += result.width;
    }
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

// sums[r][c] += the tile's sum over p of a[p][r] * b[p][c]: R rows, V vectors of n columns
template <class A, int n, int R, int V>
inline void multiply_block(const A* a, int64_t a_width, const A* b, int64_t b_width, int64_t rows, double* sums,
                           int64_t pitch, int64_t ahead) {
  using Vector = Lanes<A, n>;
  Vector sum[R][V] = {};
  const int64_t a_ahead = ahead * a_width, b_ahead = ahead * b_width;
  for (int64_t p = 0; p < rows; ++p, a += a_width, b += b_width) {
    Vector row[V];
    fetch(a + a_ahead);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      fetch(b + b_ahead + v * n);
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

// The same for all; of a symmetric result, the part above the diagonal
template <class A>
void multiply_tile(const A* a, int64_t a_width, const A* b, int64_t b_width, int64_t rows, double* sums, int64_t pitch,
                   bool is_symmetric = false) {
  constexpr int L = kLanes<A>;
  const auto columns = [&](int64_t c, auto n, auto V) {
    constexpr int R = kOuterSums / V;
    const int64_t height = is_symmetric ? std::min<int64_t>(a_width, c + V * n) : a_width;
    const auto visit = [&](int64_t r, auto R) {
      multiply_block<A, n, R, V>(a + r, a_width, b + c, b_width, rows, sums + r * pitch + c, pitch, rows);
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

// sums[c] += sum over rows of value(p, c, V()), V being the vector that begins with column c. Four rows at a time, since
// a sum waits for the one before.
template <class A, class F>
inline void add_rows(int64_t rows, int64_t C, double* sums, const F& value) {
  for_columns<kLanes<A>>(0, C, [&](int64_t c, auto n) {
    using V = Lanes<A, n>;
    V sum[4] = {};
    int64_t p = 0;
    for (; p + 4 <= rows; p += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] += value(p + i, c, V());
    for (; p < rows; ++p) sum[0] += value(p, c, V());
    add_to(sums + c, V((sum[0] + sum[1]) + (sum[2] + sum[3])));
  });
}

template <class A>
double dot(const A* x, const A* y, int64_t count) {
  constexpr int L = kLanes<A>;
  double lanes[L] = {}, sum = 0;
  const auto product = [&](int64_t p, int64_t c, auto zero) {
    using V = decltype(zero);
    return V(read<V>(x + p * L + c) * read<V>(y + p * L + c));
  };
  add_rows<A>(count / L, L, lanes, product);
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
      multiply_tile(x, a.width, y, b.width, rows, partial, b.width, is_symmetric);
      add_rows<A>(rows, a.width, partial + a.width * b.width,
                  [&](int64_t p, int64_t c, auto zero) { return read<decltype(zero)>(x + p * a.width + c); });
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

template <class A>
void multiply(int64_t pixels, std::vector<Product<A>>& products) {
  std::vector<int64_t> offset{0};
  const int64_t chunks = std::max<int64_t>(1, std::min<int64_t>(16, pixels / 2048)), count = products.size();
  for (const auto& product : products) offset.push_back(offset.back() + product.size() * chunks);
  std::vector<double> partial(offset.back());
  // a chunk of pixels after the other, so that what several products share stays in the cache
  at::parallel_for(0, chunks * count, 1, [&](int64_t begin, int64_t end) {
    thread_local Buffer<A> a_copy, b_copy;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / count, k = task % count;
      products[k].run(pixels * chunk / chunks, pixels * (chunk + 1) / chunks,
                      partial.data() + offset[k] + chunk * products[k].size(), a_copy, b_copy);
    }
  });
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) products[k].finish(partial.data() + offset[k], chunks);
  });
}

}  // namespace
