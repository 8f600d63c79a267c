// The loops of fast_cell_cpu.py: sums of small matrix products over the pixels of images, and depthwise convolution.
//
// An image is channels-last: a matrix (pixel, channel), and a 1x1 convolution a product with it. `combine` adds such
// products up without writing any of them to memory; `multiply` sums the outer products of two images over their
// pixels, of which batch statistics and weight gradients are made; `mix` is a node of the two, `spread` weighted sums.
// `project` makes the states of a derived network's cells from wide images.
// Sums over pixels run over short tiles in the images' dtype and over tiles in double precision; their order never
// depends on the number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int64_t kCombined = 48;         // pixels of a tile of `combine`: a multiple of the rows of a block
constexpr int64_t kMultiplied = 128;      // pixels of a tile of `multiply`
constexpr int64_t kBatchBytes = 4 << 20;  // of the candidates that backward visits twice in turn
constexpr double kEps = 1e-5;             // of batch norm
constexpr int kSums = kVectorBytes == 64 ? 24 : 12;  // vectors of sums of `combine` that are held in registers
constexpr int kOuterSums = kVectorBytes == 64 ? 16 : 8;  // and of `multiply`

template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;

constexpr int kQuad = 4;  // the channels of the narrowest common images
template <class A>
struct QuadOf {
  typedef A type __attribute__((vector_size(kQuad * sizeof(A))));
};
template <class A>
using Quad = typename QuadOf<A>::type;

template <class A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class A>
inline void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof(v));
}

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

