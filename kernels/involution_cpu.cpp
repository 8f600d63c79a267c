// Involution on the CPU: forward, grad_input and grad_weight with given kernels, and the fused passes that make
// the kernels of a few pixels at a time from `hidden`, use them and forget them (see involution.py for the equation).
//
// The output is cut into tiles of at most 32 pixels, whose kernels of a group fit the first-level cache as one
// (K*K, 32) matrix. Forward and grad_input run over channels: a pixel's channels lie in registers and each kernel value
// is broadcast. grad_weight and the products with `span` run over pixels. Images are padded in scratch memory, so that
// no inner loop asks where the border is; the scratch copy also takes in any layout and dtype. Rows are copied when
// the first tile comes to read them and put out when the last one has left them, so that all passes over a row find it
// in the first-level cache. Every image, or block of rows when there are few images, is one piece of work for PyTorch's
// threads; what is summed and in which order never depends on the number of threads. bfloat16 is computed in float32.
//
// Channels-last float32 images with given channels-last kernels need none of this at stride and dilation 1, K = 3, 5
// or 7 and one to three vectors of channels a group: they are read and written where they are, both gradients in one
// sweep over the rows, grad_weight with channels in registers and eight taps' sums made together. The fused passes read
// and write such images where they are too, for up to 32 columns of the output, K = 3 and 5 at dilation 2 and all K at
// stride 2 as well, and for groups whose last vector has to repeat channels of the one before; only the gradient of the
// kernels needs copies there.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int kTile = 32;           // output pixels whose kernels are held at once
constexpr int kPitch = kTile + 16;  // room for the last vector of a tile's last row
constexpr int kRowUnit = 8;         // a tile's rows are padded to a multiple of this
constexpr int kMostTaps = 7;        // in a row, of kernels that need no copies
constexpr int kChunks = 32;         // partial sums of the span gradient: fixed, whatever the number of threads

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  BFloat16() = default;
  explicit BFloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    // round to nearest even; a NaN must not round up into an infinity
    bits = value != value ? 0x7fc0 : uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
};

template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<BFloat16> {
  using type = float;
};

// ---------------------------------------------------------------------------------------------- problem and views

struct Problem {
  int64_t N, C, H, W, G, K, stride, dilation, hidden;
  int64_t Ho() const { return (H + stride - 1) / stride; }
  int64_t Wo() const { return (W + stride - 1) / stride; }
  int64_t Cg() const { return C / G; }
  int64_t KK() const { return K * K; }
  int64_t pad() const { return dilation * (K / 2); }
  int64_t tile_width() const { return std::min<int64_t>(kTile, round_up(Wo(), kRowUnit)); }
  int64_t tile_rows() const { return kTile / tile_width(); }
  // columns of a padded row, so that also the unused pixels at the end of a tile's row read inside it
  int64_t padded_cols() const {
    return std::max((round_up(Wo(), tile_width()) - 1) * stride + (K - 1) * dilation + 1, pad() + W);
  }
  int64_t padded_rows(int64_t rows) const { return (rows - 1) * stride + (K - 1) * dilation + 1; }

  // Rows of one piece of work: whole tiles. Few images are cut, so that several threads have something to do; large
  // ones, so that the scratch image stays in the second-level cache.
  int64_t block_rows(int64_t least = 16) const {
    int64_t pieces = N > 0 ? (least + N - 1) / N : 1;
    int64_t rows = std::min((Ho() + pieces - 1) / pieces, 4096 / std::max<int64_t>(Wo(), 1));
    return std::max<int64_t>(1, std::min(round_up(std::max<int64_t>(rows, 8), tile_rows()), Ho()));
  }
  int64_t blocks(int64_t least = 16) const { return (Ho() + block_rows(least) - 1) / block_rows(least); }
};

struct Argument {  // a tensor as Python passes it: strides in elements, unused ones zero
  void* data;
  int64_t strides[5];
};

template <class T>
struct Image {  // (N, C, H, W) with strides in elements
  T* data;
  int64_t n, c, h, w;
  Image(const Argument& a)
      : data((T*)a.data), n(a.strides[0]), c(a.strides[1]), h(a.strides[2]), w(a.strides[3]) {}
  T* at(int64_t in, int64_t ic, int64_t ih, int64_t iw) const { return data + in * n + ic * c + ih * h + iw * w; }
};

struct Tile {  // pixel (r, x) of the tile is the output's (y + r, x0 + x) and lies at r * width + x
  int64_t y, rows, x0, nx, width;
};

template <class T>
struct Kernels {  // (N, G, K*K, Ho, Wo) with strides in elements
  T* data;
  int64_t n, g, k, h, w;
  Kernels(const Argument& a)
      : data((T*)a.data), n(a.strides[0]), g(a.strides[1]), k(a.strides[2]), h(a.strides[3]), w(a.strides[4]) {}
  T* at(int64_t in, int64_t ig, int64_t ih, int64_t iw) const { return data + in * n + ig * g + ih * h + iw * w; }
  // K*K short runs, far apart: the hardware does not foresee those of the next tile
  void prefetch(const Problem& p, int64_t in, int64_t ig, const Tile& t) const {
    for (int64_t ik = 0; ik < p.KK(); ++ik)
      for (int64_t x = 0; x < kTile; x += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(at(in, ig, t.y + t.rows, t.x0) + ik * k + x, 0, 2);
  }
};

template <class F>
void for_tiles(const Problem& p, int64_t y_begin, int64_t y_end, const F& f) {
  const int64_t width = p.tile_width(), rows = p.tile_rows();
  for (int64_t y = y_begin; y < y_end; y += rows)
    for (int64_t x0 = 0; x0 < p.Wo(); x0 += width)
      f(Tile{y, std::min(rows, y_end - y), x0, std::min(width, p.Wo() - x0), width});
}

class Scratch {  // one growing buffer a thread, handed out in aligned pieces
 public:
  explicit Scratch(size_t bytes) {
    bytes += 64;
    if (buffer().size() < bytes) buffer().resize(bytes);
    next_ = (char*)((uintptr_t(buffer().data()) + 63) / 64 * 64);
  }
  template <class A>
  A* take(int64_t count) {
    A* piece = (A*)next_;
    next_ += round_up(count * sizeof(A), 64);
    return piece;
  }

 private:
  static std::vector<char>& buffer() {
    thread_local std::vector<char> bytes;
    return bytes;
  }
  char* next_;
};

// ---------------------------------------------------------------------------------------------------- copies

#if defined(__has_builtin)  // not in GCC 11 and older, which get the plain loop
#if __has_builtin(__builtin_shufflevector)
#define INVOLUTION_SHUFFLES
#endif
#endif

#if defined(INVOLUTION_SHUFFLES)
typedef float Half __attribute__((vector_size(16)));

// dst[r * dp + c] = src[c * sp + r] for 4 x 4 values
inline void transpose_4x4(float* dst, int64_t dp, const float* src, int64_t sp) {
  Half line[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) std::memcpy(&line[i], src + i * sp, sizeof(Half));
  const Half a = __builtin_shufflevector(line[0], line[1], 0, 4, 1, 5);
  const Half b = __builtin_shufflevector(line[0], line[1], 2, 6, 3, 7);
  const Half c = __builtin_shufflevector(line[2], line[3], 0, 4, 1, 5);
  const Half d = __builtin_shufflevector(line[2], line[3], 2, 6, 3, 7);
  const Half rows[4] = {__builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
                        __builtin_shufflevector(b, d, 0, 1, 4, 5), __builtin_shufflevector(b, d, 2, 3, 6, 7)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) std::memcpy(dst + i * dp, &rows[i], sizeof(Half));
}

#if defined(__AVX__)
// dst[r * dp + c] = src[c * sp + r] for 8 x 8 values
inline void transpose_8x8(float* dst, int64_t dp, const float* src, int64_t sp) {
  typedef float Full __attribute__((vector_size(32)));
  const auto half = [&](int64_t row, int64_t col) {
    Half v;
    std::memcpy(&v, src + row * sp + col, sizeof(v));
    return v;
  };
#pragma GCC unroll 2
  for (int side = 0; side < 2; ++side) {  // four rows of dst from four columns of src
    Full line[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      line[i] = __builtin_shufflevector(half(i, 4 * side), half(i + 4, 4 * side), 0, 1, 2, 3, 4, 5, 6, 7);
    const Full a = __builtin_shufflevector(line[0], line[1], 0, 8, 1, 9, 4, 12, 5, 13);
    const Full b = __builtin_shufflevector(line[0], line[1], 2, 10, 3, 11, 6, 14, 7, 15);
    const Full c = __builtin_shufflevector(line[2], line[3], 0, 8, 1, 9, 4, 12, 5, 13);
    const Full d = __builtin_shufflevector(line[2], line[3], 2, 10, 3, 11, 6, 14, 7, 15);
    const Full rows[4] = {__builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13),
                          __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15),
                          __builtin_shufflevector(b, d, 0, 1, 8, 9, 4, 5, 12, 13),
                          __builtin_shufflevector(b, d, 2, 3, 10, 11, 6, 7, 14, 15)};
    for (int i = 0; i < 4; ++i) std::memcpy(dst + (4 * side + i) * dp, &rows[i], sizeof(Full));
  }
}
#endif
#endif

