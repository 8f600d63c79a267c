// Depthwise convolution of channels-last images, and its gradients.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "packed.h"
#include "vectors.h"

namespace {

struct Depthwise {
  int64_t N, C, H, W, K, stride, dilation;

  explicit Depthwise(Reader& reader)
      : N(reader.number()), C(reader.number()), H(reader.number()), W(reader.number()), K(reader.number()),
        stride(reader.number()), dilation(reader.number()) {}
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

struct Layout {  // of what a row of output pixels is made of
  int64_t cols, width;  // of an image's row, and of its pixels
  int64_t taps;         // channels of a tap
  int64_t first, last;  // rows of the kernel that read the image
};

// out[x] = sum over taps of weight[tap] * image[x * stride + tap] for R pixels and V vectors of channels. K is the
// kernel size, or 0 for any. With a dilation X > 0 and stride 1, pixels X apart share the columns that they read.
template <class A, int K, int X, int R, int V>
inline void depthwise_block(const A* image, const A* weight, A* out, const Depthwise& p, const Layout& l) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[R][V] = {};
  if constexpr (X > 0) {
    for (int64_t i = l.first; i < l.last; ++i) {
      const A* line = image + i * X * l.cols * l.width;
      const A* taps = weight + i * K * l.taps;
#pragma GCC unroll 16
      for (int m = 0; m < R + K - 1; ++m) {
        Vec<A> column[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          column[v] = load(line + m * X * l.width + v * L);
          in_register(column[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if (m - r < 0 || m - r >= K) continue;
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sum[r][v] += column[v] * load(taps + (m - r) * l.taps + v * L);
        }
      }
    }
  } else {
    for (int64_t i = l.first; i < l.last; ++i)
      for (int64_t j = 0; j < p.K; ++j) {
        const A* pixel = image + (i * l.cols + j) * p.dilation * l.width;
        Vec<A> tap[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) tap[v] = load(weight + (i * p.K + j) * l.taps + v * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sum[r][v] += tap[v] * load(pixel + r * p.stride * l.width + v * L);
      }
  }
  const int64_t apart = (X > 0 ? X : 1) * l.width;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(out + r * apart + v * L, sum[r][v]);
}

template <class A, int K, int X, int V>
void depthwise_columns(const A* image, const A* weight, A* out, const Depthwise& p, const Layout& l, int64_t count) {
  constexpr int step = X > 0 ? X : 1;
  const auto visit = [&](int64_t x, auto pixels) {
    constexpr int R = pixels;
    depthwise_block<A, K, X, R, V>(image + x * p.stride * l.width, weight, out + x * l.width, p, l);
  };
  const auto visit_all = [&](int64_t x, auto pixels) {
    for (; x + pixels * step <= count; x += pixels * step)
      for (int64_t phase = 0; phase < step; ++phase) visit(x + phase, pixels);
    return x;
  };
  int64_t x = 0;
  if constexpr (V == 1) x = visit_all(x, std::integral_constant<int, 8>());  // so many sums that none waits for itself
  x = visit_all(x, std::integral_constant<int, 4>());
  for (; x < count; ++x) visit(x, std::integral_constant<int, 1>());
}

// f(c, V) for all channels, V vectors at a time, from c on. The last vector may repeat channels.
template <class A, class F>
inline void for_vectors(int64_t C, const F& f) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + 2 * L <= C; c += 2 * L) f(c, std::integral_constant<int, 2>());
  for (; c < C; c += L) f(std::min(c, C - L), std::integral_constant<int, 1>());
}

template <class A, int K, int X>
void depthwise_row(const A* image, const A* weight, A* out, const Depthwise& p, int64_t cols, int64_t width) {
  const Layout l{cols, width, width, 0, p.K};
  for_vectors<A>(width, [&](int64_t c, auto V) {
    depthwise_columns<A, K, X, V>(image + c, weight + c, out + c, p, l, (cols - p.span()) / p.stride + 1);
  });
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

// -------------------------------------------------------------------------------------------------- without copies

// f(e, j) for the taps j of a row that pixel e of the first, or of the last, K / 2 * X of an image's row reads inside
template <int K, int X, class F>
inline void for_edge(bool is_first, const F& f) {
  constexpr int pad = K / 2 * X;
#pragma GCC unroll 4
  for (int e = 0; e < pad; ++e)
#pragma GCC unroll 5
    for (int j = 0; j < K; ++j)
      if (is_first ? e + j * X >= pad : e + j * X < 2 * pad) f(e, j);
}

// Output row y of a stride of 1, from an image (H, W, C) where it lies: what it would read outside is left out
template <class A, int K, int X>
void row_in_place(const A* input, const A* weight, A* out, const Depthwise& p, int64_t y) {
  constexpr int L = kLanes<A>, pad = K / 2 * X;
  const int64_t C = p.C, W = p.W, taps = round_up(C, L);
  const int64_t above = std::max<int64_t>(0, pad - y), below = std::max<int64_t>(0, y + pad - (p.H - 1));
  const Layout l{W, C, taps, (above + X - 1) / X, K - (below + X - 1) / X};
  for_vectors<A>(C, [&](int64_t c, auto vectors) {
    constexpr int V = vectors;
    const A *image = input + (y - pad) * W * C + c, *weights = weight + c;
    const auto edge = [&](auto is_first) {
      const int64_t x0 = is_first ? 0 : W - pad;
      Vec<A> sum[pad][V] = {};
      for (int64_t i = l.first; i < l.last; ++i)
        for_edge<K, X>(is_first, [&](int e, int j) {
          const A* pixel = image + (i * X * W + x0 + e + j * X - pad) * C;
          for (int v = 0; v < V; ++v) sum[e][v] += load(pixel + v * L) * load(weights + (i * K + j) * taps + v * L);
        });
#pragma GCC unroll 4
      for (int e = 0; e < pad; ++e)
        for (int v = 0; v < V; ++v) store(out + (x0 + e) * C + c + v * L, sum[e][v]);
    };
    edge(std::true_type());
    depthwise_columns<A, K, X, V>(image, weights, out + pad * C + c, p, l, W - 2 * pad);
    edge(std::false_type());
  });
}

// sums[j] += sum over output rows [y0, y1) of grad[y][x] * image[y][x + (j - K / 2) * X], for the taps of row i of a
// kernel, `pitch` elements apart
template <class A, int K, int X>
void weight_row_in_place(const A* image, const A* grad, const Depthwise& p, int64_t i, int64_t y0, int64_t y1,
                         double* sums, int64_t pitch) {
  constexpr int L = kLanes<A>, pad = K / 2 * X;
  const int64_t C = p.C, W = p.W, down = i * X - pad;
  for (int64_t c0 = 0; c0 < C; c0 += L) {
    const int64_t c = std::min(c0, C - L);  // the last vector may repeat channels
    Vec<A> sum[K] = {};
    for (int64_t y = std::max(y0, -down); y < std::min(y1, p.H - down); ++y) {
      const A *line = image + (y + down) * W * C + c, *g = grad + (y - y0) * W * C + c;
      const auto add = [&](int64_t x, int j) { sum[j] += load(g + x * C) * load(line + (x + j * X - pad) * C); };
      for_edge<K, X>(true, add);
      for (int64_t x = pad; x < W - pad; ++x)
#pragma GCC unroll 5
        for (int j = 0; j < K; ++j) add(x, j);
      for_edge<K, X>(false, [&](int e, int j) { add(W - pad + e, j); });
    }
#pragma GCC unroll 5
    for (int j = 0; j < K; ++j)
      for (int64_t lane = c0 - c; lane < L; ++lane) sums[j * pitch + c + lane] += sum[j][lane];
  }
}

template <class A>
struct InPlace {  // the loops that read images where they lie; null where there are none
  void (*row)(const A*, const A*, A*, const Depthwise&, int64_t) = nullptr;
  void (*weight_row)(const A*, const A*, const Depthwise&, int64_t, int64_t, int64_t, double*, int64_t) = nullptr;
};

template <class A>
InPlace<A> choose_in_place(const Depthwise& p) {
  if (p.stride != 1 || p.C < kLanes<A> || p.W < 2 * p.pad()) return {};
  if (p.dilation == 1 && p.K == 3) return {row_in_place<A, 3, 1>, weight_row_in_place<A, 3, 1>};
  if (p.dilation == 1 && p.K == 5) return {row_in_place<A, 5, 1>, weight_row_in_place<A, 5, 1>};
  if (p.dilation == 2 && p.K == 3) return {row_in_place<A, 3, 2>, weight_row_in_place<A, 3, 2>};
  if (p.dilation == 2 && p.K == 5) return {row_in_place<A, 5, 2>, weight_row_in_place<A, 5, 2>};
  return {};
}

// ------------------------------------------------------------------------------------------------------- all images

template <class A>
Buffer<A> turned_taps(const A* weight, const Depthwise& p, int64_t width, bool flip) {
  const int64_t KK = p.K * p.K;  // (C, K*K) -> (K*K, width)
  Buffer<A> taps(KK * width);
  for (int64_t c = 0; c < p.C; ++c)
    for (int64_t t = 0; t < KK; ++t) taps[(flip ? KK - 1 - t : t) * width + c] = weight[c * KK + t];
  return taps;
}

// The convolution of `input` (N, H, W, C), with `step` - 1 zeros put between its pixels, at `Ho` x `Wo` places
template <class A>
void depthwise(const Depthwise& p, const A* input, int64_t step, const Buffer<A>& taps, A* output, int64_t H,
               int64_t W, int64_t Ho, int64_t Wo) {
  if (const auto convolve = choose_in_place<A>(p).row; convolve && step == 1)
    return at::parallel_for(0, p.N * Ho, std::max<int64_t>(1, 8192 / (W * p.C)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        convolve(input + row / Ho * H * W * p.C, taps.data(), output + row * W * p.C, p, row % Ho);
    });
  const int64_t width = round_up(p.C, kLanes<A>), cols = (Wo - 1) * p.stride + p.span();
  const int64_t block = p.block_rows(Ho, cols), blocks = (Ho + block - 1) / block;
  const auto convolve = choose_row<A>(p);
  at::parallel_for(0, p.N * blocks, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> padded(((block - 1) * p.stride + p.span()) * cols * width), out(Wo * width);
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
  const auto in_place = choose_in_place<A>(p).weight_row;
  std::vector<double> partial(chunks * KK * width);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> padded(in_place ? 0 : ((block - 1) * p.stride + p.span()) * cols * width);
    Buffer<A> copy(in_place || width == p.C ? 0 : block * Wo * width);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t unit = p.N * blocks * chunk / chunks; unit < p.N * blocks * (chunk + 1) / chunks; ++unit) {
        const int64_t n = unit / blocks, y0 = unit % blocks * block, rows = std::min(Ho - y0, block);
        const A *image = input + n * p.H * p.W * p.C, *g = grad + (n * Ho + y0) * Wo * p.C;
        if (in_place) {
          for (int64_t i = 0; i < p.K; ++i)
            in_place(image, g, p, i, y0, y0 + rows, partial.data() + (chunk * KK + i * p.K) * width, width);
          continue;
        }
        load_padded(padded.data(), image, p.H, p.W, p.C, width, y0 * p.stride - p.pad(),
                    (rows - 1) * p.stride + p.span(), -p.pad(), cols, 1);
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

}  // namespace