template <class A>
A* scratch(std::vector<A>& buffer, int64_t size) {
  if (int64_t(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// f(c0, width) for the channels in vectors; the width of a whole one is a constant, so that loops over it become one
// instruction
template <class A, class F>
inline void for_vectors(int64_t C, const F& f) {
  constexpr int64_t L = kLanes<A>;
  int64_t c0 = 0;
  for (; c0 + L <= C; c0 += L) f(c0, std::integral_constant<int64_t, L>());
  if (c0 < C) f(c0, C - c0);
}

// ------------------------------------------------------------------------------------------------------- operands

template <class A>
struct Part {
  const A *x, *mask, *more;  // (pixel, width): x where the mask, if there is one, is positive, plus more, if any
  int64_t width;
};

// to[c] = factor * (x[c] where mask[c] is positive, plus more[c]) for all vectors V that fit into the columns from c on;
// returns the first column that is left. What is not a number passes a mask, as it passes ReLU.
template <class V, class A>
inline int64_t copy_vectors(A* to, const Part<A>& part, int64_t row, A factor, int64_t c) {
  constexpr int64_t n = sizeof(V) / sizeof(A);
  const auto read = [&](const A* image) {
    V vector;
    std::memcpy(&vector, image + row * part.width + c, sizeof(vector));
    return vector;
  };
  for (; c + n <= part.width; c += n) {
    V value = read(part.x);
    if (part.mask) value = read(part.mask) <= 0 ? V{} : value;
    if (part.more) value += read(part.more);
    value *= factor;
    std::memcpy(to + c, &value, sizeof(value));
  }
  return c;
}

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

template <class A>
inline void copy_row(A* to, const Part<A>& part, int64_t row, A factor = 1) {
  int64_t c = copy_vectors<Vec<A>>(to, part, row, factor, 0);
  c = copy_vectors<Quad<A>>(to, part, row, factor, c);
  copy_vectors<A>(to, part, row, factor, c);
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

  // Rows [p0, p0 + rows) with `pitch` elements between them; copied unless they lie like that in memory
  const A* tile(int64_t p0, int64_t rows, int64_t pitch, std::vector<A>& buffer) const {
    if (parts.size() == 1 && !parts[0].mask && !parts[0].more && !factors && pitch == width)
      return parts[0].x + p0 * width;
    A* copy = scratch(buffer, rows * pitch);
    if (pitch > width) std::fill_n(copy, rows * pitch, A(0));
    int64_t offset = 0;
    for (const auto& part : parts) {
      for (int64_t p = 0; p < rows; ++p) copy_row(copy + p * pitch + offset, part, p0 + p, factor(p0 + p));
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

// -------------------------------------------------------------------------------------------------------- combine

// out[r][v] += sum_k x[r][k] * matrix[k][v]
template <class A, int R, int V>
inline void combine_block(const A* x, int64_t pitch, int64_t depth, const A* matrix, int64_t width, A* out) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = load(out + r * width + v * L);
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> row[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) row[v] = load(matrix + k * width + v * L);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += row[v] * x[r * pitch + k];
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + r * width + v * L, sum[r][v]);
}

template <class A, int V>
void combine_columns(const A* x, int64_t pitch, int64_t depth, const A* matrix, int64_t width, A* out, int64_t rows) {
  constexpr int R = kSums / V;
  int64_t p = 0;
  for (; p + R <= rows; p += R)
    combine_block<A, R, V>(x + p * pitch, pitch, depth, matrix, width, out + p * width);
  for (; p < rows; ++p) combine_block<A, 1, V>(x + p * pitch, pitch, depth, matrix, width, out + p * width);
}

// The same for all columns
template <class A>
void combine_tile(const A* x, int64_t pitch, int64_t depth, const A* matrix, int64_t width, A* out, int64_t rows) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 2 * L <= width; c += 2 * L) combine_columns<A, 2>(x, pitch, depth, matrix + c, width, out + c, rows);
  if (c < width) combine_columns<A, 1>(x, pitch, depth, matrix + c, width, out + c, rows);
}

template <class A>
struct Source {
  const Operand<A>* operand;
  std::vector<A> matrix;     // (channel of the operand, channel of the result), padded to whole vectors; or one factor
  std::vector<double> bias;  // added with the operand's factors, where it has some
};

template <class A>
struct Combination {  // results = bias + sum over sources of matrix * operand, where that is positive if `relu`
  std::vector<Part<A>> results;  // side by side
  bool relu;
  A* positive = nullptr;  // room for the only result's positive part, where that is wanted too
  std::vector<double> bias;
  std::vector<Source<A>> sources;
  int64_t channels = 0, width;

  Combination(std::vector<Part<A>> images, bool relu) : results(std::move(images)), relu(relu) {
    for (const auto& result : results) channels += result.width;
    width = round_up(channels, kLanes<A>);
    bias.resize(width);
  }

  // A source whose matrix is to be filled in: row k says what the operand's channel k adds to the results
  Source<A>& add(const Operand<A>& operand) {
    sources.push_back({&operand, std::vector<A>(operand.width * width), std::vector<double>(width)});
    return sources.back();
  }
  void add(const Operand<A>& operand, A factor) { sources.push_back({&operand, {factor}, {}}); }

  // The sums of a tile (rows, width) alone
  void add_up(int64_t p0, int64_t rows, A* out, std::vector<A>& copy) const {
    for_vectors<A>(width, [&](int64_t c0, auto lanes) {
      A first[kLanes<A>];
      for (int64_t c = 0; c < lanes; ++c) first[c] = A(bias[c0 + c]);
      for (int64_t p = 0; p < rows; ++p)
        for (int64_t c = 0; c < lanes; ++c) out[p * width + c0 + c] = first[c];
    });
    for (const auto& source : sources) {
      const int64_t depth = source.operand->width;
      if (source.operand->factors && !source.bias.empty())
        for (int64_t p = 0; p < rows; ++p)
          for (int64_t c = 0; c < width; ++c) out[p * width + c] += source.operand->factor(p0 + p) * A(source.bias[c]);
      const A *x = source.operand->tile(p0, rows, depth, copy), *matrix = source.matrix.data();
      if (source.matrix.size() == 1) {
        for_vectors<A>(channels, [&](int64_t c0, auto lanes) {
          for (int64_t p = 0; p < rows; ++p)
            for (int64_t c = c0; c < c0 + lanes; ++c) out[p * width + c] += *matrix * x[p * depth + c];
        });
        continue;
      }
      combine_tile(x, depth, depth, matrix, width, out, rows);
    }
  }

  void run(int64_t p0, int64_t rows, std::vector<A>& sums, std::vector<A>& copy) const {
    const bool in_place = results.size() == 1 && width == channels;
    A* out = in_place ? const_cast<A*>(results[0].x) + p0 * width : scratch(sums, rows * width);
    add_up(p0, rows, out, copy);
    if (relu)
      for (int64_t e = 0; e < rows * width; ++e) out[e] = std::max(out[e], A(0));
    if (positive)
      for_vectors<A>(channels, [&](int64_t c0, auto lanes) {
        for (int64_t p = 0; p < rows; ++p)
          for (int64_t c = c0; c < c0 + lanes; ++c)
            positive[(p0 + p) * channels + c] = std::max(out[p * width + c], A(0));
      });
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
    std::vector<A> sums, copy;
    for (int64_t tile = begin; tile < end; ++tile)
      for (const auto& combination : combinations)
        combination.run(tile * kCombined, std::min(kCombined, pixels - tile * kCombined), sums, copy);
  });
}

// ------------------------------------------------------------------------------------------------------- multiply

// sums[r][v] += the tile's sum over p of a[p][r] * b[p][v]
template <class A, int R, int V>
inline void multiply_block(const A* a, int64_t a_pitch, const A* b, int64_t b_pitch, int64_t rows, double* sums) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[R][V] = {};
  for (int64_t p = 0; p < rows; ++p, a += a_pitch, b += b_pitch) {
    Vec<A> row[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) row[v] = load(b + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += row[v] * a[r];
  }
  for (int r = 0; r < R; ++r) {
    A lanes[V * L];
    std::memcpy(lanes, sum[r], sizeof(lanes));
    for (int e = 0; e < V * L; ++e) sums[r * b_pitch + e] += lanes[e];
  }
}

template <class A, int V>
void multiply_columns(const A* a, int64_t a_pitch, int64_t a_width, const A* b, int64_t b_pitch, int64_t rows,
                      double* sums) {
  constexpr int R = kOuterSums / V;
  int64_t r = 0;
  for (; r + R <= a_width; r += R) multiply_block<A, R, V>(a + r, a_pitch, b, b_pitch, rows, sums + r * b_pitch);
  for (; r + 4 <= a_width; r += 4) multiply_block<A, 4, V>(a + r, a_pitch, b, b_pitch, rows, sums + r * b_pitch);
  for (; r < a_width; ++r) multiply_block<A, 1, V>(a + r, a_pitch, b, b_pitch, rows, sums + r * b_pitch);
}

// The same for all columns; of a symmetric result, the part above the diagonal
template <class A>
void multiply_tile(const A* a, int64_t a_pitch, int64_t a_width, const A* b, int64_t b_pitch, int64_t rows,
                   double* sums, bool is_symmetric = false) {
  constexpr int L = kLanes<A>;
  for (int64_t c = 0; c < b_pitch; c += 2 * L) {
    const int64_t height = is_symmetric ? std::min(a_width, c + 2 * L) : a_width;
    if (c + 2 * L <= b_pitch)
      multiply_columns<A, 2>(a, a_pitch, height, b + c, b_pitch, rows, sums + c);
    else
      multiply_columns<A, 1>(a, a_pitch, height, b + c, b_pitch, rows, sums + c);
  }
}

template <class A>
struct Product {
  const Operand<A>&a, &b;
  const bool is_dot;           // the sum of all elements of a * b instead
  const bool is_symmetric;
  const int64_t pitch;         // of b's rows in a tile and of the partial sums
  std::vector<double> result;  // (channel of a, channel of b)
  std::vector<double> sum;     // of a alone

  Product(const Operand<A>& a, const Operand<A>& b, bool is_dot = false)
      : a(a), b(b), is_dot(is_dot), is_symmetric(&a == &b), pitch(round_up(b.width, kLanes<A>)) {}

  int64_t size() const { return is_dot ? 1 : a.width * (pitch + 1); }

  // Add the pixels [begin, end) to partial sums (a.width, pitch), followed by those of a alone
  void run(int64_t begin, int64_t end, double* partial, std::vector<A>& a_copy, std::vector<A>& b_copy) const {
    constexpr int L = kLanes<A>;
    for (int64_t p0 = begin; p0 < end; p0 += kMultiplied) {
      const int64_t rows = std::min(kMultiplied, end - p0);
      const A* x = a.tile(p0, rows, a.width, a_copy);
      if (is_dot) {
        const A* y = b.tile(p0, rows, b.width, b_copy);
        A lanes[L] = {};
        int64_t e = 0;
        for (; e + L <= rows * a.width; e += L)
          for (int lane = 0; lane < L; ++lane) lanes[lane] += x[e + lane] * y[e + lane];
        for (; e < rows * a.width; ++e) lanes[0] += x[e] * y[e];
        for (int lane = 0; lane < L; ++lane) *partial += lanes[lane];
        continue;
      }
      const A* y = b.tile(p0, rows, pitch, b_copy);
      multiply_tile(x, a.width, a.width, y, pitch, rows, partial, is_symmetric);
      double* total = partial + a.width * pitch;
      for_vectors<A>(a.width, [&](int64_t c0, auto width) {
        A lanes[L] = {};
        for (int64_t p = 0; p < rows; ++p)
          for (int64_t c = 0; c < width; ++c) lanes[c] += x[p * a.width + c0 + c];
        for (int64_t c = 0; c < width; ++c) total[c0 + c] += lanes[c];
      });
    }
  }

  void finish(const double* partial, int64_t chunks) {
    std::vector<double> total(partial, partial + size());
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t e = 0; e < size(); ++e) total[e] += partial[chunk * size() + e];
    if (is_dot) {
      result = total;
      return;
    }
    result.resize(a.width * b.width);
    for (int64_t r = 0; r < a.width; ++r)
      for (int64_t c = 0; c < b.width; ++c)
        result[r * b.width + c] = is_symmetric && r > c ? total[c * pitch + r] : total[r * pitch + c];
    sum.assign(total.data() + a.width * pitch, total.data() + total.size());
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
    std::vector<A> a_copy, b_copy;
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

template <class A>
std::vector<Part<A>> image(A* data, int64_t width) {
  return {{data, nullptr, nullptr, width}};
}

// --------------------------------------------------------------------------------------------------------- spread

// results[n] = sum over t of alphas[n][t] * images[t]
template <class A>
void spread(int64_t pixels, Reader reader) {
  const auto images = read_operands<A>(reader);
  std::vector<Combination<A>> results;
  for (int64_t n = reader.number(); n > 0; --n)
    results.emplace_back(image(reader.address<A>(), images[0].width), false);
  const A* alpha = reader.address<const A>();
  for (auto& result : results)
    for (const auto& operand : images) result.add(operand, *alpha++);
  combine(pixels, results);
}

// From the gradients of the results, those of the alphas, and of the images whose address is not null
template <class A>
void spread_backward(int64_t pixels, Reader reader) {
  const auto images = read_operands<A>(reader), grads = read_operands<A>(reader);
  const A* alphas = reader.address<const A>();
  double* grad_alphas = reader.address<double>();
  std::vector<Product<A>> products;
  for (const auto& grad : grads)
    for (const auto& operand : images) products.emplace_back(grad, operand, true);
  multiply(pixels, products);
  for (const auto& product : products) *grad_alphas++ = product.result[0];
  std::vector<Combination<A>> grad_images;
  for (size_t t = 0; t < images.size(); ++t)
    if (A* to = reader.address<A>()) {
      grad_images.emplace_back(image(to, images[t].width), false);
      for (size_t n = 0; n < grads.size(); ++n) grad_images.back().add(grads[n], alphas[n * images.size() + t]);
    }
  combine(pixels, grad_images);
}

// ------------------------------------------------------------------------------------------------------------ mix

// The equations are those of fast_cell_cpu.py: W is `weight`, m is `mean_z`, WS is `WS`, s is `s`.

struct Statistics {  // of one candidate; kept from forward to backward
  double *mean, *var, *s, *mean_z, *WS;
  Statistics(double* data, int64_t C, int64_t K)
      : mean(data), var(data + C), s(data + 2 * C), mean_z(data + 3 * C), WS(data + 3 * C + K) {}
};

template <class A>
struct Candidate {  // factor * (scale * norm(W z) + shift); the factor, if there is one, goes by the image
  Operand<A> z;
  const A* factors;
  int64_t image_pixels;
  Operand<A> z_times;
  int64_t C, K;
  const A *weight, *scales;  // null for ones
  int64_t step;              // from a channel's scale to the next one's: 0 or 1
  const A* shifts;           // null for zeros
  Statistics stats;

  explicit Candidate(Reader& reader)
      : z(reader), factors(reader.address<const A>()), image_pixels(reader.number()),
        z_times(z.times(factors, image_pixels)), C(reader.number()), K(z.width), weight(reader.address<const A>()),
        scales(reader.address<const A>()), step(reader.number()), shifts(reader.address<const A>()),
        stats(reader.address<double>(), C, K) {}

  double scale(int64_t c) const { return scales ? double(scales[c * step]) : 1; }

  void find_statistics(const Product<A>& moments, double pixels) {
    std::vector<double> S(K * K);
    for (int64_t k = 0; k < K; ++k) stats.mean_z[k] = moments.sum[k] / pixels;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < K; ++j)
        S[k * K + j] = moments.result[k * K + j] / pixels - stats.mean_z[k] * stats.mean_z[j];
    std::fill_n(stats.WS, C * K, 0.0);
    for (int64_t c = 0; c < C; ++c) {
      double mean = 0, var = 0, *WS = stats.WS + c * K;
      const A* W = weight + c * K;
      for (int64_t k = 0; k < K; ++k) {
        const double w = W[k];
        mean += w * stats.mean_z[k];
        for (int64_t j = 0; j < K; ++j) WS[j] += w * S[k * K + j];
      }
      for (int64_t k = 0; k < K; ++k) var += WS[k] * W[k];
      stats.mean[c] = mean;
      stats.var[c] = std::max(var, 0.0);  // not below zero by rounding
    }
  }

  void add_to(Combination<A>& node) const {
    auto& source = node.add(z_times);
    auto& bias = factors ? source.bias : node.bias;
    for (int64_t c = 0; c < C; ++c) {
      const double slope = scale(c) * stats.s[c];
      bias[c] += (shifts ? shifts[c] : 0) - slope * stats.mean[c];
      for (int64_t k = 0; k < K; ++k) source.matrix[k * node.width + c] = A(slope * weight[c * K + k]);
    }
  }

  // The gradients of the scales (summed up where they are one), of the shifts and of W; and that of z, as a combination
  // of z and of the node's gradient g, the candidate's factors included
  void differentiate(const Operand<A>& g, const std::vector<double>& M, const std::vector<double>& G, double pixels,
                     bool training, double* grad_scales, double* grad_shifts, A* grad_weight,
                     Combination<A>* grad_z) const {
    A* of_g = grad_z ? grad_z->add(g).matrix.data() : nullptr;
    std::vector<double> of_z(training && grad_z ? K * K : 0);
    if (scales) std::fill_n(grad_scales, step ? C : 1, 0.0);
    if (shifts) std::copy_n(G.data(), C, grad_shifts);
    for (int64_t c = 0; c < C; ++c) {
      const A* W = weight + c * K;
      const double s = stats.s[c];
      double q = 0;
      for (int64_t k = 0; k < K; ++k) q += M[c * K + k] * W[k];
      q = s * (q - stats.mean[c] * G[c]);
      if (scales) grad_scales[c * step] += q;
      const double alpha = scale(c);
      if (grad_weight)
        for (int64_t k = 0; k < K; ++k) {
          const double explained = training ? G[c] * stats.mean_z[k] + s * q * stats.WS[c * K + k] : 0;
          grad_weight[c * K + k] = A(alpha * s * (M[c * K + k] - explained));
        }
      if (!grad_z) continue;
      for (int64_t k = 0; k < K; ++k) of_g[c * grad_z->width + k] = A(alpha * s * W[k]);
      if (!training) continue;
      const double curve = alpha * s * s * q / pixels;
      const double constant = curve * stats.mean[c] - alpha * s * G[c] / pixels;
      for (int64_t k = 0; k < K; ++k) {
        const double w = W[k];
        grad_z->bias[k] += constant * w;
        for (int64_t j = 0; j < K; ++j) of_z[k * K + j] -= curve * w * W[j];
      }
    }
    if (!training || !grad_z) return;
    auto& matrix = grad_z->add(z).matrix;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t j = 0; j < K; ++j) matrix[k * grad_z->width + j] = A(of_z[k * K + j]);
  }
};

