// The loops of fast_cell_cpu.py: sums of small matrix products over the pixels of images, and depthwise convolution.
//
// An image is channels-last: a matrix (pixel, channel), and a 1x1 convolution a product with it. `combine` adds
// such products up without writing any of them to memory; `multiply` sums the outer products of two images over
// their pixels, of which batch statistics and weight gradients are made. Sums over pixels run over short tiles in the
// images' dtype and over tiles in double precision; their order never depends on the number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int64_t kCombined = 48;     // pixels of a tile of `combine`: a multiple of the rows of a block
constexpr int64_t kMultiplied = 128;  // pixels of a tile of `multiply`
constexpr int kRows = 6;              // pixels (or channels) whose sums are held in registers, two vectors each

template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;

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

// ------------------------------------------------------------------------------------------------------- operands

template <class A>
struct Part {
  const A *x, *mask;  // (pixel, width); an element counts where the mask, if there is one, is positive
  int64_t width;
};

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
struct Operand {  // images side by side
  std::vector<Part<A>> parts;
  int64_t width = 0;

  explicit Operand(Reader& reader) {
    for (int64_t n = reader.number(); n > 0; --n) {
      Part<A> part{reader.address<const A>(), reader.address<const A>(), reader.number()};
      parts.push_back(part);
      width += part.width;
    }
  }

  // Rows [p0, p0 + rows) with `pitch` elements between them; copied unless they lie like that in memory
  const A* tile(int64_t p0, int64_t rows, int64_t pitch, std::vector<A>& buffer) const {
    if (parts.size() == 1 && !parts[0].mask && pitch == width) return parts[0].x + p0 * width;
    A* copy = scratch(buffer, rows * pitch);
    if (pitch > width) std::fill_n(copy, rows * pitch, A(0));
    int64_t offset = 0;
    for (const auto& part : parts) {
      const A *x = part.x + p0 * part.width, *mask = part.mask + p0 * part.width;
      for (int64_t p = 0; p < rows; ++p)
        for (int64_t c = 0; c < part.width; ++c) {
          const int64_t at = p * part.width + c;
          copy[p * pitch + offset + c] = part.mask && !(mask[at] > 0) ? A(0) : x[at];
        }
      offset += part.width;
    }
    return copy;
  }
};

// -------------------------------------------------------------------------------------------------------- combine

// out[r][v] += sum_k x[r][k] * matrix[k][v]
template <class A, int R, int V>
inline void combine_block(const A* x, int64_t pitch, int64_t depth, const A* matrix, int64_t width, A* out) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[r][v] = load(out + r * width + v * L);
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> row[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) row[v] = load(matrix + k * width + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += row[v] * x[r * pitch + k];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + r * width + v * L, sum[r][v]);
}

template <class A, int V>
void combine_columns(const A* x, int64_t pitch, int64_t depth, const A* matrix, int64_t width, A* out, int64_t rows) {
  int64_t p = 0;
  for (; p + kRows <= rows; p += kRows)
    combine_block<A, kRows, V>(x + p * pitch, pitch, depth, matrix, width, out + p * width);
  for (; p < rows; ++p) combine_block<A, 1, V>(x + p * pitch, pitch, depth, matrix, width, out + p * width);
}

template <class A>
struct Source {
  Operand<A> operand;
  const A* matrix;        // (channel of the result, channel of the operand), or one factor for all
  bool is_factor;
  std::vector<A> turned;  // the matrix as (channel of the operand, channel of the result), padded to vectors
};

template <class A>
struct Combination {  // results = bias + sum over sources of matrix * operand, where positive if `relu`
  bool relu;
  const A* bias;
  std::vector<Source<A>> sources;
  std::vector<Part<A>> results;
  int64_t channels = 0, width;

  explicit Combination(Reader& reader) {
    relu = reader.number();
    bias = reader.address<const A>();
    for (int64_t n = reader.number(); n > 0; --n) {
      results.push_back({reader.address<const A>(), nullptr, reader.number()});
      channels += results.back().width;
    }
    width = round_up(channels, kLanes<A>);
    for (int64_t n = reader.number(); n > 0; --n) {
      const A* matrix = reader.address<const A>();
      const bool is_factor = reader.number();
      sources.push_back({Operand<A>(reader), matrix, is_factor, {}});
      auto& source = sources.back();
      if (is_factor) continue;
      source.turned.resize(source.operand.width * width);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < source.operand.width; ++k)
          source.turned[k * width + c] = matrix[c * source.operand.width + k];
    }
  }

  void run(int64_t p0, int64_t rows, std::vector<A>& sums, std::vector<A>& copy) const {
    constexpr int L = kLanes<A>;
    A* out = scratch(sums, rows * width);
    for (int64_t p = 0; p < rows; ++p)
      for (int64_t c = 0; c < width; ++c) out[p * width + c] = bias && c < channels ? bias[c] : A(0);
    for (const auto& source : sources) {
      const int64_t depth = source.operand.width;
      const A* x = source.operand.tile(p0, rows, depth, copy);
      if (source.is_factor) {
        for (int64_t p = 0; p < rows; ++p)
          for (int64_t c = 0; c < channels; ++c) out[p * width + c] += *source.matrix * x[p * depth + c];
        continue;
      }
      int64_t c = 0;
      for (; c + 2 * L <= width; c += 2 * L)
        combine_columns<A, 2>(x, depth, depth, source.turned.data() + c, width, out + c, rows);
      if (c < width) combine_columns<A, 1>(x, depth, depth, source.turned.data() + c, width, out + c, rows);
    }
    if (relu)
      for (int64_t e = 0; e < rows * width; ++e) out[e] = std::max(out[e], A(0));
    for (const auto& result : results) {
      A* to = const_cast<A*>(result.x) + p0 * result.width;
      for (int64_t p = 0; p < rows; ++p)
        for (int64_t c = 0; c < result.width; ++c) to[p * result.width + c] = out[p * width + c];
      out += result.width;
    }
  }
};

