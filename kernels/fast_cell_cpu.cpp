// The loops of fast_cell_cpu.py: what a cell computes from its images, with the products of products.h.
//
// `spread` makes weighted sums, `mix` a node of the candidates that enter it, `project` the states of a derived network's
// cells from the nodes of the cells before; pooling, patches, every second pixel and the RMS of features are loops.

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <deque>
#include <exception>
#include <type_traits>
#include <utility>
#include <vector>

#include "depthwise.h"
#include "packed.h"
#include "products.h"

namespace {

constexpr int64_t kBatchBytes = 4 << 20;  // of the candidates that backward visits twice in turn
constexpr int64_t kWideProduct = 1 << 16;  // elements of a weight whose gradient takes longer tiles
constexpr double kEps = 1e-5, kMomentum = 0.1;  // of batch norm

// --------------------------------------------------------------------------------------------------------- spread

// results[n] = sum over t of alphas[n][t] * images[t]
template <class A>
void spread(Reader reader) {
  const int64_t pixels = reader.number();
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
void spread_backward(Reader reader) {
  const int64_t pixels = reader.number();
  const auto images = read_operands<A>(reader), grads = read_operands<A>(reader);
  const A* alphas = reader.address<const A>();
  A* grad_alphas = reader.address<A>();
  std::vector<Product<A>> products;
  for (const auto& grad : grads)
    for (const auto& operand : images) products.emplace_back(grad, operand, true);
  multiply(pixels, products);
  for (const auto& product : products) *grad_alphas++ = A(product.result[0]);
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

struct Statistics {  // of one candidate; kept from forward to backward. Without training, mean and s are given.
  double *mean, *var, *s, *mean_z, *WS;
  Statistics(double* data, int64_t C, int64_t K)
      : mean(data), var(data + C), s(data + 2 * C), mean_z(data + 3 * C), WS(data + 3 * C + K) {}

  void find_s(int64_t C, double pixels) {
    for (int64_t c = 0; c < C; ++c) {
      s[c] = 1 / std::sqrt(var[c] + kEps);
      var[c] *= pixels / (pixels - 1.0);  // running statistics have the unbiased one
    }
  }
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
                     bool training, A* grad_scales, A* grad_shifts, A* grad_weight, Combination<A>* grad_z) const {
    A* of_g = grad_z ? grad_z->add(g).matrix.data() : nullptr;
    std::vector<double> of_z(training && grad_z ? K * K : 0);
    double grad_scale = 0;
    if (shifts) std::transform(G.data(), G.data() + C, grad_shifts, [](double sum) { return A(sum); });
    for (int64_t c = 0; c < C; ++c) {
      const A* W = weight + c * K;
      const double s = stats.s[c];
      double q = 0;
      for (int64_t k = 0; k < K; ++k) q += M[c * K + k] * W[k];
      q = s * (q - stats.mean[c] * G[c]);
      grad_scale = step ? q : grad_scale + q;
      if (scales) grad_scales[c * step] = A(grad_scale);
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
void mix(Reader reader) {
  const int64_t pixels = reader.number();
  const bool training = reader.number();
  const bool relu = reader.number();
  const Operand<A> results(reader);
  Combination<A> node(results.parts, relu);
  node.positives = reader.address<A>();
  const auto parts = read_operands<A>(reader);
  for (const auto& part : parts) node.add(part, A(1));
  std::deque<Candidate<A>> candidates;
  for (int64_t n = reader.number(); n > 0; --n) candidates.emplace_back(reader);
  if (training) {
    std::vector<Product<A>> moments;
    for (const auto& candidate : candidates) moments.emplace_back(candidate.z, candidate.z);
    multiply(pixels, moments);
    at::parallel_for(0, candidates.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        candidates[k].find_statistics(moments[k], pixels);
        candidates[k].stats.find_s(candidates[k].C, pixels);
      }
    });
  }
  for (const auto& candidate : candidates) candidate.add_to(node);
  combine<A>(pixels, {node});
}

template <class A>
void mix_backward(Reader reader) {
  const int64_t pixels = reader.number();
  const bool training = reader.number();
  const Operand<A> given(reader);
  A* const total = reader.address<A>();  // room for the gradient as one image; null where it is given as such
  const Operand<A> g = total ? Operand<A>(total, given.width) : given;
  int64_t n = reader.number();
  // a few candidates at a time: what the first sweep over pixels has read, the second finds in the cache
  for (bool adds_up = total; adds_up || n > 0; adds_up = false) {
    const int64_t bytes = pixels * g.width * sizeof(A), count = std::min(n, std::max<int64_t>(2, kBatchBytes / bytes));
    std::deque<Candidate<A>> candidates;
    std::deque<Operand<A>> gradients;
    std::deque<std::deque<Operand<A>>> operands;
    std::vector<Product<A>> products;
    std::vector<Combination<A>> combinations;
    std::vector<A*> to_scales, to_shifts, to_weight;
    std::vector<int64_t> of_candidate;
    for (int64_t k = 0; k < count; ++k) {
      candidates.emplace_back(reader);
      const auto& candidate = candidates.back();
      gradients.push_back(g.times(candidate.factors, candidate.image_pixels));
      products.emplace_back(gradients.back(), candidate.z);
      to_scales.push_back(reader.address<A>());
      to_shifts.push_back(reader.address<A>());
      to_weight.push_back(reader.address<A>());
      A* grad_z = reader.address<A>();
      of_candidate.push_back(grad_z ? int64_t(combinations.size()) : -1);
      operands.push_back(read_operands<A>(reader));  // what else is added to the gradient of z
      if (!grad_z) continue;
      combinations.emplace_back(image(grad_z, candidate.K), false);
      for (const auto& operand : operands.back()) combinations.back().add(operand, A(1));
    }
    multiply(pixels, products, adds_up, [&](int64_t p0, int64_t rows) {
      given.copy_to(total + p0 * given.width, p0, rows);
    });
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

// Here v = W z, z the positive parts of images of many channels, is computed: its statistics are sums over v
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

// The sums of the chunks, in their order
inline std::vector<double> total_of(const std::vector<double>& partial, int64_t size) {
  std::vector<double> total(size);
  for (size_t first = 0; first < partial.size(); first += size)
    for (int64_t e = 0; e < size; ++e) total[e] += partial[first + e];
  return total;
}

template <class A>
struct Projection {  // scale * norm(v) + shift, v = W z
  std::deque<Operand<A>> z;  // side by side
  int64_t C, K = 0;
  const A* weight;  // null where v is given
  A* v;             // null where it is not kept
  const A *scales, *shifts;  // null for ones and zeros
  Statistics stats;
  Buffer<A> mean, slope, shift;  // of every channel

  explicit Projection(Reader& reader)
      : z(read_operands<A>(reader)), C(reader.number()), weight(reader.address<const A>()), v(reader.address<A>()),
        scales(reader.address<const A>()), shifts(reader.address<const A>()), stats(reader.address<double>(), C, 0),
        mean(C), slope(C), shift(C) {
    for (const auto& operand : z) K += operand.width;
  }

  double scale(int64_t c) const { return scales ? double(scales[c]) : 1; }

  void find_statistics(const std::vector<double>& sums, double pixels) {
    for (int64_t c = 0; c < C; ++c) {
      stats.mean[c] = sums[c] / pixels;
      stats.var[c] = std::max(sums[C + c] / pixels - stats.mean[c] * stats.mean[c], 0.0);
    }
  }

  void find_slopes() {
    for (int64_t c = 0; c < C; ++c) {
      mean[c] = A(stats.mean[c]);
      slope[c] = A(scale(c) * stats.s[c]);
      shift[c] = shifts ? shifts[c] : A(0);
    }
  }

  // The channels [c0, c0 + to.channels) of v, or of the whole where `normalized`, as products
  void add_to(Combination<A>& to, int64_t c0, bool normalized) const {
    int64_t k0 = 0;
    for (const auto& operand : z) {
      auto& matrix = to.add(operand).matrix;
      for (int64_t c = 0; c < to.channels; ++c)
        for (int64_t k = 0; k < operand.width; ++k)
          matrix[k * to.width + c] = weight[(c0 + c) * K + k0 + k] * (normalized ? slope[c0 + c] : A(1));
      k0 += operand.width;
    }
    for (int64_t c = 0; normalized && c < to.channels; ++c) to.bias[c] = shift[c0 + c] - slope[c0 + c] * mean[c0 + c];
  }
};

// Add to sums[0] those of v over the rows, to sums[1] those of v², by way of the squares of its distance from the mean
template <class A>
void add_moments(const A* v, int64_t rows, int64_t C, double* sums) {
  thread_local std::vector<double> total, square;
  thread_local Buffer<A> mean;
  total.assign(C, 0), square.assign(C, 0), mean.resize(C);
  add_rows<A, 1>(rows, C, {total.data()}, [&](int64_t p, int64_t c, auto zero) {
    return std::array{read<decltype(zero)>(v + p * C + c)};
  });
  for (int64_t c = 0; c < C; ++c) mean[c] = A(total[c] / rows);
  add_rows<A, 1>(rows, C, {square.data()}, [&](int64_t p, int64_t c, auto zero) {
    using V = decltype(zero);
    const V distance = read<V>(v + p * C + c) - read<V>(mean.data() + c);
    return std::array<V, 1>{distance * distance};
  });
  for (int64_t c = 0; c < C; ++c) {
    sums[c] += total[c];
    sums[C + c] += square[c] + (2 * total[c] - rows * double(mean[c])) * mean[c];
  }
}

template <class A>
struct Result {  // images of a result, or of its gradient, and of its positive part's; either may be null
  A *plain, *positives;
  int64_t width;

  explicit Result(Reader& reader)
      : plain(reader.address<A>()), positives(reader.address<A>()), width(reader.number()) {}
};

template <class A>
std::vector<Result<A>> read_results(Reader& reader) {
  std::vector<Result<A>> results;
  for (int64_t n = reader.number(); n > 0; --n) results.emplace_back(reader);
  return results;
}

template <class V>
struct Norm {  // of the channels of a vector
  V mean, slope, shift;

  template <class A>
  Norm(const Projection<A>& p, int64_t c)
      : mean(read<V>(&p.mean[c])), slope(read<V>(&p.slope[c])), shift(read<V>(&p.shift[c])) {}
  V operator()(V v) const { return (v - mean) * slope + shift; }

  // The gradient of a result at its element e, which is made of v. Tells of the place `ahead` elements further on.
  template <class A>
  V gradient(const Result<A>& of, int64_t e, V v, int64_t ahead) const {
    V g{};
    if (of.positives) {
      fetch(of.positives + e + ahead);
      g = (*this)(v) <= 0 ? g : read<V>(of.positives + e);  // what is not a number passes, as it does ReLU
    }
    if (of.plain) {
      fetch(of.plain + e + ahead);
      g += read<V>(of.plain + e);
    }
    return g;
  }
};

// Rows of norm(v), and of its positive part, for the channels of v from c0 on
template <class A>
void normalize(const Projection<A>& p, int64_t c0, const Result<A>& result, int64_t p0, int64_t rows) {
  for_columns<kLanes<A>>(0, result.width, [&](int64_t first, auto n) {
    using V = Lanes<A, n>;
    const Norm<V> norm(p, c0 + first);
    for (int64_t row = p0; row < p0 + rows; ++row) {
      const A* v = p.v + row * p.C + c0 + first;
      const int64_t e = row * result.width + first, ahead = rows * result.width;
      fetch(v + rows * p.C);
      const V value = norm(read<V>(v));
      if (result.plain) {
        fetch(result.plain + e + ahead);
        store(result.plain + e, value);
      }
      if (result.positives) {
        fetch(result.positives + e + ahead);
        store(result.positives + e, positive(value));
      }
    }
  });
}

// The results as products, batch norm included
template <class A>
std::vector<Combination<A>> normalized(const Projection<A>& p, const std::vector<Result<A>>& results) {
  std::vector<Combination<A>> combinations;
  int64_t c0 = 0;
  for (const auto& result : results) {
    combinations.emplace_back(image(result.plain ? result.plain : result.positives, result.width), !result.plain);
    if (result.plain) combinations.back().positives = result.positives;
    p.add_to(combinations.back(), c0, true);
    c0 += result.width;
  }
  return combinations;
}

template <class A>
void project(Reader reader) {
  const int64_t pixels = reader.number();
  const bool training = reader.number();
  Projection<A> p(reader);
  const auto results = read_results<A>(reader);
  const auto finish = [&](int64_t p0, int64_t rows) {
    int64_t c0 = 0;
    for (const auto& result : results) {
      normalize(p, c0, result, p0, rows);
      c0 += result.width;
    }
  };
  if (!training) p.find_slopes();
  if (p.weight && !p.v) return combine(pixels, normalized(p, results));
  Combination<A> product(image(p.v, p.C), false, true);
  if (p.weight) p.add_to(product, 0, false);
  std::vector<double> sums(training ? chunks_of(pixels) * 2 * p.C : 0);
  for_tiles(pixels, kCombined, [&](int64_t chunk, int64_t p0, int64_t rows) {
    thread_local Buffers<A> buffers;
    if (p.weight) product.run(p0, rows, buffers);
    if (training)
      add_moments(p.v + p0 * p.C, rows, p.C, sums.data() + chunk * 2 * p.C);
    else
      finish(p0, rows);
  });
  if (!training) return;
  p.find_statistics(total_of(sums, 2 * p.C), pixels);
  p.stats.find_s(p.C, pixels);
  p.find_slopes();
  for_tiles(pixels, kCombined, [&](int64_t, int64_t p0, int64_t rows) { finish(p0, rows); });
}

// The sums over pixels of the gradient g, and of g * (v - mean), of every channel
template <class A>
std::vector<double> sum_gradients(const Projection<A>& p, const std::vector<Result<A>>& g, int64_t pixels) {
  const int64_t C = p.C;
  std::vector<double> sums(chunks_of(pixels) * 2 * C);
  for_tiles(pixels, kMultiplied, [&](int64_t chunk, int64_t p0, int64_t rows) {
    int64_t c0 = 0;
    for (const auto& of : g) {
      double* to = sums.data() + chunk * 2 * C + c0;
      add_rows<A, 2>(rows, of.width, {to, to + C}, [&](int64_t r, int64_t c, auto zero) {
        using V = decltype(zero);
        const Norm<V> norm(p, c0 + c);
        const A* place = p.v + (p0 + r) * C + c0 + c;
        fetch(place + rows * C);
        const V v = read<V>(place), value = norm.gradient(of, (p0 + r) * of.width + c, v, rows * of.width);
        return std::array<V, 2>{value, value * (v - norm.mean)};
      });
      c0 += of.width;
    }
  });
  return total_of(sums, 2 * C);
}

// Rows of the gradient of v: slope * (g - constant - (v - mean) * curve)
template <class A>
void differentiate_norm(const Projection<A>& p, const std::vector<Result<A>>& g, const A* constant, const A* curve,
                        int64_t p0, int64_t rows, A* to_v) {
  int64_t c0 = 0;
  for (const auto& of : g) {
    for_columns<kLanes<A>>(0, of.width, [&](int64_t first, auto n) {
      using V = Lanes<A, n>;
      const int64_t c = c0 + first;
      const Norm<V> norm(p, c);
      const V less = read<V>(constant + c), slope = read<V>(curve + c);
      for (int64_t r = 0; r < rows; ++r) {
        const A* place = p.v + (p0 + r) * p.C + c;
        fetch(place + rows * p.C);
        const V v = read<V>(place), value = norm.gradient(of, (p0 + r) * of.width + first, v, rows * of.width);
        store(to_v + r * p.C + c, V(norm.slope * (value - less - (v - norm.mean) * slope)));
      }
    });
    c0 += of.width;
  }
}

// Room for the gradient of an image, or null; what else is added to it; whether all of it counts only where the image
// is positive, as the ReLU that made the image has it
template <class A>
struct ToImage {
  A* to;
  bool masked;
  std::vector<const A*> more;

  explicit ToImage(Reader& reader) : to(reader.address<A>()), masked(reader.number()) {
    for (int64_t n = reader.number(); n > 0; --n) more.push_back(reader.address<const A>());
  }
};

template <class A>
void project_backward(Reader reader) {
  const int64_t pixels = reader.number();
  const bool training = reader.number();
  Projection<A> p(reader);
  const auto g = read_results<A>(reader);
  A *to_scales = reader.address<A>(), *to_shifts = reader.address<A>();
  A* to_weight = reader.address<A>();  // null where it is not wanted; or, where v is given, the gradient of v
  std::vector<ToImage<A>> to_z;
  for (size_t n = 0; n < p.z.size(); ++n) to_z.emplace_back(reader);
  const int64_t C = p.C, K = p.K, chunks = chunks_of(pixels);

  p.find_slopes();
  Buffer<A> curve(C), constant(C);
  const auto sums = sum_gradients(p, g, pixels);
  for (int64_t c = 0; c < C; ++c) {
    const double s = p.stats.s[c], G = sums[c], q = s * sums[C + c];
    if (p.shifts) to_shifts[c] = A(G);
    if (p.scales) to_scales[c] = A(q);
    constant[c] = A(training ? G / pixels : 0);
    curve[c] = A(training ? s * q / pixels : 0);
  }

  std::vector<double> products(p.weight ? chunks * C * K : 0);
  const Buffer<A> zeros(K);
  const int64_t tile = C * K > kWideProduct ? 2 * kMultiplied : kMultiplied;
  for_tiles(pixels, tile, [&](int64_t chunk, int64_t p0, int64_t rows) {
    thread_local Buffer<A> z_copy, v_room;
    thread_local std::vector<Addend<A>> more;
    A* to_v = p.weight ? scratch(v_room, rows * C) : to_weight + p0 * C;
    differentiate_norm(p, g, constant.data(), curve.data(), p0, rows, to_v);
    int64_t k0 = 0;
    for (size_t n = 0; p.weight && n < to_z.size(); k0 += p.z[n++].width) {
      const int64_t width = p.z[n].width;
      const A* z = p.z[n].tile(p0, rows, z_copy);
      if (to_weight) multiply_tile(to_v, C, true, z, width, rows, products.data() + chunk * C * K + k0, K);
      if (!to_z[n].to) continue;
      more.clear();
      for (const A* x : to_z[n].more) more.push_back({x + p0 * width, A(1)});
      const Input<A> input{to_v, C, p.weight + k0, K};
      const Target<A> target{to_z[n].to + p0 * width, width, false, nullptr, to_z[n].masked ? z : nullptr};
      combine_tile(&input, 1, {zeros.data(), 0, more}, target, rows);
    }
  });
  if (!p.weight || !to_weight) return;
  products = total_of(products, C * K);
  for (int64_t e = 0; e < C * K; ++e) to_weight[e] = A(products[e]);
}

// --------------------------------------------------------------------------------------------------- every second

// Of images (N, H, W, C) every second pixel of every second row, from the first on and from the second on: `first` and
// `second`, (N, ceil(H/2), ceil(W/2), C), the latter with zeros past the edge. `gather` reads x, else x is written:
// with zeros between, plus `more`, if that is there.
template <class A>
void every_second(Reader reader) {
  const int64_t N = reader.number(), H = reader.number(), W = reader.number(), C = reader.number();
  const bool gather = reader.number();
  A *x = reader.address<A>(), *first = reader.address<A>(), *second = reader.address<A>();
  const A* more = gather ? nullptr : reader.address<const A>();
  const int64_t Ho = (H + 1) / 2, Wo = (W + 1) / 2;
  const auto put = [&](A* to, const A* pixel) {
    if (!to) return;
    for_columns<kLanes<A>>(0, C, [&](int64_t c, auto n) {
      using V = Lanes<A, n>;
      V value = pixel ? read<V>(pixel + c) : V{};
      if (more) value += read<V>(more + (to - x) + c);
      store(to + c, value);
    });
  };
  at::parallel_for(0, N * Ho, std::max<int64_t>(1, 8192 / (Wo * C)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = row % Ho * 2;
      A *of_first = first + row * Wo * C, *of_second = second + row * Wo * C;
      A* upper = x + (row / Ho * H + y) * W * C;
      A* lower = y + 1 < H ? upper + W * C : nullptr;
      const int64_t ahead = 2 * W * C;  // hardware does not foresee every second pixel
      fetch_run(upper + ahead, ahead);
      if (more) fetch_run(more + (upper - x) + ahead, ahead);
      for (int64_t wo = 0; wo < Wo; ++wo, of_first += C, of_second += C, upper += 2 * C) {
        A* right = 2 * wo + 1 < W ? upper + C : nullptr;
        A* beyond = lower && right ? lower + C : nullptr;
        if (gather) {
          put(of_first, upper);
          put(of_second, beyond);
        } else {
          put(upper, of_first);
          put(right, nullptr);
          put(lower, nullptr);
          put(beyond, of_second);
        }
        if (lower) lower += 2 * C;
      }
    }
  });
}

// -------------------------------------------------------------------------------------------------------- patches

// Of images (N, H, W, C) the 3x3 pixels around each, row by row, with zeros past the edge and behind them: images
// (N, H, W, width)
template <class A>
void patches(Reader reader) {
  const int64_t N = reader.number(), C = reader.number(), H = reader.number(), W = reader.number();
  const int64_t width = reader.number();
  const A* x = reader.address<const A>();
  A* y = reader.address<A>();
  at::parallel_for(0, N * H, std::max<int64_t>(1, 8192 / (W * width)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t w = 0; w < W; ++w) {
        A* to = y + (row * W + w) * width;
        const int64_t h = row % H, first = std::max<int64_t>(0, w - 1), last = std::min(W, w + 2);
        std::fill_n(to + 9 * C, width - 9 * C, A(0));
        for (int64_t i = -1; i < 2; ++i, to += 3 * C) {
          const bool inside = h + i >= 0 && h + i < H;
          if (!inside || last - first < 3) std::fill_n(to, 3 * C, A(0));
          if (inside) std::copy_n(x + ((row + i) * W + first) * C, (last - first) * C, to + (first - w + 1) * C);
        }
      }
  });
}

// -------------------------------------------------------------------------------------------------------- pooling

struct Pooling {  // of images (N, H, W, C): 3x3, padded by one pixel that does not count
  int64_t N, C, H, W, stride;
  bool is_max;
  explicit Pooling(Reader& reader)
      : N(reader.number()), C(reader.number()), H(reader.number()), W(reader.number()), stride(reader.number()),
        is_max(reader.number()) {}
  int64_t Ho() const { return (H + stride - 1) / stride; }
  int64_t Wo() const { return (W + stride - 1) / stride; }

  // f(output pixel, first input row, last + 1, first input column, last + 1) of an image; pixels are counted in it
  template <class F>
  void for_windows(const F& f) const {
    for (int64_t y = 0; y < Ho(); ++y)
      for (int64_t x = 0; x < Wo(); ++x)
        f(y * Wo() + x, std::max<int64_t>(0, y * stride - 1), std::min(H, y * stride + 2),
          std::max<int64_t>(0, x * stride - 1), std::min(W, x * stride + 2));
  }
  template <class F>
  void for_images(const F& f) const {
    at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) f(n * H * W * C, n * Ho() * Wo() * C);
    });
  }
};