template <class A>
void mix(int64_t pixels, bool training, Reader reader) {
  const bool relu = reader.number();
  const Operand<A> results(reader);
  Combination<A> node(results.parts, relu);
  node.positive = reader.address<A>();
  const auto parts = read_operands<A>(reader);
  for (const auto& part : parts) node.add(part, A(1));
  std::deque<Candidate<A>> candidates;
  for (int64_t n = reader.number(); n > 0; --n) candidates.emplace_back(reader);
  std::vector<Product<A>> moments;
  if (training) {
    for (const auto& candidate : candidates) moments.emplace_back(candidate.z, candidate.z);
    multiply(pixels, moments);
  }
  at::parallel_for(0, candidates.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      auto& stats = candidates[k].stats;
      if (training) candidates[k].find_statistics(moments[k], pixels);
      for (int64_t c = 0; c < candidates[k].C; ++c) {
        stats.s[c] = 1 / std::sqrt(stats.var[c] + kEps);
        if (training) stats.var[c] *= pixels / (pixels - 1.0);  // running statistics have the unbiased one
      }
    }
  });
  for (const auto& candidate : candidates) candidate.add_to(node);
  combine<A>(pixels, {node});
}

template <class A>
void mix_backward(int64_t pixels, bool training, Reader reader) {
  const Operand<A> g(reader);
  // a few candidates at a time: what the first sweep over pixels has read, the second finds in the cache
  for (int64_t n = reader.number(); n > 0;) {
    const int64_t bytes = pixels * g.width * sizeof(A), count = std::min(n, std::max<int64_t>(2, kBatchBytes / bytes));
    std::deque<Candidate<A>> candidates;
    std::deque<Operand<A>> gradients;
    std::deque<std::deque<Operand<A>>> operands;
    std::vector<Product<A>> products;
    std::vector<Combination<A>> combinations;
    std::vector<double*> to_scales, to_shifts;
    std::vector<A*> to_weight;
    std::vector<int64_t> of_candidate;
    for (int64_t k = 0; k < count; ++k) {
      candidates.emplace_back(reader);
      const auto& candidate = candidates.back();
      gradients.push_back(g.times(candidate.factors, candidate.image_pixels));
      products.emplace_back(gradients.back(), candidate.z);
      to_scales.push_back(reader.address<double>());
      to_shifts.push_back(reader.address<double>());
      to_weight.push_back(reader.address<A>());
      A* grad_z = reader.address<A>();
      of_candidate.push_back(grad_z ? int64_t(combinations.size()) : -1);
      operands.push_back(read_operands<A>(reader));  // what else is added to the gradient of z
      if (!grad_z) continue;
      combinations.emplace_back(image(grad_z, candidate.K), false);
      for (const auto& operand : operands.back()) combinations.back().add(operand, A(1));
    }
    multiply(pixels, products);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        candidates[k].differentiate(gradients[k], products[k].result, products[k].sum, pixels, training, to_scales[k],
                                    to_shifts[k], to_weight[k],
                                    of_candidate[k] < 0 ? nullptr : &combinations[of_candidate[k]]);
    });
    combine(pixels, combinations);
    n -= count;
  }
}