template <class A>
void combine(int64_t pixels, Reader reader) {
  std::vector<Combination<A>> combinations;
  for (int64_t n = reader.number(); n > 0; --n) combinations.emplace_back(reader);
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
#pragma GCC unroll 8
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
  int64_t r = 0;
  for (; r + 4 <= a_width; r += 4) multiply_block<A, 4, V>(a + r, a_pitch, b, b_pitch, rows, sums + r * b_pitch);
  for (; r < a_width; ++r) multiply_block<A, 1, V>(a + r, a_pitch, b, b_pitch, rows, sums + r * b_pitch);
}

template <class A>
struct Product {
  Operand<A> a, b;
  double *result, *sum;  // (channel of a, channel of b), and of a alone or null; (1,) if `dot`
  bool is_symmetric, is_dot;
  int64_t pitch;         // of b's rows in a tile and of the partial sums

  explicit Product(Reader& reader) : a(reader), b(reader) {
    result = reader.address<double>();
    sum = reader.address<double>();
    is_dot = reader.number();
    const auto &first = a.parts[0], &second = b.parts[0];
    is_symmetric = a.parts.size() == 1 && b.parts.size() == 1 && first.x == second.x && first.mask == second.mask;
    pitch = round_up(b.width, kLanes<A>);
  }

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
      for (int64_t c = 0; c < pitch; c += 2 * L) {
        // of a symmetric result, the part above the diagonal
        const int64_t height = is_symmetric ? std::min(a.width, c + 2 * L) : a.width;
        if (c + 2 * L <= pitch)
          multiply_columns<A, 2>(x, a.width, height, y + c, pitch, rows, partial + c);
        else
          multiply_columns<A, 1>(x, a.width, height, y + c, pitch, rows, partial + c);
      }
      if (!sum) continue;
      double* total = partial + a.width * pitch;
      for (int64_t c0 = 0; c0 < a.width; c0 += L) {
        const int64_t width = std::min<int64_t>(L, a.width - c0);
        A lanes[L] = {};
        for (int64_t p = 0; p < rows; ++p)
          for (int64_t c = 0; c < width; ++c) lanes[c] += x[p * a.width + c0 + c];
        for (int64_t c = 0; c < width; ++c) total[c0 + c] += lanes[c];
      }
    }
  }

  void finish(const double* partial, int64_t chunks) const {
    std::vector<double> total(partial, partial + size());
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t e = 0; e < size(); ++e) total[e] += partial[chunk * size() + e];
    if (is_dot) {
      *result = total[0];
      return;
    }
    for (int64_t r = 0; r < a.width; ++r)
      for (int64_t c = 0; c < b.width; ++c)
        result[r * b.width + c] = is_symmetric && r > c ? total[c * pitch + r] : total[r * pitch + c];
    if (sum) std::copy_n(total.data() + a.width * pitch, a.width, sum);
  }
};

template <class A>
void multiply(int64_t pixels, Reader reader) {
  std::vector<Product<A>> products;
  std::vector<int64_t> offset{0};
  const int64_t chunks = std::max<int64_t>(1, std::min<int64_t>(16, pixels / 2048));
  for (int64_t n = reader.number(); n > 0; --n) {
    products.emplace_back(reader);
    offset.push_back(offset.back() + products.back().size() * chunks);
  }
  const int64_t count = products.size();
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
  std::fill_n(dst, rows * cols * width, A(0));
  const auto first = [&](int64_t start) { return start <= 0 ? 0 : (start + step - 1) / step; };
  for (int64_t h = first(y0); h < H && h * step < y0 + rows; ++h)
    for (int64_t w = first(x0); w < W && w * step < x0 + cols; ++w)
      std::copy_n(image + (h * W + w) * C, C, dst + ((h * step - y0) * cols + w * step - x0) * width);
}