template <class A>
void pool(Reader reader) {
  const Pooling p(reader);
  const bool is_max = p.is_max;
  const A* input = reader.address<const A>();
  A* output = reader.address<A>();
  p.for_images([&](int64_t in, int64_t out) {
    p.for_windows([&](int64_t pixel, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
      const A* window = input + in;
      const A share = A(1) / ((y1 - y0) * (x1 - x0));
      for_columns<kLanes<A>>(0, p.C, [&](int64_t c, auto n) {
        using V = Lanes<A, n>;
        V result = is_max ? read<V>(window + (y0 * p.W + x0) * p.C + c) : V{};
        for (int64_t y = y0; y < y1; ++y)
          for (int64_t x = x0; x < x1; ++x) {
            const V value = read<V>(window + (y * p.W + x) * p.C + c);
            if (is_max)
              result = (value > result) | (value != value) ? value : result;  // what is not a number is the largest
            else
              result += value;
          }
        store(output + out + pixel * p.C + c, V(is_max ? result : result * share));
      });
    });
  });
}

// The gradient of a maximum, which alone reads input and output, goes to its first place
template <class A>
void pool_backward(Reader reader) {
  const Pooling p(reader);
  const bool is_max = p.is_max;
  const A *input = reader.address<const A>(), *output = reader.address<const A>(), *grad = reader.address<const A>();
  A* grad_input = reader.address<A>();
  p.for_images([&](int64_t in, int64_t out) {
    const A* image = is_max ? input + in : nullptr;
    A* to = grad_input + in;
    std::fill_n(to, p.H * p.W * p.C, A(0));
    p.for_windows([&](int64_t pixel, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
      const A share = A(1) / ((y1 - y0) * (x1 - x0));
      for_columns<kLanes<A>>(0, p.C, [&](int64_t c, auto n) {
        using V = Lanes<A, n>;
        V g = read<V>(grad + out + pixel * p.C + c);
        if (!is_max) g *= share;
        const V largest = is_max ? read<V>(output + out + pixel * p.C + c) : V{};
        for (int64_t y = y0; y < y1; ++y)
          for (int64_t x = x0; x < x1; ++x) {
            const int64_t e = (y * p.W + x) * p.C + c;
            V sum = read<V>(to + e);
            if (is_max) {
              const V value = read<V>(image + e);
              sum += value < largest ? V{} : g;
              g = value < largest ? g : V{};
            } else {
              sum += g;
            }
            store(to + e, sum);
          }
      });
    });
  });
}