// -------------------------------------------------------------------------------------------------------- project

// Here v = W z, z the positive part of an image of many channels, is computed and kept: its statistics are sums over v
// itself. Without W, v is given.

inline int64_t chunks_of(int64_t pixels) { return std::max<int64_t>(1, std::min<int64_t>(16, pixels / 1024)); }

// f(chunk, p0, rows) for the tiles of a fixed number of chunks of the pixels, a chunk by one thread
template <class F>
void for_tiles(int64_t pixels, int64_t tile, const F& f) {
  const int64_t chunks = chunks_of(pixels);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = pixels * (chunk + 1) / chunks;
      for (int64_t p0 = pixels * chunk / chunks; p0 < last; p0 += tile) f(chunk, p0, std::min(tile, last - p0));
    }
  });
}

// sums[0][c] += sum over rows of v[c], sums[1][c] += that of v[c]², by way of the squares of its distance from the mean
template <class A>
void add_moments(const A* v, int64_t rows, int64_t C, double* sums) {
  constexpr int L = kLanes<A>;
  for_vectors<A>(C, [&](int64_t c0, auto width) {
    A total[L] = {}, mean[L] = {}, square[L] = {};
    for (int64_t p = 0; p < rows; ++p)
      for (int64_t c = 0; c < width; ++c) total[c] += v[p * C + c0 + c];
    for (int64_t c = 0; c < width; ++c) mean[c] = total[c] / rows;
    for (int64_t p = 0; p < rows; ++p)
      for (int64_t c = 0; c < width; ++c) {
        const A distance = v[p * C + c0 + c] - mean[c];
        square[c] += distance * distance;
      }
    for (int64_t c = 0; c < width; ++c) {
      sums[c0 + c] += total[c];
      sums[C + c0 + c] += square[c] + double(total[c]) * total[c] / rows;
    }
  });
}

// The sums of the chunks, in their order
inline std::vector<double> total_of(const std::vector<double>& partial, int64_t size) {
  std::vector<double> total(size);
  for (size_t e = 0; e < partial.size(); ++e) total[e % size] += partial[e];
  return total;
}

template <class A>
struct Projection {  // scale * norm(v) + shift, v = W z
  Operand<A> z;
  int64_t C, K;
  const A* weight;  // null where v is given
  A* v;             // null where it is not kept
  const A *scales, *shifts;  // null for ones and zeros
  Statistics stats;

  explicit Projection(Reader& reader)
      : z(reader), C(reader.number()), K(z.width), weight(reader.address<const A>()), v(reader.address<A>()),
        scales(reader.address<const A>()), shifts(reader.address<const A>()), stats(reader.address<double>(), C, 0) {}

  double scale(int64_t c) const { return scales ? double(scales[c]) : 1; }

  void find_statistics(const std::vector<double>& sums, double pixels) {
    for (int64_t c = 0; c < C; ++c) {
      stats.mean[c] = sums[c] / pixels;
      stats.var[c] = std::max(sums[C + c] / pixels - stats.mean[c] * stats.mean[c], 0.0);
    }
  }
};