// A block of at most 8 x 8 values of dst[r * dp + c] = src[c * sp + r], converting
template <class D, class S>
inline void transpose_block(D* dst, int64_t dp, const S* src, int64_t sp, int64_t rows, int64_t cols) {
  int64_t done = 0;  // rows
#if defined(INVOLUTION_SHUFFLES)
  if constexpr (std::is_same_v<D, float> && std::is_same_v<S, float>) {
#if defined(__AVX__)
    if (rows == 8 && cols == 8) return transpose_8x8(dst, dp, src, sp);
#endif
    if (cols % 4 == 0)
      for (; done + 4 <= rows; done += 4)
        for (int64_t c = 0; c < cols; c += 4) transpose_4x4(dst + done * dp + c, dp, src + c * sp + done, sp);
  }
#endif
  for (int64_t r = done; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) dst[r * dp + c] = D(src[c * sp + r]);
}

enum class Side { kSource, kTarget };  // the one outside the scratch memory, which is visited in order

// dst[r * dr + c * dc] = src[r * sr + c * sc], converting
template <Side kOutside, class D, class S>
void copy_matrix(D* dst, int64_t dr, int64_t dc, const S* src, int64_t sr, int64_t sc, int64_t rows, int64_t cols) {
  if (dc != 1 && dr == 1) {
    std::swap(dr, dc), std::swap(sr, sc), std::swap(rows, cols);
  }
  if (dc == 1 && sc == 1) {
    if (dr == cols && sr == cols) cols *= rows, rows = 1;
    for (int64_t r = 0; r < rows; ++r)
      if constexpr (std::is_same_v<D, S>)
        copy_run(dst + r * dr, src + r * sr, cols);
      else
        for (int64_t c = 0; c < cols; ++c) dst[r * dr + c] = D(src[r * sr + c]);
  } else if (dc == 1 && sr == 1) {
    constexpr int64_t B = 8;
    const auto block = [&](int64_t r, int64_t c) {
      transpose_block(dst + r * dr + c, dr, src + c * sc + r, sc, std::min(B, rows - r), std::min(B, cols - c));
    };
    if (kOutside == Side::kTarget)
      for (int64_t r = 0; r < rows; r += B)
        for (int64_t c = 0; c < cols; c += B) block(r, c);
    else
      for (int64_t c = 0; c < cols; c += B)
        for (int64_t r = 0; r < rows; r += B) block(r, c);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) dst[r * dr + c * dc] = D(src[r * sr + c * sc]);
  }
}

template <class A, class T>
void take_in(A* dst, int64_t dr, const T* src, int64_t sr, int64_t sc, int64_t rows, int64_t cols) {
  copy_matrix<Side::kSource>(dst, dr, 1, src, sr, sc, rows, cols);
}

template <class T, class A>
void put_out(T* dst, int64_t dr, int64_t dc, const A* src, int64_t sr, int64_t rows, int64_t cols) {
  copy_matrix<Side::kTarget>(dst, dr, dc, src, sr, 1, rows, cols);
}

// Rows [r0, r1) of those that output rows from y0 on read, with their border, as (row, col, channel) with `width`
// channels. What lies beside the image, and the channels that are too many, are zero already.
template <class A, class T>
void load_pixels(A* dst, const Problem& p, const Image<T>& image, int64_t n, int64_t c0, int64_t channels,
                 int64_t width, int64_t y0, int64_t r0, int64_t r1) {
  const int64_t cols = p.padded_cols(), pad = p.pad(), copied = std::min(p.W, cols - pad);
  for (int64_t r = r0; r < r1; ++r) {
    A* row = dst + r * cols * width;
    const int64_t h = y0 * p.stride - pad + r;
    if (h < 0 || h >= p.H)
      std::fill_n(row, cols * width, A(0));
    else
      take_in(row + pad * width, width, image.at(n, c0, h, 0), image.w, image.c, copied, channels);
  }
}

// Ask for a group's channels of a row: hardware does not foresee those of every second pixel
template <class T>
__attribute__((always_inline)) inline void fetch_row(const Problem& p, const Image<T>& image, int64_t n, int64_t c0,
                                                     int64_t h) {
  for (int64_t w = 0; w < p.W; ++w) fetch_run(image.at(n, c0, h, w), p.Cg());
}

// The same rows as (row, channel, phase, col / stride): the pixels that one tap reads for consecutive outputs are
// neighbours also when the stride is not 1
struct Planes {
  int64_t lead, pitch, channel, row;  // `lead` columns before the first, which put the image's on a vector's boundary
  Planes(const Problem& p, int64_t overrun)
      : lead(p.stride == 1 ? round_up(p.pad(), 8) - p.pad() : 0),
        pitch(round_up(lead + (p.padded_cols() + p.stride - 1) / p.stride + overrun, 8)), channel(p.stride * pitch),
        row(p.Cg() * channel) {}
};

// Rows [r0, r1); what lies beside the image is zero already
template <class A, class T>
void load_planes(A* dst, const Planes& planes, const Problem& p, const Image<T>& image, int64_t n, int64_t c0,
                 int64_t y0, int64_t r0, int64_t r1) {
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t h = y0 * p.stride - p.pad() + r;
    if (h < 0 || h >= p.H) {
      std::fill_n(dst + r * planes.row, planes.row, A(0));
      continue;
    }
    if (p.stride > 1 && image.c == 1 && h + 2 < p.H) fetch_row(p, image, n, c0, h + 2);
    for (int64_t phase = 0; phase < p.stride; ++phase) {
      // column m * stride + phase of the padded row is column m * stride + phase - pad of the image
      A* plane = dst + r * planes.row + phase * planes.pitch + planes.lead;
      const int64_t begin = std::max<int64_t>(0, (p.pad() - phase + p.stride - 1) / p.stride);
      const int64_t w = begin * p.stride + phase - p.pad(), room = planes.pitch - planes.lead - begin;
      const int64_t count = std::min(room, (p.W - w + p.stride - 1) / p.stride);
      if (count > 0)
        take_in(plane + begin, planes.channel, image.at(n, c0, h, w), image.c, image.w * p.stride, p.Cg(), count);
    }
  }
}

// A tile of an image as (channel, pixel), zero at unused pixels
template <class A, class T>
void load_tile(A* dst, const Tile& t, const Image<T>& image, int64_t n, int64_t c0, int64_t channels) {
  if (t.nx < t.width || t.rows * t.width < kTile) std::fill_n(dst, channels * kPitch, A(0));
  for (int64_t r = 0; r < t.rows; ++r)
    take_in(dst + r * t.width, kPitch, image.at(n, c0, t.y + r, t.x0), image.c, image.w, channels, t.nx);
}

// ------------------------------------------------------------------------------------------------ inner loops

// C[m][q] = (add ? C[m][q] : 0) + sum_k A[m * am + k * ak] * B[k][q] over the pixels of a tile
template <class A, int M>
inline void multiply_rows(const A* a, int64_t am, int64_t ak, const A* b, A* c, int64_t depth, bool add) {
  constexpr int L = kLanes<A>;
  for (int q = 0; q < kTile; q += 2 * L) {
    Vec<A> sum[M][2];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      sum[m][0] = add ? load(c + m * kPitch + q) : Vec<A>{};
      sum[m][1] = add ? load(c + m * kPitch + q + L) : Vec<A>{};
    }
    for (int64_t k = 0; k < depth; ++k) {
      const Vec<A> b0 = load(b + k * kPitch + q), b1 = load(b + k * kPitch + q + L);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sum[m][0] += b0 * a[m * am + k * ak];
        sum[m][1] += b1 * a[m * am + k * ak];
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      store(c + m * kPitch + q, sum[m][0]);
      store(c + m * kPitch + q + L, sum[m][1]);
    }
  }
}

template <class A>
void multiply(const A* a, int64_t am, int64_t ak, const A* b, A* c, int64_t M, int64_t depth, bool add) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) multiply_rows<A, 4>(a + m * am, am, ak, b, c + m * kPitch, depth, add);
  for (; m < M; ++m) multiply_rows<A, 1>(a + m * am, am, ak, b, c + m * kPitch, depth, add);
}

// sums[k][ch][lane] += the tile's gw[k] * hidden[ch], one sum a lane
template <class A, int M, int D>
inline void accumulate_block(const A* gw, const A* hidden, A* sums, int64_t depth) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[M][D];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) sum[m][d] = load(sums + (m * depth + d) * L);
  for (int q = 0; q < kTile; q += L) {
    Vec<A> h[D];
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) h[d] = load(hidden + d * kPitch + q);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<A> g = load(gw + m * kPitch + q);
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) sum[m][d] += g * h[d];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) store(sums + (m * depth + d) * L, sum[m][d]);
}

