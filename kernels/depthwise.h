// Depthwise convolution of channels-last images, and its gradients.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
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
  std::vector<double> partial(chunks * KK * width);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> padded(((block - 1) * p.stride + p.span()) * cols * width), copy(block * Wo * width);
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

}  // namespace