// Rows of scale * (v - mean) + shift, and of its positive part, for the channels [c0, c0 + width) of C
template <class A>
void normalize(const A* v, int64_t rows, int64_t C, int64_t c0, int64_t width, const A* mean, const A* slope,
               const A* shift, A* plain, A* positive) {
  for_vectors<A>(width, [&](int64_t first, auto lanes) {
    const int64_t from = c0 + first;
    for (int64_t p = 0; p < rows; ++p) {
      A value[kLanes<A>];
      for (int64_t c = 0; c < lanes; ++c)
        value[c] = (v[p * C + from + c] - mean[from + c]) * slope[from + c] + shift[from + c];
      if (plain)
        for (int64_t c = 0; c < lanes; ++c) plain[p * width + first + c] = value[c];
      if (positive)
        for (int64_t c = 0; c < lanes; ++c) positive[p * width + first + c] = std::max(value[c], A(0));
    }
  });
}

template <class A>
void project(int64_t pixels, bool training, Reader reader) {
  Projection<A> p(reader);
  const int64_t C = p.C;
  std::vector<Part<A>> results;  // x: room for the result, more: for its positive part; either may be null
  for (int64_t n = reader.number(); n > 0; --n) {
    Part<A> result{reader.address<A>(), nullptr, reader.address<A>(), reader.number()};
    results.push_back(result);
  }
  std::vector<A> mean(C), slope(C), shift(C);
  const auto finish = [&](const A* v, int64_t p0, int64_t rows) {
    int64_t c0 = 0;
    for (const auto& result : results) {
      const auto at = [&](const A* image) { return image ? const_cast<A*>(image) + p0 * result.width : nullptr; };
      normalize(v, rows, C, c0, result.width, mean.data(), slope.data(), shift.data(), at(result.x), at(result.more));
      c0 += result.width;
    }
  };
  const auto find_slopes = [&] {
    for (int64_t c = 0; c < C; ++c) {
      p.stats.s[c] = 1 / std::sqrt(p.stats.var[c] + kEps);
      mean[c] = A(p.stats.mean[c]);
      slope[c] = A(p.scale(c) * p.stats.s[c]);
      shift[c] = p.shifts ? p.shifts[c] : A(0);
    }
  };
  Combination<A> product(image(p.v, C), false);
  if (p.weight) {
    auto& matrix = product.add(p.z).matrix;
    for (int64_t c = 0; c < C; ++c)
      for (int64_t k = 0; k < p.K; ++k) matrix[k * product.width + c] = p.weight[c * p.K + k];
  }
  if (!training) find_slopes();
  std::vector<double> sums(training ? chunks_of(pixels) * 2 * C : 0);
  for_tiles(pixels, kCombined, [&](int64_t chunk, int64_t p0, int64_t rows) {
    thread_local std::vector<A> sums_of_tile, copy, room;
    A* v = p.v ? p.v + p0 * C : scratch(room, rows * C);
    A* tile = product.width == C ? v : scratch(sums_of_tile, rows * product.width);
    if (p.weight) product.add_up(p0, rows, tile, copy);
    if (p.weight && tile != v)
      for (int64_t r = 0; r < rows; ++r) std::copy_n(tile + r * product.width, C, v + r * C);
    if (training)
      add_moments(v, rows, C, sums.data() + chunk * 2 * C);
    else
      finish(v, p0, rows);
  });
  if (!training) return;
  p.find_statistics(total_of(sums, 2 * C), pixels);
  find_slopes();
  for (int64_t c = 0; c < C; ++c) p.stats.var[c] *= pixels / (pixels - 1.0);
  for_tiles(pixels, kCombined, [&](int64_t, int64_t p0, int64_t rows) { finish(p.v + p0 * C, p0, rows); });
}

// sums[0][c] += sum over rows of g[c], sums[1][c] += that of g[c] * (v[c] - mean[c])
template <class A>
void add_gradients(const A* g, const A* v, const A* mean, int64_t rows, int64_t C, double* sums) {
  constexpr int L = kLanes<A>;
  for_vectors<A>(C, [&](int64_t c0, auto width) {
    A total[L] = {}, product[L] = {};
    for (int64_t p = 0; p < rows; ++p)
      for (int64_t c = 0; c < width; ++c) {
        const int64_t e = p * C + c0 + c;
        total[c] += g[e];
        product[c] += g[e] * (v[e] - mean[c0 + c]);
      }
    for (int64_t c = 0; c < width; ++c) {
      sums[c0 + c] += total[c];
      sums[C + c0 + c] += product[c];
    }
  });
}

// Rows of a tile (rows, pitch) to the images that lie side by side in it, zero where z is
template <class A>
void put_positive(const std::vector<Part<A>>& parts, const std::vector<A*>& to, const A* tile, const A* z,
                  int64_t pitch, int64_t p0, int64_t rows) {
  for (size_t n = 0; n < parts.size(); ++n) {
    const int64_t width = parts[n].width;
    if (to[n])
      for (int64_t p = 0; p < rows; ++p)
        copy_row(to[n] + (p0 + p) * width, Part<A>{tile + p * pitch, z + p * pitch, nullptr, width}, 0);
    tile += width;
    z += width;
  }
}