template <class A>
void accumulate_outer(const A* gw, const A* hidden, A* sums, int64_t M, int64_t depth) {
  constexpr int L = kLanes<A>;
  int64_t d = 0;
  for (; d + 2 <= depth; d += 2) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4)
      accumulate_block<A, 4, 2>(gw + m * kPitch, hidden + d * kPitch, sums + (m * depth + d) * L, depth);
    for (; m < M; ++m)
      accumulate_block<A, 1, 2>(gw + m * kPitch, hidden + d * kPitch, sums + (m * depth + d) * L, depth);
  }
  for (; d < depth; ++d)
    for (int64_t m = 0; m < M; ++m)
      accumulate_block<A, 1, 1>(gw + m * kPitch, hidden + d * kPitch, sums + (m * depth + d) * L, depth);
}

// What a pixel loop needs to know of the scratch image, in elements
struct Steps {
  int64_t row, col, pixel, K;  // between taps i and i + 1, taps j and j + 1, and neighbouring output pixels
};

// Output pixels of one strip. With eight vectors of sums both multiply-add units stay busy.
template <int V, int X>
constexpr int kStrip = V == 1 ? (X == 1 ? 8 : 4) : 4;

// Visit the strips of a row: pixels x, x + X, ..., x + (P - 1) * X
template <int P, int X, class F>
inline void for_strips(int64_t width, const F& f) {
  for (int64_t x = 0; x < width; x += P * X)
    for (int64_t phase = 0; phase < X; ++phase) f(x + phase);
}

// What a strip's pixels read of a row: so many taps each, `step` columns from a pixel's to the next one's. Of its
// columns the first `before` and the last `after` may lie outside the image.
template <int kTaps, int kStep, int kBefore, int kAfter>
struct Window {
  static constexpr int taps = kTaps, step = kStep, before = kBefore, after = kAfter;
  static constexpr int columns(int pixels) { return (pixels - 1) * step + taps; }
};
template <int K>
using Around = Window<K, 1, K / 2, K / 2>;

// sum[s] += sum_{i,m} taps(i)[place(m, s)] * image[i][m]: P pixels' sums over tap rows [i_begin, i_end), V vectors of
// channels. Neighbouring sums share columns, so that each is loaded once for a strip. The columns before m_begin and
// from m_end on are left out. The last vector of a pixel begins with channel `last`.
template <class A, class W, int V, int P, class Taps, class Place>
inline void gather_strip(const A* image, int64_t row, int64_t col, int64_t last, const Taps& taps, const Place& place,
                         int64_t i_begin, int64_t i_end, int64_t m_begin, int64_t m_end, Vec<A> (&sum)[P][V]) {
  constexpr int L = kLanes<A>, M = W::columns(P);
  for (int64_t i = i_begin; i < i_end; ++i) {
    const A *pixel = image + i * row, *tap = taps(i);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m, pixel += col, opaque(pixel)) {
      if ((m < W::before && m < m_begin) || (m >= M - W::after && m >= m_end)) continue;
      Vec<A> column[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) column[v] = load(pixel + (v + 1 < V ? v * L : last));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) in_register(column[v]);
#pragma GCC unroll 8
      for (int s = 0; s < P; ++s) {
        if (m - s * W::step < 0 || m - s * W::step >= W::taps) continue;
        const A value = tap[place(m, s)];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[s][v] += column[v] * value;
      }
    }
  }
}