// -------------------------------------------------------------------------------------------- running statistics

// Move the running statistics of batch norms towards those of a batch
template <class A>
void track(Reader reader) {
  for (int64_t n = reader.number(); n > 0; --n) {
    const int64_t width = reader.number();
    for (int k = 0; k < 2; ++k) {  // mean and variance
      const double* source = reader.address<const double>();
      A* running = reader.address<A>();
      for (int64_t c = 0; c < width; ++c) running[c] += A(kMomentum) * (A(source[c]) - running[c]);
    }
    *reader.address<int64_t>() += 1;
  }
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

template <class A>
void rms_norm(Reader reader) {
  const int64_t pixels = reader.number(), width = reader.number();
  const A eps = A(reader.real());
  A *x = reader.address<A>(), *scale = reader.address<A>();
  for_pixels(pixels, width, [&](int64_t begin, int64_t end, auto W) {
    rms_norm<A, decltype(W)::value>(begin, end, width, eps, x, scale);
  });
}

template <class A>
void rms_norm_backward(Reader reader) {
  const int64_t pixels = reader.number(), width = reader.number();
  A* grad = reader.address<A>();
  const A *y = reader.address<const A>(), *scale = reader.address<const A>();
  for_pixels(pixels, width, [&](int64_t begin, int64_t end, auto W) {
    rms_norm_backward<A, decltype(W)::value>(begin, end, width, grad, y, scale);
  });
}

// --------------------------------------------------------------------------------------------- depthwise, average

template <class A>
void depthwise(Reader reader) {
  const Depthwise p(reader);
  const A *input = reader.address<const A>(), *weight = reader.address<const A>();
  const auto taps = turned_taps(weight, p, round_up(p.C, kLanes<A>), false);
  depthwise(p, input, 1, taps, reader.address<A>(), p.H, p.W, p.Ho(), p.Wo());
}

// Writes the gradients whose address is not null
template <class A>
void depthwise_backward(Reader reader) {
  const Depthwise p(reader);
  const A *grad = reader.address<const A>(), *input = reader.address<const A>(), *weight = reader.address<const A>();
  A *grad_input = reader.address<A>(), *grad_weight = reader.address<A>();
  if (grad_input) {  // the flipped convolution of the gradient, spread out by the stride
    const auto taps = turned_taps(weight, p, round_up(p.C, kLanes<A>), true);
    Depthwise turned = p;
    turned.stride = 1;
    depthwise(turned, grad, p.stride, taps, grad_input, p.Ho(), p.Wo(), p.H, p.W);
  }
  if (grad_weight) depthwise_grad_weight(p, grad, input, grad_weight);
}

// y: the mean of each window of stride x stride pixels of x, those past the edge left out; or, backward, the gradient of
// x from that of y, plus `more`, if that is there
template <class A>
void average(Reader reader) {
  const int64_t N = reader.number(), C = reader.number(), H = reader.number(), W = reader.number();
  const int64_t stride = reader.number();
  const bool backward = reader.number();
  A *x = reader.address<A>(), *y = reader.address<A>();
  const A* more = backward ? reader.address<const A>() : nullptr;
  const int64_t Ho = (H + stride - 1) / stride, Wo = (W + stride - 1) / stride;
  at::parallel_for(0, N * Ho, std::max<int64_t>(1, 8192 / (Wo * C)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t next = (row / Ho * H + std::min(H, (row % Ho + 1) * stride)) * W * C, count = stride * W * C;
      fetch_run(x + next, count);
      if (more) fetch_run(more + next, count);
      for (int64_t wo = 0; wo < Wo; ++wo) {
        const int64_t h0 = row % Ho * stride, w0 = wo * stride;
        const int64_t h1 = std::min(H, h0 + stride), w1 = std::min(W, w0 + stride);
        A *image = x + row / Ho * H * W * C, *pixel = y + (row * Wo + wo) * C;
        const A share = A((h1 - h0) * (w1 - w0));
        for_columns<kLanes<A>>(0, C, [&](int64_t c, auto n) {
          using V = Lanes<A, n>;
          V sum{};
          const V part = backward ? V(read<V>(pixel + c) / share) : V{};
          for (int64_t h = h0; h < h1; ++h)
            for (int64_t w = w0; w < w1; ++w)
              if (A* place = image + (h * W + w) * C + c; backward)
                store(place, more ? V(part + read<V>(more + (place - x))) : part);
              else
                sum += read<V>(place);
          if (!backward) store(pixel + c, V(sum / share));
        });
      }
    }
  });
}