template <class A>
void project_backward(int64_t pixels, bool training, Reader reader) {
  const Projection<A> p(reader);
  const Operand<A> g(reader);
  double *to_scales = reader.address<double>(), *to_shifts = reader.address<double>();
  A* to_weight = reader.address<A>();  // or, where v is given, the gradient of v
  std::vector<A*> to_z;
  for (size_t n = 0; n < p.z.parts.size(); ++n) to_z.push_back(reader.address<A>());
  const int64_t C = p.C, K = p.K, pitch = round_up(K, kLanes<A>), chunks = chunks_of(pixels);

  std::vector<A> mean(p.stats.mean, p.stats.mean + C), slope(C), of_v(C), constant(C);
  std::vector<double> sums(chunks * 2 * C);
  for_tiles(pixels, kMultiplied, [&](int64_t chunk, int64_t p0, int64_t rows) {
    thread_local std::vector<A> copy;
    add_gradients(g.tile(p0, rows, C, copy), p.v + p0 * C, mean.data(), rows, C, sums.data() + chunk * 2 * C);
  });
  sums = total_of(sums, 2 * C);
  for (int64_t c = 0; c < C; ++c) {
    const double s = p.stats.s[c], G = sums[c], q = s * sums[C + c];
    to_shifts[c] = G;
    to_scales[c] = q;
    slope[c] = A(p.scale(c) * s);
    constant[c] = A(training ? G / pixels : 0);
    of_v[c] = A(training ? s * q / pixels : 0);
  }

  std::vector<A> matrix(C * pitch);
  for (int64_t c = 0; p.weight && c < C; ++c) std::copy_n(p.weight + c * K, K, matrix.data() + c * pitch);
  std::vector<double> products(chunks * C * pitch);
  for_tiles(pixels, kMultiplied, [&](int64_t chunk, int64_t p0, int64_t rows) {
    thread_local std::vector<A> g_copy, z_copy, v_room, z_room;
    const A *from = g.tile(p0, rows, C, g_copy), *v = p.v + p0 * C;
    A *to_v = p.weight ? scratch(v_room, rows * C) : to_weight + p0 * C, *out = scratch(z_room, rows * pitch);
    for_vectors<A>(C, [&](int64_t c0, auto width) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < width; ++k) {
          const int64_t c = c0 + k, e = r * C + c;
          to_v[e] = slope[c] * (from[e] - constant[c] - (v[e] - mean[c]) * of_v[c]);
        }
    });
    if (!p.weight) return;
    const A* z = p.z.tile(p0, rows, pitch, z_copy);
    multiply_tile(to_v, C, C, z, pitch, rows, products.data() + chunk * C * pitch);
    std::fill_n(out, rows * pitch, A(0));
    combine_tile(to_v, C, C, matrix.data(), pitch, out, rows);
    put_positive(p.z.parts, to_z, out, z, pitch, p0, rows);
  });
  products = total_of(products, C * pitch);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t k = 0; k < K; ++k) to_weight[c * K + k] = A(products[c * pitch + k]);
}

// --------------------------------------------------------------------------------------------------- every second

// Of images (N, H, W, C) every second pixel of every second row, from the first on and from the second on: `first` and
// `second`, (N, ceil(H/2), ceil(W/2), C), the latter with zeros past the edge. `gather` reads x, else x is written.
template <class A>
void every_second(int64_t N, int64_t H, int64_t W, int64_t C, bool gather, A* x, A* first, A* second) {
  const int64_t Ho = (H + 1) / 2, Wo = (W + 1) / 2;
  at::parallel_for(0, N * Ho, std::max<int64_t>(1, 8192 / (Wo * C)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = row % Ho * 2;
      A *of_first = first + row * Wo * C, *of_second = second + row * Wo * C;
      A* upper = x + (row / Ho * H + y) * W * C;
      A* lower = y + 1 < H ? upper + W * C : nullptr;
      for (int64_t w = 0; w < W; ++w) {
        A *above = upper + w * C, *below = lower ? lower + w * C : nullptr;
        A* pixel = (w % 2 ? of_second : of_first) + w / 2 * C;
        if (A* from = w % 2 ? below : above) gather ? std::copy_n(from, C, pixel) : std::copy_n(pixel, C, from);
        if (A* between = w % 2 ? above : below; between && !gather) std::fill_n(between, C, A(0));
      }
      if (gather && !lower) std::fill_n(of_second, Wo * C, A(0));
      if (gather && W % 2) std::fill_n(of_second + (Wo - 1) * C, C, A(0));
    }
  });
}

// ------------------------------------------------------------------------------------------------------- rms norm

// y = scale x with scale = 1 / sqrt(mean over channels of x² + eps), a pixel after the other. W is the number of
// channels, or 0 for any.
template <class A, int W>
void rms_norm(int64_t begin, int64_t end, int64_t width, A eps, A* x, A* scale) {
  constexpr int64_t kPixels = 64;  // together, so that their roots are taken a vector at a time
  const int64_t C = W ? W : width;
  for (int64_t p0 = begin; p0 < end; p0 += kPixels) {
    const int64_t count = std::min(kPixels, end - p0);
    A* pixels = x + p0 * C;
    A sums[kPixels] = {};
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < C; ++c) sums[p] += pixels[p * C + c] * pixels[p * C + c];
    for (int64_t p = 0; p < count; ++p) scale[p0 + p] = 1 / std::sqrt(sums[p] / C + eps);
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < C; ++c) pixels[p * C + c] *= scale[p0 + p];
  }
}

// d x = scale (d y - y mean(y d y)), in place of d y
template <class A, int W>
void rms_norm_backward(int64_t begin, int64_t end, int64_t width, A* grad, const A* y, const A* scale) {
  const int64_t C = W ? W : width;
  for (int64_t p = begin; p < end; ++p) {
    A* g = grad + p * C;
    const A* pixel = y + p * C;
    A sum = 0;
    for (int64_t c = 0; c < C; ++c) sum += g[c] * pixel[c];
    const A mean = sum / C;
    for (int64_t c = 0; c < C; ++c) g[c] = scale[p] * (g[c] - pixel[c] * mean);
  }
}

template <class F>
void for_pixels(int64_t pixels, int64_t width, const F& f) {
  at::parallel_for(0, pixels, std::max<int64_t>(1, 16384 / width), [&](int64_t begin, int64_t end) {
    switch (width) {
      case 4: return f(begin, end, std::integral_constant<int, 4>());
      case 8: return f(begin, end, std::integral_constant<int, 8>());
      case 16: return f(begin, end, std::integral_constant<int, 16>());
      default: return f(begin, end, std::integral_constant<int, 0>());
    }
  });
}

// ------------------------------------------------------------------------------------------------------ depthwise

struct Depthwise {
  int64_t N, C, H, W, K, stride, dilation;
  int64_t Ho() const { return (H + stride - 1) / stride; }
  int64_t Wo() const { return (W + stride - 1) / stride; }
  int64_t pad() const { return dilation * (K / 2); }
  int64_t span() const { return (K - 1) * dilation + 1; }
  // Rows of one piece of work: the padded piece should stay in the second-level cache
  int64_t block_rows(int64_t rows, int64_t cols) const {
    return std::min(rows, std::max<int64_t>(8, 32768 / std::max<int64_t>(1, cols * C)));
  }
};

// Rows [y0, y0 + rows) and columns [x0, x0 + cols) of one image (H, W, C), zero outside, as (row, col, width); with
// `step`, of the image with step - 1 zeros between its pixels
template <class A>
void load_padded(A* dst, const A* image, int64_t H, int64_t W, int64_t C, int64_t width, int64_t y0, int64_t rows,
                 int64_t x0, int64_t cols, int64_t step) {
  const int64_t copied = std::min(W, cols + x0);  // of a row, where it is copied whole; x0 is not positive
  for (int64_t r = 0; r < rows; ++r, dst += cols * width) {
    const int64_t h = (y0 + r) / step;
    if (y0 + r < 0 || (y0 + r) % step || h >= H) {
      std::fill_n(dst, cols * width, A(0));
    } else if (step == 1 && width == C) {
      std::fill_n(dst, -x0 * C, A(0));
      std::copy_n(image + h * W * C, copied * C, dst - x0 * C);
      std::fill_n(dst + (copied - x0) * C, (cols + x0 - copied) * C, A(0));
    } else {
      std::fill_n(dst, cols * width, A(0));
      for (int64_t w = 0; w < W && w * step - x0 < cols; ++w)
        std::copy_n(image + (h * W + w) * C, C, dst + (w * step - x0) * width);
    }
  }
}