// One row of a tile: out[x] = sum_{i,j} w[i*K + j][x] * image[x*stride + (i, j)*dilation], V vectors of channels.
// X = dilation / stride: pixels X apart read columns one tap apart.
template <class A, int K, int V, int X>
void forward_row(const A* image, const A* w, A* out, int64_t out_pixel, int64_t width, const Steps& steps) {
  constexpr int L = kLanes<A>, P = kStrip<V, X>;
  for_strips<P, X>(width, [&](int64_t x) {
    Vec<A> sum[P][V] = {};
    gather_strip<A, Around<K>, V, P>(
        image + x * steps.pixel, steps.row, steps.col, (V - 1) * L, [&](int64_t i) { return w + i * K * kPitch + x; },
        [](int m, int s) { return (m - s) * kPitch + s * X; }, 0, K, 0, P + K - 1, sum);
#pragma GCC unroll 8
    for (int s = 0; s < P; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(out + (x + s * X) * out_pixel + v * L, sum[s][v]);
  });
}

// The same for any K, stride and dilation
template <class A, int V>
void forward_row_any(const A* image, const A* w, A* out, int64_t out_pixel, int64_t width, const Steps& steps) {
  constexpr int L = kLanes<A>, P = 4;
  for_strips<P, 1>(width, [&](int64_t x) {
    Vec<A> sum[P][V] = {};
    for (int64_t i = 0; i < steps.K; ++i)
      for (int64_t j = 0; j < steps.K; ++j) {
        const A* pixel = image + i * steps.row + j * steps.col + x * steps.pixel;
        const A* taps = w + (i * steps.K + j) * kPitch + x;
#pragma GCC unroll 8
        for (int s = 0; s < P; ++s)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[s][v] += load(pixel + s * steps.pixel + v * L) * taps[s];
      }
#pragma GCC unroll 8
    for (int s = 0; s < P; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(out + (x + s) * out_pixel + v * L, sum[s][v]);
  });
}

// Transpose of forward_row for the tap rows [i_begin, i_end): image[...] += w[i*K + j][x] * grad[x]
template <class A, int K, int V, int X>
void scatter_row(A* image, const A* w, const A* grad, int64_t grad_pixel, int64_t width, const Steps& steps,
                 int64_t i_begin, int64_t i_end) {
  constexpr int L = kLanes<A>, P = kStrip<V, X>;
  for_strips<P, X>(width, [&](int64_t x) {
    Vec<A> g[P][V];
#pragma GCC unroll 8
    for (int s = 0; s < P; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) g[s][v] = load(grad + (x + s * X) * grad_pixel + v * L);
    for (int64_t i = i_begin; i < i_end; ++i) {
      A* line = image + i * steps.row + x * steps.pixel;
      const A* taps = w + i * K * kPitch + x;
#pragma GCC unroll 16
      for (int m = 0; m < P + K - 1; ++m) {
        Vec<A> column[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) column[v] = load(line + m * steps.col + v * L);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) in_register(column[v]);
#pragma GCC unroll 8
        for (int s = 0; s < P; ++s) {
          if (m - s < 0 || m - s >= K) continue;
          const A tap = taps[(m - s) * kPitch + s * X];
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) column[v] += g[s][v] * tap;
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(line + m * steps.col + v * L, column[v]);
      }
    }
  });
}

template <class A, int V>
void scatter_row_any(A* image, const A* w, const A* grad, int64_t grad_pixel, int64_t width, const Steps& steps,
                     int64_t i_begin, int64_t i_end) {
  constexpr int L = kLanes<A>;
  for (int64_t x = 0; x < width; ++x) {
    Vec<A> g[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) g[v] = load(grad + x * grad_pixel + v * L);
    for (int64_t i = i_begin; i < i_end; ++i)
      for (int64_t j = 0; j < steps.K; ++j) {
        A* pixel = image + i * steps.row + j * steps.col + x * steps.pixel;
        const A tap = w[(i * steps.K + j) * kPitch + x];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(pixel + v * L, load(pixel + v * L) + g[v] * tap);
      }
  }
}

// n pixels of a row of a tile: gw[i*K + j][x] = sum_c grad[c][x] * planes[i][c][offset[j] + x], I tap rows at a time
template <class A, int K, int I, int n>
inline void weight_block(const A* planes, const Planes& layout, int64_t tap_row, const int64_t* offset, const A* grad,
                         A* gw, int64_t channels) {
  using V = Lanes<A, n>;
  for (int i = 0; i < K; i += I) {
    V sum[I][K] = {};
    const A* line = planes + i * tap_row;
    for (int64_t c = 0; c < channels; ++c, line += layout.channel) {
      const V g = read<V>(grad + c * kPitch);
#pragma GCC unroll 8
      for (int r = 0; r < I; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) sum[r][j] += g * read<V>(line + r * tap_row + offset[j]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < I; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) store(gw + ((i + r) * K + j) * kPitch, sum[r][j]);
  }
}

// The whole row; its rest in half a vector, where that is enough
template <class A, int K, int I>
void weight_row(const A* planes, const Planes& layout, int64_t tap_row, const int64_t* offset, const A* grad, A* gw,
                int64_t width, int64_t channels) {
  constexpr int L = kLanes<A>;
  int64_t x = 0;
  for (; x + L / 2 < width; x += L)
    weight_block<A, K, I, L>(planes + x, layout, tap_row, offset, grad + x, gw + x, channels);
  if (x < width)
    weight_block<A, K, I, L / 2>(planes + x, layout, tap_row, offset, grad + x, gw + x, channels);
}

template <class A>
void weight_row_any(const A* planes, const Planes& layout, int64_t tap_row, const int64_t* offset, int64_t K,
                    const A* grad, A* gw, int64_t width, int64_t channels) {
  constexpr int L = kLanes<A>;
  for (int64_t x = 0; x < width; x += L)
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < K; ++j) {
        Vec<A> sum = {};
        const A* line = planes + i * tap_row + offset[j] + x;
        for (int64_t c = 0; c < channels; ++c) sum += load(grad + c * kPitch + x) * load(line + c * layout.channel);
        store(gw + (i * K + j) * kPitch + x, sum);
      }
}

// ------------------------------------------------------------------------------------- inner loops without copies

// Channels-last float images are read and written where they are, row by row. A pixel's channels are one to three
// vectors. Given kernels, of stride 1, are read there too; those that are made, of stride 1 or 2, come as tiles hold
// them.
template <class A>
struct Row {  // of an image or of kernels: its pixel x lies at data + x * pixel, the row below at data + row
  A* data;
  int64_t row, pixel;
};

struct Extent {  // where a row lies in its image, and which channel a pixel's last vector begins with
  int64_t y, H, W, last;
};

// Of a row: `columns` pixels, as far apart as taps are, behind the first `before` that output pixel 0 would read
struct Columns {
  int64_t before, columns, pitch;
};

// out[x] = sum_{i,m} taps(x, i)[place(m, s)] * image[i][m] for `pixels` of a row, s the place of x in its strip; for
// taps and place see gather_strip. A pixel's last vector may repeat channels of the one before.
template <class A, class W, int V, int P, class Taps, class Place>
void gather_pixels(const A* image, int64_t row, const Columns& c, int64_t i_begin, int64_t i_end, const Taps& taps,
                   const Place& place, A* out, int64_t out_pixel, int64_t pixels, int64_t last) {
  constexpr int L = kLanes<A>, M = W::columns(P);
  for (int64_t next = 0; next < pixels; next += P) {
    const int64_t x = std::min(next, pixels - P);  // the last strip may repeat pixels of the one before
    Vec<A> sum[P][V] = {};
    const auto gather = [&](int64_t m_begin, int64_t m_end) {
      gather_strip<A, W, V, P>(image + x * W::step * c.pitch, row, c.pitch, last,
                               [&](int64_t i) { return taps(x, i); }, place, i_begin, i_end, m_begin, m_end, sum);
    };
    const int64_t m_begin = c.before - x * W::step, m_end = m_begin + c.columns;
    m_begin > 0 || m_end < M ? gather(m_begin, m_end) : gather(0, M);
#pragma GCC unroll 8
    for (int s = 0; s < P; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(out + (x + s) * out_pixel + (v + 1 < V ? v * L : last), sum[s][v]);
  }
}

// out[x] = sum_{i,j} (the tap of x at i, j) * image[(i, j) around x], with X pixels from a tap to the next one
template <class A, int K, int V, int X, class Taps, class Place>
void gather_in_place(const Row<A>& image, const Taps& taps, const Place& place, const Row<A>& out, const Extent& e) {
  constexpr int R = K / 2;
  const int64_t i_begin = std::max<int64_t>(0, R - e.y / X), i_end = std::min<int64_t>(K, R + (e.H - e.y + X - 1) / X);
  const int64_t row = X * image.row, col = X * image.pixel;
  for (int64_t phase = 0; phase < X; ++phase) {
    const int64_t pixels = (e.W - phase + X - 1) / X;
    gather_pixels<A, Around<K>, V, kStrip<V, X>>(
        image.data + phase * image.pixel - R * (row + col), row, {R, pixels, col}, i_begin, i_end,
        [&](int64_t x, int64_t i) { return taps(phase + X * x, i); }, place, out.data + phase * out.pixel,
        X * out.pixel, pixels, e.last);
  }
}

// With given kernels w; transposed, the taps with which the pixels around x read it
template <class A, int K, int V, bool kTransposed>
void gather_given(const Row<A>& image, const Row<A>& w, const Row<A>& out, const Extent& e) {
  constexpr int R = K / 2;
  if constexpr (kTransposed)
    gather_in_place<A, K, V, 1>(
        image, [&](int64_t x, int64_t i) { return w.data + (i - R) * w.row + (x - R) * w.pixel + (K - 1 - i) * K; },
        [pixel = w.pixel](int m, int s) { return m * pixel + K - 1 - (m - s); }, out, e);
  else
    gather_in_place<A, K, V, 1>(
        image, [&](int64_t x, int64_t i) { return w.data + x * w.pixel + i * K; },
        [pixel = w.pixel](int m, int s) { return s * pixel + m - s; }, out, e);
}

// With kernels (K*K, pixel) of rows as tiles hold them: of this row; transposed, of the K rows around it
template <class A, int K, int V, int X, bool kTransposed>
void gather_made(const Row<A>& image, const A* const* w, const Row<A>& out, const Extent& e) {
  if constexpr (kTransposed)
    gather_in_place<A, K, V, X>(
        image, [&](int64_t x, int64_t i) { return w[i] + (K - 1 - i) * K * kPitch + x; },
        [](int m, int s) { return (K - 1 - (m - s)) * kPitch + (m - K / 2) * X; }, out, e);
  else
    gather_in_place<A, K, V, X>(
        image, [&](int64_t x, int64_t i) { return w[0] + i * K * kPitch + x; },
        [](int m, int s) { return (m - s) * kPitch + s * X; }, out, e);
}

// The same with a stride of two; e tells of the input's row at the centre of what the output's row reads
template <class A, int K, int V>
void gather_strided(const Row<A>& image, const A* const* w, const Row<A>& out, const Extent& e) {
  constexpr int R = K / 2;
  const int64_t i_begin = std::max<int64_t>(0, R - e.y), i_end = std::min<int64_t>(K, R + e.H - e.y);
  gather_pixels<A, Window<K, 2, R, R>, V, kStrip<V, 1>>(
      image.data - R * (image.row + image.pixel), image.row, {R, e.W, image.pixel}, i_begin, i_end,
      [&](int64_t x, int64_t i) { return w[0] + i * K * kPitch + x; },
      [](int m, int s) { return (m - 2 * s) * kPitch + s; }, out.data, out.pixel, (e.W + 1) / 2, e.last);
}

// Which of the pixels around place x / 2 of a strided output read an input pixel x: those that are [first, last] away.
// They do so with every second tap.
struct Readers {
  int first, last;
  constexpr Readers(int K, int parity) : first(-((K / 2 - parity) / 2)), last((K / 2 + parity) / 2) {}
  constexpr int count() const { return last - first + 1; }
};

// Its transpose, for row e.y of the strided one's input: `image` is its output's row e.y / 2, w the kernels of the rows
// that read the former
template <class A, int K, int V>
void gather_strided_transposed(const Row<A>& image, const A* const* w, const Row<A>& out, const Extent& e) {
  constexpr int R = K / 2;
  const int64_t odd = e.y % 2, Ho = (e.H + 1) / 2, Wo = (e.W + 1) / 2;
  const Readers rows(K, odd);
  const int64_t top = e.y / 2 + rows.first, i_begin = std::max<int64_t>(0, -top);
  const int64_t i_end = std::min<int64_t>(rows.count(), Ho - top);
  const auto gather = [&](auto parity) {
    constexpr int f = parity;
    constexpr Readers columns(K, f);
    gather_pixels<A, Window<columns.count(), 1, -columns.first, columns.last>, V, kStrip<V, 1>>(
        image.data + rows.first * image.row + columns.first * image.pixel, image.row, {-columns.first, Wo, image.pixel},
        i_begin, i_end,
        [&](int64_t x, int64_t i) { return w[i] + (odd + R - 2 * (i + rows.first)) * K * kPitch + x + columns.first; },
        [](int m, int s) { return (f + K / 2 - 2 * (m - s + Readers(K, f).first)) * kPitch + m; },
        out.data + f * out.pixel, 2 * out.pixel, (e.W + 1 - f) / 2, e.last);
  };
  gather(std::integral_constant<int, 0>());
  gather(std::integral_constant<int, 1>());
}

#if defined(INVOLUTION_SHUFFLES) && defined(__AVX__)
#define INVOLUTION_IN_PLACE
typedef float Eight __attribute__((vector_size(32)));

inline Eight fold(Eight v) { return v; }
#if defined(__AVX512F__)
inline Eight fold(Vec<float> v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
#endif

// The sums over each of eight vectors, as one vector
inline Eight sums_of(const Eight (&v)[8]) {
  Eight two[4], four[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    two[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
             __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    four[i] = __builtin_shufflevector(two[2 * i], two[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
              __builtin_shufflevector(two[2 * i], two[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

inline float sum_of(Eight v) {
  const Half four = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// gw[x][i, j] = sum_c grad[x][c] * image[(i, j) around x][c]
template <class A, int K, int V>
void weight_in_place(const Row<A>& image, const Row<A>& grad, const Row<A>& gw, const Extent& e) {
  constexpr int L = kLanes<A>, R = K / 2, KK = K * K;
  static_assert(KK % 8 == 1, "an odd square is one more than a multiple of eight");
  static const A zeros[V * L] = {};
  const auto pixel = [&](int64_t x, auto inside) {
    Vec<A> g[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) g[v] = load(grad.data + x * grad.pixel + v * L);
    const A* corner = image.data - R * image.row + (x - R) * image.pixel;
    const auto product = [&](int k) {
      const int i = k / K, j = k % K;
      const A* from = corner + i * image.row + j * image.pixel;
      if constexpr (!inside)
        if (uint64_t(e.y + i - R) >= uint64_t(e.H) || uint64_t(x + j - R) >= uint64_t(e.W)) from = zeros;
      Vec<A> sum = g[0] * load(from);
#pragma GCC unroll 4
      for (int v = 1; v < V; ++v) sum += g[v] * load(from + v * L);
      return fold(sum);
    };
    A* out = gw.data + x * gw.pixel;
#pragma GCC unroll 8
    for (int k = 0; k + 8 < KK; k += 8) {
      Eight products[8];
#pragma GCC unroll 8
      for (int t = 0; t < 8; ++t) products[t] = product(k + t);
      const Eight sums = sums_of(products);
      std::memcpy(out + k, &sums, sizeof(sums));
    }
    out[KK - 1] = sum_of(product(KK - 1));
  };
  const bool rows_inside = e.y >= R && e.y + R < e.H;
  const int64_t begin = rows_inside ? R : e.W, end = rows_inside ? e.W - R : e.W;
  for (int64_t x = 0; x < begin; ++x) pixel(x, std::false_type());
  for (int64_t x = begin; x < end; ++x) pixel(x, std::true_type());
  for (int64_t x = end; x < e.W; ++x) pixel(x, std::false_type());
}
#endif

// ------------------------------------------------------------------------------------ choice of the inner loop

template <class A>
using Forward = void (*)(const A*, const A*, A*, int64_t, int64_t, const Steps&);
template <class A>
using Scatter = void (*)(A*, const A*, const A*, int64_t, int64_t, const Steps&, int64_t, int64_t);

template <class A>
struct PixelLoops {
  Forward<A> forward;
  Scatter<A> scatter;
};

template <class A, int V>
PixelLoops<A> choose_loops(const Problem& p) {
  if constexpr (std::is_same_v<A, float>) {  // float64 is there to be compared with
    const int64_t X = p.dilation % p.stride ? 0 : p.dilation / p.stride;
    if (p.K == 3 && X == 1) return {forward_row<A, 3, V, 1>, scatter_row<A, 3, V, 1>};
    if (p.K == 5 && X == 1) return {forward_row<A, 5, V, 1>, scatter_row<A, 5, V, 1>};
    if (p.K == 7 && X == 1) return {forward_row<A, 7, V, 1>, scatter_row<A, 7, V, 1>};
    if (p.K == 3 && X == 2) return {forward_row<A, 3, V, 2>, scatter_row<A, 3, V, 2>};
    if (p.K == 5 && X == 2) return {forward_row<A, 5, V, 2>, scatter_row<A, 5, V, 2>};
  }
  return {forward_row_any<A, V>, scatter_row_any<A, V>};
}

template <class A>
using InPlace = void (*)(const Row<A>&, const Row<A>&, const Row<A>&, const Extent&);

template <class A>
struct InPlaceLoops {  // null where copies are needed
  InPlace<A> forward = nullptr, grad_input = nullptr, grad_weight = nullptr;
};

template <class A>
InPlaceLoops<A> choose_in_place(const Problem& p) {
#if defined(INVOLUTION_IN_PLACE)
  if constexpr (std::is_same_v<A, float>) {
    constexpr int L = kLanes<A>;
    const auto with = [&](auto K, auto V) -> InPlaceLoops<A> {
      if (p.W < std::max(kStrip<V, 1>, K())) return {};
      return {gather_given<A, K, V, false>, gather_given<A, K, V, true>, weight_in_place<A, K, V>};
    };
    const auto with_taps = [&](auto V) -> InPlaceLoops<A> {
      if (p.K == 3) return with(std::integral_constant<int, 3>(), V);
      if (p.K == 5) return with(std::integral_constant<int, 5>(), V);
      if (p.K == 7) return with(std::integral_constant<int, 7>(), V);
      return {};
    };
    if (p.stride == 1 && p.dilation == 1) {
      if (p.Cg() == L) return with_taps(std::integral_constant<int, 1>());
      if (p.Cg() == 2 * L) return with_taps(std::integral_constant<int, 2>());
      if (p.Cg() == 3 * L) return with_taps(std::integral_constant<int, 3>());
    }
  }
#endif
  return {};
}

template <class A>
using Gather = void (*)(const Row<A>&, const A* const*, const Row<A>&, const Extent&);

template <class A>
struct FusedLoops {  // null where copies are needed
  Gather<A> forward = nullptr, grad_input = nullptr;
};

template <class A>
FusedLoops<A> choose_fused(const Problem& p) {
  if constexpr (std::is_same_v<A, float>) {
    constexpr int L = kLanes<A>;
    const auto with = [&](auto K, auto V, auto X) -> FusedLoops<A> {
      if (p.W / (p.stride * X) < kStrip<V, X>) return {};
      if constexpr (X == 1)
        if (p.stride == 2) return {gather_strided<A, K, V>, gather_strided_transposed<A, K, V>};
      return {gather_made<A, K, V, X, false>, gather_made<A, K, V, X, true>};
    };
    const auto with_taps = [&](auto V) -> FusedLoops<A> {
      constexpr std::integral_constant<int, 1> one;
      constexpr std::integral_constant<int, 2> two;
      constexpr std::integral_constant<int, 3> three;
      constexpr std::integral_constant<int, 5> five;
      constexpr std::integral_constant<int, 7> seven;
      if (p.K == 3 && p.dilation == 1) return with(three, V, one);
      if (p.K == 5 && p.dilation == 1) return with(five, V, one);
      if (p.K == 7 && p.dilation == 1) return with(seven, V, one);
      if (p.K == 3 && p.dilation == 2) return with(three, V, two);
      if (p.K == 5 && p.dilation == 2) return with(five, V, two);
      return {};
    };
    if (p.stride * p.dilation > 2 || p.Wo() > kTile || p.Cg() < L) return {};
    if (p.Cg() == L) return with_taps(std::integral_constant<int, 1>());
    if (p.Cg() <= 2 * L) return with_taps(std::integral_constant<int, 2>());
    if (p.Cg() <= 3 * L) return with_taps(std::integral_constant<int, 3>());
  }
  return {};
}

// A group's channels in blocks of one to three vectors
template <class A>
struct Block {
  int64_t channel, channels, width;
  PixelLoops<A> loops;
};

template <class A>
std::vector<Block<A>> channel_blocks(const Problem& p) {
  std::vector<Block<A>> blocks;
  int64_t vectors = (p.Cg() + kLanes<A> - 1) / kLanes<A>;
  for (int64_t c = 0; vectors > 0;) {
    const int64_t V = vectors <= 3 ? vectors : 2, width = V * kLanes<A>;
    const PixelLoops<A> loops = V == 1   ? choose_loops<A, 1>(p)
                                : V == 2 ? choose_loops<A, 2>(p)
                                         : choose_loops<A, 3>(p);
    blocks.push_back({c, std::min(width, p.Cg() - c), width, loops});
    c += width;
    vectors -= V;
  }
  return blocks;
}

template <class A>
void weight_tile(const A* planes, const Planes& layout, const Problem& p, const Tile& t, int64_t y0, const A* grad,
                 A* gw, const int64_t* offset) {
  const int64_t tap_row = p.dilation * layout.row;
  for (int64_t r = 0; r < t.rows; ++r) {
    const A* line = planes + (t.y + r - y0) * p.stride * layout.row + layout.lead + t.x0;
    const A* g = grad + r * t.width;
    A* out = gw + r * t.width;
    if (p.K == 3)
      weight_row<A, 3, 3>(line, layout, tap_row, offset, g, out, t.nx, p.Cg());
    else if (p.K == 5)
      weight_row<A, 5, 1>(line, layout, tap_row, offset, g, out, t.nx, p.Cg());
    else if (p.K == 7)
      weight_row<A, 7, 1>(line, layout, tap_row, offset, g, out, t.nx, p.Cg());
    else
      weight_row_any<A>(line, layout, tap_row, offset, p.K, g, out, t.nx, p.Cg());
  }
}

// ------------------------------------------------------------------- where kernels come from, where they go to

template <class A, class T>
struct GivenKernels {
  const Problem& p;
  Kernels<T> weight;
  int64_t scratch() const { return 0; }
  void prepare(A*, const Tile&, int64_t) const {}
  void make(A* w, const A*, const Tile& t, int64_t n, int64_t g) const {
    if (t.nx < t.width || t.rows * t.width < kTile) std::fill_n(w, p.KK() * kPitch, A(0));
    for (int64_t r = 0; r < t.rows; ++r)
      take_in(w + r * t.width, kPitch, weight.at(n, g, t.y + r, t.x0), weight.k, weight.w, p.KK(), t.nx);
    if (weight.w == 1) weight.prefetch(p, n, g, t);
  }
};

// kernels = span * (hidden, 1): the bias is the last column of span, (G*K*K, hidden + 1)
template <class A, class T>
struct SpannedKernels {
  const Problem& p;
  Image<T> hidden;
  const A* span;
  int64_t depth() const { return p.hidden + 1; }
  int64_t scratch() const { return depth() * kPitch; }
  void prepare(A* features, const Tile& t, int64_t n) const {
    load_tile(features, t, hidden, n, 0, p.hidden);
    A* ones = features + p.hidden * kPitch;
    std::fill_n(ones, kPitch, A(0));
    for (int64_t r = 0; r < t.rows; ++r) std::fill_n(ones + r * t.width, t.nx, A(1));
  }
  void make(A* w, const A* features, const Tile&, int64_t, int64_t g) const {
    multiply(span + g * p.KK() * depth(), depth(), 1, features, w, p.KK(), depth(), false);
  }
  void make_all(A* w, const A* features) const {  // the groups' one after the other
    multiply(span, depth(), 1, features, w, p.G * p.KK(), depth(), false);
  }
};

template <class T>
std::vector<typename AccumulatorOf<T>::type> join_span(const Problem& p, const T* weight, const T* bias) {
  using A = typename AccumulatorOf<T>::type;
  std::vector<A> span(p.G * p.KK() * (p.hidden + 1));
  take_in(span.data(), p.hidden + 1, weight, p.hidden, 1, p.G * p.KK(), p.hidden);
  take_in(span.data() + p.hidden, p.hidden + 1, bias, 1, 1, p.G * p.KK(), 1);
  return span;
}

// ---------------------------------------------------------------------------------------------------- passes

// Row y of group g of image n, for the loops that make no copies
template <class T>
Row<T> row_of(const Image<T>& image, const Problem& p, int64_t n, int64_t g, int64_t y) {
  return {image.at(n, g * p.Cg(), y, 0), image.h, image.w};
}

template <class T>
Row<T> row_of(const Kernels<T>& kernels, const Problem&, int64_t n, int64_t g, int64_t y) {
  return {kernels.at(n, g, y, 0), kernels.h, kernels.w};
}

// f(n, g, y) for every row, in the order of channels-last memory
template <class F>
void for_rows(const Problem& p, const F& f) {
  at::parallel_for(0, p.N * p.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t y0 = unit % p.blocks() * p.block_rows();
      for (int64_t y = y0; y < std::min(p.Ho(), y0 + p.block_rows()); ++y)
        for (int64_t g = 0; g < p.G; ++g) f(unit / p.blocks(), g, y);
    }
  });
}

// The place of a tile's row in an image whose pixels hold whole vectors, all of them of the image, or null
template <class A, class T>
A* in_place(T* row, const Image<T>& image, const Block<A>& b, const Tile& t) {
  if constexpr (std::is_same_v<A, T>)
    return image.c == 1 && b.channels == b.width && t.nx == t.width ? row : nullptr;
  return nullptr;
}

// For how many pieces of work forward cuts few images. No sum goes beyond a pixel: where one thread does all, as within
// a parallel loop, rows need not be shared out.
inline int64_t forward_pieces() { return at::in_parallel_region() || at::get_num_threads() == 1 ? 1 : 16; }

template <class A>
void forward_in_place(const Problem& p, const Image<A>& input, const SpannedKernels<A, A>& source,
                      const Image<A>& output, Gather<A> gather) {
  const int64_t pieces = forward_pieces(), rows = p.block_rows(pieces), units = p.blocks(pieces);
  at::parallel_for(0, p.N * units, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(sizeof(A) * (p.G * p.KK() * kPitch + source.scratch()) + 128);
    A* w = scratch.take<A>(p.G * p.KK() * kPitch);
    A* features = scratch.take<A>(source.scratch());
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / units, y0 = unit % units * rows;
      for_tiles(p, y0, std::min(p.Ho(), y0 + rows), [&](const Tile& t) {
        source.prepare(features, t, n);
        source.make_all(w, features);
        for (int64_t r = 0; r < t.rows; ++r)
          for (int64_t g = 0; g < p.G; ++g) {
            const A* taps = w + g * p.KK() * kPitch + r * t.width;
            const int64_t y = t.y + r, h = y * p.stride;
            gather(row_of(input, p, n, g, h), &taps, row_of(output, p, n, g, y), {h, p.H, p.W, p.Cg() - kLanes<A>});
          }
      });
    }
  });
}

template <class T, class Source, class A = typename AccumulatorOf<T>::type>
void forward(const Problem& p, const Image<T>& input, const Source& source, const Image<T>& output) {
  if constexpr (std::is_same_v<Source, GivenKernels<A, T>> && std::is_same_v<T, A>) {
    const auto loop = choose_in_place<A>(p).forward;
    if (loop && input.c == 1 && source.weight.k == 1 && output.c == 1)
      return for_rows(p, [&](int64_t n, int64_t g, int64_t y) {
        loop(row_of(input, p, n, g, y), row_of(source.weight, p, n, g, y), row_of(output, p, n, g, y),
             {y, p.H, p.W, p.Cg() - kLanes<A>});
      });
  }
  if constexpr (std::is_same_v<Source, SpannedKernels<A, T>> && std::is_same_v<T, A>) {
    const auto gather = choose_fused<A>(p).forward;
    if (gather && input.c == 1 && output.c == 1) return forward_in_place(p, input, source, output, gather);
  }
  const auto blocks = channel_blocks<A>(p);
  const int64_t width = blocks.back().channel + blocks.back().width;
  const int64_t pieces = forward_pieces(), rows = p.block_rows(pieces), units = p.blocks(pieces);
  const int64_t cols = p.padded_cols(), image = p.padded_rows(rows) * cols;
  at::parallel_for(0, p.N * units, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(sizeof(A) * (image * width + p.KK() * kPitch + kPitch * width + source.scratch()) + 256);
    A* padded = scratch.take<A>(image * width);
    std::fill_n(padded, image * width, A(0));
    A* w = scratch.take<A>(p.KK() * kPitch);
    A* out = scratch.take<A>(kPitch * width);
    A* features = scratch.take<A>(source.scratch());
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / units, y0 = unit % units * rows, y1 = std::min(p.Ho(), y0 + rows);
      for (int64_t g = 0; g < p.G; ++g) {
        int64_t loaded = 0;  // rows, as tiles come to need them
        for_tiles(p, y0, y1, [&](const Tile& t) {
          const int64_t needed = p.padded_rows(t.y + t.rows - y0);
          for (const auto& b : blocks)
            load_pixels(padded + b.channel * image, p, input, n, g * p.Cg() + b.channel, b.channels, b.width, y0,
                        loaded, needed);
          loaded = needed;
          source.prepare(features, t, n);
          source.make(w, features, t, n, g);
          for (const auto& b : blocks) {
            const Steps steps{p.dilation * cols * b.width, p.dilation * b.width, p.stride * b.width, p.K};
            for (int64_t r = 0; r < t.rows; ++r) {
              const A* line = padded + b.channel * image +
                              ((t.y + r - y0) * p.stride * cols + t.x0 * p.stride) * b.width;
              T* to = output.at(n, g * p.Cg() + b.channel, t.y + r, t.x0);
              if (A* there = in_place<A>(to, output, b, t)) {
                b.loops.forward(line, w + r * t.width, there, output.w, t.width, steps);
                continue;
              }
              b.loops.forward(line, w + r * t.width, out, b.width, t.width, steps);
              put_out(to, output.w, output.c, out, b.width, t.nx, b.channels);
            }
          }
        });
      }
    }
  });
}

template <class T, class Source, class A = typename AccumulatorOf<T>::type>
class InputGradient {  // of one block of rows and one group at a time
 public:
  InputGradient(const Problem& p, const Image<T>& grad_output, const Source& source, const Image<T>& grad_input)
      : p(p), grad_output(grad_output), grad_input(grad_input), source(source), blocks(channel_blocks<A>(p)),
        cols(p.padded_cols()), image(p.block_rows() * p.stride * cols),
        width(blocks.back().channel + blocks.back().width) {}

  int64_t scratch() const { return image * width + p.KK() * kPitch + kPitch * width + source.scratch() + 64; }

  void begin(Scratch& scratch) {
    padded = scratch.take<A>(image * width);
    w = scratch.take<A>(p.KK() * kPitch);
    grad = scratch.take<A>(kPitch * width);
    features = scratch.take<A>(source.scratch());
  }

  // The gradient of input rows [y0*stride, y1*stride) from all output rows that read them, in the order of those, so
  // that a row is begun, and put out, when the first of them is reached, and the last one left.
  void start(int64_t image, int64_t group, int64_t y0, int64_t y1) {
    n = image, g = group, h0 = y0 * p.stride, h1 = std::min(p.H, y1 * p.stride);
    next = std::max<int64_t>(0, (h0 - p.pad() + p.stride - 1) / p.stride);
    last = std::min(p.Ho() - 1, (h1 - 1 + p.pad()) / p.stride);
    begun = done = h0;
  }

  // What the kernels of a tile are made of
  const A* features_of(const Tile& t) {
    source.prepare(features, t, n);
    return features;
  }

  // As far as output row `until`
  void advance(int64_t until) {
    until = std::min(until, last + 1);
    for_tiles(p, next, until, [&](const Tile& t) {
      if (t.x0 == 0) {
        put_rows(t.y * p.stride - p.pad());
        begin_rows(t.y * p.stride - p.pad() + p.padded_rows(t.rows));
      }
      add_tile(t);
    });
    next = std::max(next, until);
    if (next == last + 1) put_rows(h1);
  }

 private:
  void begin_rows(int64_t end) {
    for (; begun < std::min(h1, end); ++begun)
      for (const auto& b : blocks)
        std::fill_n(padded + b.channel * image + (begun - h0) * cols * b.width, cols * b.width, A(0));
  }

  void put_rows(int64_t end) {
    begin_rows(end);  // those that no output reads
    for (; done < std::min(h1, end); ++done)
      for (const auto& b : blocks)
        put_out(grad_input.at(n, g * p.Cg() + b.channel, done, 0), grad_input.w, grad_input.c,
                padded + b.channel * image + ((done - h0) * cols + p.pad()) * b.width, b.width, p.W, b.channels);
  }

  void add_tile(const Tile& t) {
    source.make(w, features_of(t), t, n, g);
    for (const auto& b : blocks) {
      const Steps steps{p.dilation * cols * b.width, p.dilation * b.width, p.stride * b.width, p.K};
      for (int64_t r = 0; r < t.rows; ++r) {
        const int64_t top = (t.y + r) * p.stride - p.pad();  // the input row of tap row 0
        const int64_t i_begin = std::max<int64_t>(0, (h0 - top + p.dilation - 1) / p.dilation);
        const int64_t i_end = std::min(p.K, (h1 - 1 - top) / p.dilation + 1);
        if (h1 - 1 < top || i_begin >= i_end) continue;
        A* line = padded + b.channel * image + ((top - h0) * cols + t.x0 * p.stride) * b.width;
        T* from = grad_output.at(n, g * p.Cg() + b.channel, t.y + r, t.x0);
        if (const A* there = in_place<A>(from, grad_output, b, t)) {
          b.loops.scatter(line, w + r * t.width, there, grad_output.w, t.width, steps, i_begin, i_end);
          continue;
        }
        if (t.nx < t.width || b.channels < b.width) std::fill_n(grad, t.width * b.width, A(0));
        take_in(grad, b.width, from, grad_output.w, grad_output.c, t.nx, b.channels);
        b.loops.scatter(line, w + r * t.width, grad, b.width, t.width, steps, i_begin, i_end);
      }
    }
  }

  const Problem& p;
  const Image<T>&grad_output, &grad_input;
  const Source& source;
  const std::vector<Block<A>> blocks;
  const int64_t cols, image, width;
  A *padded = nullptr, *w = nullptr, *grad = nullptr, *features = nullptr;
  // of the block: output rows to come, input rows begun and put out
  int64_t n = 0, g = 0, h0 = 0, h1 = 0, next = 0, last = 0, begun = 0, done = 0;
};

// The same without copies: a row of grad_input gathers what the rows of grad_output that read it add to it. The kernels
// of these are held in a ring of tiles, and what they are made of for all groups.
template <class A>
class GatheredInputGradient {
 public:
  GatheredInputGradient(const Problem& p, const Image<A>& grad_output, const SpannedKernels<A, A>& source,
                        const Image<A>& grad_input, Gather<A> gather)
      : p(p), grad_output(grad_output), grad_input(grad_input), source(source), gather(gather),
        reach(p.pad() / p.stride), slots(2 * reach / p.tile_rows() + 2),
        tiles((p.block_rows() + 2 * reach) / p.tile_rows() + 2) {}

  int64_t scratch() const { return slots * p.KK() * kPitch + tiles * source.scratch() + 32; }

  void begin(Scratch& scratch) {
    w = scratch.take<A>(slots * p.KK() * kPitch);
    prepared = scratch.take<A>(tiles * source.scratch());
  }

  void start(int64_t image, int64_t group, int64_t y0, int64_t y1) {
    n = image, g = group, next = y0 * p.stride, end = std::min(p.H, y1 * p.stride);
    first = made = y0 - round_up(std::min(reach, y0), p.tile_rows());
    if (g > 0) return;
    const int64_t last = last_reader(end - 1);
    for (int64_t y = first; y <= last; y += p.tile_rows()) source.prepare(features(y), tile(y), n);
  }

  // What the kernels of a tile are made of
  const A* features_of(const Tile& t) const { return features(t.y); }

  // As far as row `until` of grad_output
  void advance(int64_t until) {
    for (; next < std::min(until * p.stride, end); ++next) {
      for (; made <= last_reader(next); made += p.tile_rows())
        source.make(slot(made), features(made), tile(made), n, g);
      const A* rows[kMostTaps] = {};
      const Readers two(p.K, next % 2);
      for (int64_t i = 0; i < (p.stride == 1 ? p.K : two.count()); ++i) {
        const int64_t y = p.stride == 1 ? next + (i - p.K / 2) * p.dilation : next / 2 + two.first + i;
        if (y >= 0 && y < p.Ho()) rows[i] = slot(y) + (y - first) % p.tile_rows() * p.tile_width();
      }
      if (p.stride > 1 && next + 1 < end) fetch_row(p, grad_input, n, g * p.Cg(), next + 1);
      gather(row_of(grad_output, p, n, g, next / p.stride), rows, row_of(grad_input, p, n, g, next),
             {next, p.H, p.W, p.Cg() - kLanes<A>});
    }
  }

 private:
  // The last output row that reads an input row
  int64_t last_reader(int64_t h) const { return std::min(p.Ho() - 1, (h + p.pad()) / p.stride); }
  A* features(int64_t y) const { return prepared + (y - first) / p.tile_rows() * source.scratch(); }
  Tile tile(int64_t y) const { return {y, std::min(p.tile_rows(), p.Ho() - y), 0, p.Wo(), p.tile_width()}; }
  A* slot(int64_t y) const { return w + (y - first) / p.tile_rows() % slots * p.KK() * kPitch; }

  const Problem& p;
  const Image<A>&grad_output, &grad_input;
  const SpannedKernels<A, A>& source;
  const Gather<A> gather;
  const int64_t reach;  // output rows before and behind a row's own that read it
  const int64_t slots, tiles;
  A *w = nullptr, *prepared = nullptr;
  // of the block: the first tile's row and the next one to be made, of grad_output; rows to come, of grad_input
  int64_t n = 0, g = 0, first = 0, made = 0, next = 0, end = 0;
};

template <class T, class A = typename AccumulatorOf<T>::type>
class WeightGradient {  // of one block of rows and one group at a time; hands each tile's (K*K, pixel) to a sink
 public:
  WeightGradient(const Problem& p, const Image<T>& grad_output, const Image<T>& input)
      : p(p), grad_output(grad_output), input(input), layout(p, std::max(0, kLanes<A> - kRowUnit)),
        offset(p.K), image(p.padded_rows(p.block_rows()) * layout.row + kTile) {
    for (int64_t j = 0; j < p.K; ++j)
      offset[j] = j * p.dilation % p.stride * layout.pitch + j * p.dilation / p.stride;
  }

  int64_t scratch() const { return image + p.KK() * kPitch + p.Cg() * kPitch + 64; }

  void begin(Scratch& scratch) {
    planes = scratch.take<A>(image);
    std::fill_n(planes, image, A(0));
    gw = scratch.take<A>(p.KK() * kPitch);
    grad = scratch.take<A>(p.Cg() * kPitch);
  }

  template <class Sink>
  void run(int64_t n, int64_t g, int64_t y0, int64_t y1, const Sink& sink) {
    int64_t loaded = 0;  // rows, as tiles come to need them
    for_tiles(p, y0, y1, [&](const Tile& t) {
      const int64_t needed = p.padded_rows(t.y + t.rows - y0);
      load_planes(planes, layout, p, input, n, g * p.Cg(), y0, loaded, needed);
      loaded = needed;
      load_tile(grad, t, grad_output, n, g * p.Cg(), p.Cg());
      if (t.nx < t.width || t.rows * t.width < kTile) std::fill_n(gw, p.KK() * kPitch, A(0));
      weight_tile(planes, layout, p, t, y0, grad, gw, offset.data());
      sink(t, gw);
    });
  }

 private:
  const Problem& p;
  const Image<T>&grad_output, &input;
  const Planes layout;
  std::vector<int64_t> offset;
  const int64_t image;
  A *planes, *gw, *grad;
};

// Either gradient may be left out. Together they read each image of grad_output once.
template <class T, class A = typename AccumulatorOf<T>::type>
void backward(const Problem& p, const Image<T>& grad_output, const Image<T>& input, const Kernels<T>& weight,
              const Image<T>& grad_input, const Kernels<T>& grad_weight) {
  if constexpr (std::is_same_v<T, A>) {
    const auto loops = choose_in_place<A>(p);
    const bool input_ready = !grad_input.data || (weight.k == 1 && grad_input.c == 1);
    const bool weight_ready = !grad_weight.data || (input.c == 1 && grad_weight.k == 1);
    if (loops.forward && grad_output.c == 1 && input_ready && weight_ready)
      return for_rows(p, [&](int64_t n, int64_t g, int64_t y) {
        const Row<A> grad = row_of(grad_output, p, n, g, y);
        const Extent extent{y, p.H, p.W, p.Cg() - kLanes<A>};
        if (grad_input.data)
          loops.grad_input(grad, row_of(weight, p, n, g, y), row_of(grad_input, p, n, g, y), extent);
        if (grad_weight.data)
          loops.grad_weight(row_of(input, p, n, g, y), grad, row_of(grad_weight, p, n, g, y), extent);
      });
  }
  const GivenKernels<A, T> source{p, weight};
  at::parallel_for(0, p.N * p.blocks(), 1, [&](int64_t begin, int64_t end) {
    InputGradient<T, GivenKernels<A, T>> to_input(p, grad_output, source, grad_input);
    WeightGradient<T> to_weight(p, grad_output, input);
    Scratch scratch(sizeof(A) * (to_input.scratch() + to_weight.scratch()));
    to_input.begin(scratch);
    to_weight.begin(scratch);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / p.blocks(), y0 = unit % p.blocks() * p.block_rows();
      const int64_t y1 = std::min(p.Ho(), y0 + p.block_rows());
      for (int64_t g = 0; g < p.G; ++g) {
        if (grad_input.data) to_input.start(n, g, y0, y1);
        if (grad_weight.data)
          to_weight.run(n, g, y0, y1, [&](const Tile& t, const A* gw) {
            if (grad_input.data && t.x0 == 0) to_input.advance(t.y + t.rows);
            if (grad_weight.w == 1) grad_weight.prefetch(p, n, g, t);
            for (int64_t r = 0; r < t.rows; ++r)
              put_out(grad_weight.at(n, g, t.y + r, t.x0), grad_weight.k, grad_weight.w, gw + r * t.width, kPitch,
                      p.KK(), t.nx);
          });
        if (grad_input.data) to_input.advance(p.Ho());
      }
    }
  });
}

// The gradients of the span are left out where their addresses are null. of_input: an InputGradient, or a gathered one,
// of which each thread takes a copy.
template <class T, class Gradient, class A = typename AccumulatorOf<T>::type>
void fused_backward(const Problem& p, const Image<T>& grad_output, const Image<T>& input,
                    const SpannedKernels<A, T>& source, const Gradient& of_input, const Image<T>& grad_hidden,
                    T* grad_span_weight, T* grad_span_bias) {
  constexpr int L = kLanes<A>;
  const int64_t units = p.N * p.blocks(), chunks = std::min<int64_t>(units, kChunks);
  const int64_t depth = source.depth(), size = p.G * p.KK() * depth;
  const int64_t tiles = (p.block_rows() + p.tile_rows() - 1) / p.tile_rows() * (round_up(p.Wo(), kTile) / kTile);
  std::vector<A> partial(chunks * size);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Gradient to_input = of_input;
    WeightGradient<T> to_weight(p, grad_output, input);
    Scratch scratch(sizeof(A) * (to_input.scratch() + to_weight.scratch() + size * L + tiles * p.hidden * kPitch +
                                 32) + 256);
    to_weight.begin(scratch);
    A* sums = scratch.take<A>(size * L);
    A* to_hidden = scratch.take<A>(tiles * p.hidden * kPitch);
    to_input.begin(scratch);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::fill_n(sums, size * L, A(0));
      for (int64_t unit = units * chunk / chunks; unit < units * (chunk + 1) / chunks; ++unit) {
        const int64_t n = unit / p.blocks(), y0 = unit % p.blocks() * p.block_rows();
        const int64_t y1 = std::min(p.Ho(), y0 + p.block_rows());
        for (int64_t g = 0; g < p.G; ++g) {
          const A* group_span = source.span + g * p.KK() * depth;
          A* next = to_hidden;
          to_input.start(n, g, y0, y1);
          to_weight.run(n, g, y0, y1, [&](const Tile& t, const A* gw) {
            if (t.x0 == 0) to_input.advance(t.y + t.rows);
            if (grad_span_weight)
              accumulate_outer(gw, to_input.features_of(t), sums + g * p.KK() * depth * L, p.KK(), depth);
            multiply(group_span, 1, depth, gw, next, p.hidden, p.KK(), g > 0);
            if (g == p.G - 1)
              for (int64_t r = 0; r < t.rows; ++r)
                put_out(grad_hidden.at(n, 0, t.y + r, t.x0), grad_hidden.c, grad_hidden.w, next + r * t.width, kPitch,
                        p.hidden, t.nx);
            next += p.hidden * kPitch;
          });
          to_input.advance(p.Ho());
        }
      }
      for (int64_t e = 0; e < size; ++e) {
        A sum = 0;
        for (int lane = 0; lane < L; ++lane) sum += sums[e * L + lane];
        partial[chunk * size + e] = sum;
      }
    }
  });
  if (!grad_span_weight) return;
  for (int64_t k = 0; k < p.G * p.KK(); ++k)
    for (int64_t d = 0; d < depth; ++d) {
      A sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * size + k * depth + d];
      if (d < p.hidden)
        grad_span_weight[k * p.hidden + d] = T(sum);
      else
        grad_span_bias[k] = T(sum);
    }
}