// out[x] = sum over taps of weight[tap] * image[x * stride + tap] for R pixels and V vectors of channels
template <class A, int R, int V>
inline void depthwise_block(const A* image, const A* weight, A* out, const Depthwise& p, int64_t cols, int64_t width) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[R][V] = {};
  for (int64_t i = 0; i < p.K; ++i)
    for (int64_t j = 0; j < p.K; ++j) {
      const A* pixel = image + (i * cols + j) * p.dilation * width;
      Vec<A> tap[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) tap[v] = load(weight + (i * p.K + j) * width + v * L);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[r][v] += tap[v] * load(pixel + r * p.stride * width + v * L);
    }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + r * width + v * L, sum[r][v]);
}

template <class A, int V>
void depthwise_row(const A* image, const A* weight, A* out, const Depthwise& p, int64_t cols, int64_t width,
                   int64_t count) {
  int64_t x = 0;
  for (; x + 4 <= count; x += 4)
    depthwise_block<A, 4, V>(image + x * p.stride * width, weight, out + x * width, p, cols, width);
  for (; x < count; ++x)
    depthwise_block<A, 1, V>(image + x * p.stride * width, weight, out + x * width, p, cols, width);
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
  constexpr int L = kLanes<A>;
  const int64_t width = round_up(p.C, L), cols = (Wo - 1) * p.stride + p.span();
  const int64_t block = p.block_rows(Ho, cols), blocks = (Ho + block - 1) / block;
  at::parallel_for(0, p.N * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> padded(((block - 1) * p.stride + p.span()) * cols * width), out(Wo * width);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / blocks, y0 = unit % blocks * block, y1 = std::min(Ho, y0 + block);
      load_padded(padded.data(), input + n * H * W * p.C, H, W, p.C, width, y0 * p.stride - p.pad(),
                  (y1 - y0 - 1) * p.stride + p.span(), -p.pad(), cols, step);
      for (int64_t y = y0; y < y1; ++y) {
        const A* row = padded.data() + (y - y0) * p.stride * cols * width;
        int64_t c = 0;
        for (; c + 2 * L <= width; c += 2 * L)
          depthwise_row<A, 2>(row + c, taps.data() + c, out.data() + c, p, cols, width, Wo);
        if (c < width) depthwise_row<A, 1>(row + c, taps.data() + c, out.data() + c, p, cols, width, Wo);
        A* to = output + (n * Ho + y) * Wo * p.C;
        for (int64_t x = 0; x < Wo; ++x) std::copy_n(out.data() + x * width, p.C, to + x * p.C);
      }
    }
  });
}

// sums[j] += sum over x of grad[x] * image[x * stride + j * dilation], J taps of a row at a time
template <class A, int J>
inline void weight_block(const A* image, const A* grad, const Depthwise& p, int64_t width, int64_t count,
                         double* sums) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[J] = {};
  for (int64_t x = 0; x < count; ++x) {
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
    std::vector<A> padded(((block - 1) * p.stride + p.span()) * cols * width), row(Wo * width);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t unit = p.N * blocks * chunk / chunks; unit < p.N * blocks * (chunk + 1) / chunks; ++unit) {
        const int64_t n = unit / blocks, y0 = unit % blocks * block, y1 = std::min(Ho, y0 + block);
        load_padded(padded.data(), input + n * p.H * p.W * p.C, p.H, p.W, p.C, width, y0 * p.stride - p.pad(),
                    (y1 - y0 - 1) * p.stride + p.span(), -p.pad(), cols, 1);
        for (int64_t y = y0; y < y1; ++y) {
          const A* g = grad + (n * Ho + y) * Wo * p.C;
          if (width != p.C) {
            for (int64_t x = 0; x < Wo; ++x) std::copy_n(g + x * p.C, p.C, row.data() + x * width);
            g = row.data();
          }
          for (int64_t i = 0; i < p.K; ++i)
            for (int64_t c = 0; c < width; c += L) {
              const A* line = padded.data() + ((y - y0) * p.stride + i * p.dilation) * cols * width + c;
              double* sums = partial.data() + (chunk * KK + i * p.K) * width + c;
              int64_t j = 0;
              for (; j + 5 <= p.K; j += 5)
                weight_block<A, 5>(line + j * p.dilation * width, g + c, p, width, Wo, sums + j * width);
              for (; j + 3 <= p.K; j += 3)
                weight_block<A, 3>(line + j * p.dilation * width, g + c, p, width, Wo, sums + j * width);
              for (; j < p.K; ++j)
                weight_block<A, 1>(line + j * p.dilation * width, g + c, p, width, Wo, sums + j * width);
            }
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

int fast_cell_combine(int64_t is_double, int64_t pixels, const int64_t* packed) {
  return with_dtype(is_double, [&](auto zero) { combine<decltype(zero)>(pixels, Reader(packed)); });
}

int fast_cell_multiply(int64_t is_double, int64_t pixels, const int64_t* packed) {
  return with_dtype(is_double, [&](auto zero) { multiply<decltype(zero)>(pixels, Reader(packed)); });
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