// out[x] = sum over taps of weight[tap] * image[x * stride + tap] for R pixels and V vectors of channels. K is the
// kernel size, or 0 for any. With a dilation X > 0 and stride 1, pixels X apart share the columns that they read.
template <class A, int K, int X, int R, int V>
inline void depthwise_block(const A* image, const A* weight, A* out, const Depthwise& p, int64_t cols, int64_t width) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[R][V] = {};
  if constexpr (X > 0) {
    for (int i = 0; i < K; ++i) {
      const A* line = image + i * X * cols * width;
      const A* taps = weight + i * K * width;
#pragma GCC unroll 16
      for (int m = 0; m < R + K - 1; ++m) {
        Vec<A> column[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) column[v] = load(line + m * X * width + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if (m - r < 0 || m - r >= K) continue;
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sum[r][v] += column[v] * load(taps + (m - r) * width + v * L);
        }
      }
    }
  } else {
    for (int64_t i = 0; i < p.K; ++i)
      for (int64_t j = 0; j < p.K; ++j) {
        const A* pixel = image + (i * cols + j) * p.dilation * width;
        Vec<A> tap[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) tap[v] = load(weight + (i * p.K + j) * width + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sum[r][v] += tap[v] * load(pixel + r * p.stride * width + v * L);
      }
  }
  const int64_t apart = (X > 0 ? X : 1) * width;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + r * apart + v * L, sum[r][v]);
}

template <class A, int K, int X, int V>
void depthwise_columns(const A* image, const A* weight, A* out, const Depthwise& p, int64_t cols, int64_t width,
                       int64_t count) {
  constexpr int step = X > 0 ? X : 1, R = 4;
  const auto visit = [&](int64_t x, auto rows) {
    constexpr int r = decltype(rows)::value;
    depthwise_block<A, K, X, r, V>(image + x * p.stride * width, weight, out + x * width, p, cols, width);
  };
  int64_t x = 0;
  for (; x + R * step <= count; x += R * step)
    for (int64_t phase = 0; phase < step; ++phase) visit(x + phase, std::integral_constant<int, R>());
  for (; x < count; ++x) visit(x, std::integral_constant<int, 1>());
}

template <class A, int K, int X>
void depthwise_row(const A* image, const A* weight, A* out, const Depthwise& p, int64_t cols, int64_t width) {
  constexpr int L = kLanes<A>;
  const int64_t count = (cols - p.span()) / p.stride + 1;
  int64_t c = 0;
  for (; c + 2 * L <= width; c += 2 * L)
    depthwise_columns<A, K, X, 2>(image + c, weight + c, out + c, p, cols, width, count);
  if (c < width) depthwise_columns<A, K, X, 1>(image + c, weight + c, out + c, p, cols, width, count);
}

template <class A>
using DepthwiseRow = void (*)(const A*, const A*, A*, const Depthwise&, int64_t, int64_t);

template <class A>
DepthwiseRow<A> choose_row(const Depthwise& p) {
  if (p.stride == 1 && p.dilation == 1 && p.K == 3) return depthwise_row<A, 3, 1>;
  if (p.stride == 1 && p.dilation == 1 && p.K == 5) return depthwise_row<A, 5, 1>;
  if (p.stride == 1 && p.dilation == 2 && p.K == 3) return depthwise_row<A, 3, 2>;
  if (p.stride == 1 && p.dilation == 2 && p.K == 5) return depthwise_row<A, 5, 2>;
  return depthwise_row<A, 0, 0>;
}

template <class A>
std::vector<A> turned_taps(const A* weight, const Depthwise& p, int64_t width, bool flip) {
  const int64_t KK = p.K * p.K;  // (C, K*K) -> (K*K, width)
  std::vector<A> taps(KK * width);
  for (int64_t c = 0; c < p.C; ++c)
    for (int64_t t = 0; t < KK; ++t) taps[(flip ? KK - 1 - t : t) * width + c] = weight[c * KK + t];
  return taps;
}

// The convolution of `input` (N, H, W, C), with `step` - 1 zeros put between its pixels, at `Ho` x `Wo` places
template <class A>
void depthwise(const Depthwise& p, const A* input, int64_t step, const std::vector<A>& taps, A* output, int64_t H,
               int64_t W, int64_t Ho, int64_t Wo) {
  const int64_t width = round_up(p.C, kLanes<A>), cols = (Wo - 1) * p.stride + p.span();
  const int64_t block = p.block_rows(Ho, cols), blocks = (Ho + block - 1) / block;
  const auto convolve = choose_row<A>(p);
  at::parallel_for(0, p.N * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> padded(((block - 1) * p.stride + p.span()) * cols * width), out(Wo * width);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / blocks, y0 = unit % blocks * block, y1 = std::min(Ho, y0 + block);
      load_padded(padded.data(), input + n * H * W * p.C, H, W, p.C, width, y0 * p.stride - p.pad(),
                  (y1 - y0 - 1) * p.stride + p.span(), -p.pad(), cols, step);
      for (int64_t y = y0; y < y1; ++y) {
        const A* row = padded.data() + (y - y0) * p.stride * cols * width;
        A* to = output + (n * Ho + y) * Wo * p.C;
        convolve(row, taps.data(), width == p.C ? to : out.data(), p, cols, width);
        if (width == p.C) continue;
        for (int64_t x = 0; x < Wo; ++x) std::copy_n(out.data() + x * width, p.C, to + x * p.C);
      }
    }
  });
}

// sums[j] += sum over y and x of grad[y][x] * image[y * stride][x * stride + j * dilation], for J taps of a row
template <class A, int J>
inline void weight_block(const A* image, const A* grad, const Depthwise& p, int64_t cols, int64_t width, int64_t rows,
                         double* sums) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[J] = {};
  for (int64_t y = 0; y < rows; ++y, image += p.stride * cols * width, grad += p.Wo() * width)
    for (int64_t x = 0; x < p.Wo(); ++x) {
      const Vec<A> g = load(grad + x * width);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sum[j] += g * load(image + (x * p.stride + j * p.dilation) * width);
    }
  for (int j = 0; j < J; ++j)
    for (int lane = 0; lane < L; ++lane) sums[j * width + lane] += sum[j][lane];
}