// ------------------------------------------------------------------------------------------- products, and copies

// Images of `size` elements, each times its factor
template <class A>
void scale(Reader reader) {
  const int64_t N = reader.number(), size = reader.number();
  const A *x = reader.address<const A>(), *factors = reader.address<const A>();
  A* y = reader.address<A>();
  at::parallel_for(0, N, std::max<int64_t>(1, 32768 / size), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t e = n * size; e < (n + 1) * size; ++e) y[e] = x[e] * factors[n];
  });
}

// Parts (rows, width) and `whole`, in whose rows they lie side by side: copied to it, or from it. A part whose address is
// null is zeros, or is left out.
template <class A>
void side_by_side(Reader reader) {
  const int64_t rows = reader.number();
  const bool from_whole = reader.number();
  A* whole = reader.address<A>();
  std::vector<std::pair<A*, int64_t>> parts;
  int64_t width = 0;
  for (int64_t n = reader.number(); n > 0; --n) {
    A* part = reader.address<A>();
    parts.emplace_back(part, reader.number());
    width += parts.back().second;
  }
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      A* place = whole + row * width;
      for (const auto& [part, columns] : parts) {
        if (!part && !from_whole) fill_run(place, columns);
        if (part) from_whole ? copy_run(part + row * columns, place, columns)
                             : copy_run(place, part + row * columns, columns);
        place += columns;
      }
    }
  });
}