// ---------------------------------------------------------------------------------------------- plain C interface

template <class F>
int with_dtype(int64_t dtype, const int64_t* packed, const F& f) {
  const auto& problem = *(const Problem*)packed;
  const auto tensors = (const Argument*)(packed + sizeof(Problem) / sizeof(int64_t));
  try {
    if (dtype == 0)
      f(float(), problem, tensors);
    else if (dtype == 1)
      f(BFloat16(), problem, tensors);
    else
      f(double(), problem, tensors);
    return 0;
  } catch (const std::exception&) {  // std::length_error too: sizes past any memory
    return 1;
  }
}

}  // namespace

// `packed`: the nine numbers of Problem, then tensors in the order of the names below. A dtype is 0 for float32, 1 for
// bfloat16, 2 for float64. Span weight and bias and their gradients are contiguous. A gradient that is not wanted is
// null, with any strides. Returns 0, or 1 when out of memory.
extern "C" {

// input, weight, output
int involution_forward(int64_t dtype, const int64_t* packed) {
  return with_dtype(dtype, packed, [&](auto zero, const Problem& p, const Argument* t) {
    using T = decltype(zero);
    const GivenKernels<typename AccumulatorOf<T>::type, T> source{p, t[1]};
    forward<T>(p, Image<T>(t[0]), source, Image<T>(t[2]));
  });
}

// grad_output, input, weight, grad_input, grad_weight
int involution_backward(int64_t dtype, const int64_t* packed) {
  return with_dtype(dtype, packed, [&](auto zero, const Problem& p, const Argument* t) {
    backward<decltype(zero)>(p, t[0], t[1], t[2], t[3], t[4]);
  });
}

// input, hidden, span_weight, span_bias, output
int involution_fused_forward(int64_t dtype, const int64_t* packed) {
  return with_dtype(dtype, packed, [&](auto zero, const Problem& p, const Argument* t) {
    using T = decltype(zero);
    const auto span = join_span<T>(p, (const T*)t[2].data, (const T*)t[3].data);
    const SpannedKernels<typename AccumulatorOf<T>::type, T> source{p, t[1], span.data()};
    forward<T>(p, Image<T>(t[0]), source, Image<T>(t[4]));
  });
}

// grad_output, input, hidden, span_weight, span_bias, grad_input, grad_hidden, grad_span_weight, grad_span_bias
int involution_fused_backward(int64_t dtype, const int64_t* packed) {
  return with_dtype(dtype, packed, [&](auto zero, const Problem& p, const Argument* t) {
    using T = decltype(zero);
    using A = typename AccumulatorOf<T>::type;
    const auto span = join_span<T>(p, (const T*)t[3].data, (const T*)t[4].data);
    const SpannedKernels<A, T> source{p, t[2], span.data()};
    const Image<T> grad_output(t[0]), grad_input(t[5]);
    const auto run = [&](const auto& of_input) {
      fused_backward<T>(p, grad_output, t[1], source, of_input, t[6], (T*)t[7].data, (T*)t[8].data);
    };
    if constexpr (std::is_same_v<T, A>) {
      const auto gather = choose_fused<A>(p).grad_input;
      if (gather && grad_output.c == 1 && grad_input.c == 1)
        return run(GatheredInputGradient<A>(p, grad_output, source, grad_input, gather));
    }
    run(InputGradient<T, SpannedKernels<A, T>>(p, grad_output, source, grad_input));
  });
}
}