template <class A>
void depthwise_grad_weight(const Depthwise& p, const A* grad, const A* input, A* grad_weight) {
  constexpr int L = kLanes<A>;
  const int64_t Ho = p.Ho(), Wo = p.Wo(), KK = p.K * p.K;
  const int64_t width = round_up(p.C, L), cols = (Wo - 1) * p.stride + p.span();
  const int64_t block = p.block_rows(Ho, cols), blocks = (Ho + block - 1) / block;
  const int64_t chunks = std::min<int64_t>(16, p.N * blocks);
  std::vector<double> partial(chunks * KK * width);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> padded(((block - 1) * p.stride + p.span()) * cols * width), copy(block * Wo * width);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t unit = p.N * blocks * chunk / chunks; unit < p.N * blocks * (chunk + 1) / chunks; ++unit) {
        const int64_t n = unit / blocks, y0 = unit % blocks * block, rows = std::min(Ho - y0, block);
        load_padded(padded.data(), input + n * p.H * p.W * p.C, p.H, p.W, p.C, width, y0 * p.stride - p.pad(),
                    (rows - 1) * p.stride + p.span(), -p.pad(), cols, 1);
        const A* g = grad + (n * Ho + y0) * Wo * p.C;
        if (width != p.C) {
          for (int64_t x = 0; x < rows * Wo; ++x) std::copy_n(g + x * p.C, p.C, copy.data() + x * width);
          g = copy.data();
        }
        for (int64_t i = 0; i < p.K; ++i)
          for (int64_t c = 0; c < width; c += L) {
            const A* line = padded.data() + i * p.dilation * cols * width + c;
            double* sums = partial.data() + (chunk * KK + i * p.K) * width + c;
            const int64_t next = p.dilation * width;
            int64_t j = 0;
            for (; j + 5 <= p.K; j += 5)
              weight_block<A, 5>(line + j * next, g + c, p, cols, width, rows, sums + j * width);
            for (; j + 3 <= p.K; j += 3)
              weight_block<A, 3>(line + j * next, g + c, p, cols, width, rows, sums + j * width);
            for (; j < p.K; ++j)
              weight_block<A, 1>(line + j * next, g + c, p, cols, width, rows, sums + j * width);
          }
      }
  });
  for (int64_t c = 0; c < p.C; ++c)
    for (int64_t t = 0; t < KK; ++t) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[(chunk * KK + t) * width + c];
      grad_weight[c * KK + t] = A(sum);
    }
}

template <class F>
int with_dtype(int64_t is_double, const F& f) {
  try {
    if (is_double)
      f(double());
    else
      f(float());
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

// Images are channels-last and dense. Each function returns 0, or 1 when out of memory. `packed` is read in the order
// of the constructors above; fast_cell_cpu.py writes it.
extern "C" {

int fast_cell_spread(int64_t is_double, int64_t pixels, const int64_t* packed) {
  return with_dtype(is_double, [&](auto zero) { spread<decltype(zero)>(pixels, Reader(packed)); });
}

int fast_cell_spread_backward(int64_t is_double, int64_t pixels, const int64_t* packed) {
  return with_dtype(is_double, [&](auto zero) { spread_backward<decltype(zero)>(pixels, Reader(packed)); });
}

int fast_cell_mix(int64_t is_double, int64_t pixels, int64_t training, const int64_t* packed) {
  return with_dtype(is_double, [&](auto zero) { mix<decltype(zero)>(pixels, training, Reader(packed)); });
}

int fast_cell_mix_backward(int64_t is_double, int64_t pixels, int64_t training, const int64_t* packed) {
  return with_dtype(is_double, [&](auto zero) { mix_backward<decltype(zero)>(pixels, training, Reader(packed)); });
}

int fast_cell_project(int64_t is_double, int64_t pixels, int64_t training, const int64_t* packed) {
  return with_dtype(is_double, [&](auto zero) { project<decltype(zero)>(pixels, training, Reader(packed)); });
}

int fast_cell_project_backward(int64_t is_double, int64_t pixels, int64_t training, const int64_t* packed) {
  return with_dtype(is_double, [&](auto zero) { project_backward<decltype(zero)>(pixels, training, Reader(packed)); });
}

int fast_cell_every_second(int64_t is_double, int64_t N, int64_t H, int64_t W, int64_t C, int64_t gather, void* x,
                           void* first, void* second) {
  return with_dtype(is_double, [&](auto zero) {
    using A = decltype(zero);
    every_second(N, H, W, C, gather, (A*)x, (A*)first, (A*)second);
  });
}

int fast_cell_rms_norm(int64_t is_double, int64_t pixels, int64_t width, double eps, void* x, void* scale) {
  return with_dtype(is_double, [&](auto zero) {
    using A = decltype(zero);
    for_pixels(pixels, width, [&](int64_t begin, int64_t end, auto W) {
      rms_norm<A, decltype(W)::value>(begin, end, width, A(eps), (A*)x, (A*)scale);
    });
  });
}

int fast_cell_rms_norm_backward(int64_t is_double, int64_t pixels, int64_t width, void* grad, const void* y,
                                const void* scale) {
  return with_dtype(is_double, [&](auto zero) {
    using A = decltype(zero);
    for_pixels(pixels, width, [&](int64_t begin, int64_t end, auto W) {
      rms_norm_backward<A, decltype(W)::value>(begin, end, width, (A*)grad, (const A*)y, (const A*)scale);
    });
  });
}

int fast_cell_depthwise(int64_t is_double, const Depthwise* p, const void* input, const void* weight, void* output) {
  return with_dtype(is_double, [&](auto zero) {
    using A = decltype(zero);
    const auto taps = turned_taps((const A*)weight, *p, round_up(p->C, kLanes<A>), false);
    depthwise(*p, (const A*)input, 1, taps, (A*)output, p->H, p->W, p->Ho(), p->Wo());
  });
}

// Writes the gradients whose address is not null.
int fast_cell_depthwise_backward(int64_t is_double, const Depthwise* p, const void* grad, const void* input,
                                 const void* weight, void* grad_input, void* grad_weight) {
  return with_dtype(is_double, [&](auto zero) {
    using A = decltype(zero);
    if (grad_input) {  // the flipped convolution of the gradient, spread out by the stride
      const auto taps = turned_taps((const A*)weight, *p, round_up(p->C, kLanes<A>), true);
      Depthwise turned = *p;
      turned.stride = 1;
      depthwise(turned, (const A*)grad, p->stride, taps, (A*)grad_input, p->Ho(), p->Wo(), p->H, p->W);
    }
    if (grad_weight) depthwise_grad_weight(*p, (const A*)grad, (const A*)input, (A*)grad_weight);
  });
}
}