template <class F>
int with_dtype(int64_t is_double, const F& f) {
  try {
    if (is_double)
      f(double());
    else
      f(float());
    return 0;
  } catch (const std::exception&) {  // std::length_error too: sizes past any memory
    return 1;
  }
}

}  // namespace

// Images are channels-last and dense. `packed` is read in the order of the functions and constructors above, and is
// written by fast_cell_cpu.py. Each function returns 0, or 1 when out of memory.
extern "C" {
#define ENTRY(name)                                                           \
  int fast_cell_##name(int64_t is_double, const int64_t* packed) {            \
    return with_dtype(is_double, [&](auto zero) {                             \
      name<decltype(zero)>(Reader(packed));                                   \
    });                                                                       \
  }
ENTRY(spread)
ENTRY(spread_backward)
ENTRY(mix)
ENTRY(mix_backward)
ENTRY(project)
ENTRY(project_backward)
ENTRY(every_second)
ENTRY(patches)
ENTRY(pool)
ENTRY(pool_backward)
ENTRY(track)
ENTRY(rms_norm)
ENTRY(rms_norm_backward)
ENTRY(depthwise)
ENTRY(depthwise_backward)
ENTRY(average)
ENTRY(scale)
ENTRY(side_by_side)
#undef ENTRY
}
