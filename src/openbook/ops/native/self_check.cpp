// Runs the kernels over fixed inputs without Python and prints a digest of what each computed: one line for each
// instruction set of this CPU, thread count and group of kernels. Lines of one group must all show one digest, here and on
// any other CPU: tests/ops/test_native_arm64.py compares those of x86-64 with those of arm64 under an emulator.
#include <array>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "activation_kernels.h"
#include "gemm.h"
#include "norm_kernels.h"
#include "optim_kernels.h"
#include "paged_attention.h"
#include "quant.h"
#include "quant_attention.h"
#include "rope_kernels.h"
#include "row_kernels.h"
#include "softmax_kernels.h"
#include "thread_pool.h"

namespace openbook {
namespace {

using Floats = std::vector<float>;

// FNV-1a over the bits; all NaNs count as one.
class Digest {
 public:
  void add(float x) {
    std::uint32_t bits = 0x7fc00000;
    if (!std::isnan(x)) std::memcpy(&bits, &x, sizeof bits);
    for (int i = 0; i < 4; ++i) value_ = (value_ ^ (bits >> 8 * i & 0xff)) * 0x100000001b3u;
  }
  void add(const Floats& xs) {
    for (const float x : xs) add(x);
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325u;
};

// Vigna's splitmix64.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t word() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // A multiple of 2^-20 from -4 to 4.
  float number() { return static_cast<float>(static_cast<std::int64_t>(word() % 8388609) - 4194304) * 0x1p-20f; }
  Floats numbers(std::int64_t count) {
    Floats xs(static_cast<std::size_t>(count));
    for (float& x : xs) x = number();
    return xs;
  }

 private:
  std::uint64_t state_;
};

Floats odd_numbers() {
  constexpr float inf = std::numeric_limits<float>::infinity();
  return {0.0f,     -0.0f,  inf,       -inf,      std::nanf(""), 0x1p-149f, -0x1p-149f, 0x1.8p-130f, 0x1p-126f,
          0x1p127f, 1e-30f, 88.72284f, -87.5f,    -103.9f,       1e6f,      -3e38f,     9.5f,        -0.0001f};
}

Floats room(std::int64_t count) { return Floats(static_cast<std::size_t>(count)); }

Digest activations() {
  const ActivationKernels& k = activation_kernels();
  Digest digest;
  Random random(1);
  Floats xs = random.numbers(1003);
  for (float x : odd_numbers()) xs.push_back(x);
  const auto size = static_cast<std::int64_t>(xs.size());
  const Floats grad = random.numbers(size), ups = random.numbers(size);
  Floats out = room(size), more = room(size);
  for (const Pointwise f : {k.exp, k.log, k.tanh, k.erf, k.sigmoid, k.gelu_tanh, k.gelu, k.gelu_sigmoid}) {
    f(xs.data(), out.data(), size);
    digest.add(out);
  }
  for (const PointwiseGradient f :
       {k.sigmoid_backward, k.gelu_tanh_backward, k.gelu_backward, k.gelu_sigmoid_backward}) {
    f(grad.data(), xs.data(), out.data(), size);
    digest.add(out);
  }
  k.silu_mul(xs.data(), ups.data(), out.data(), size);
  digest.add(out);
  k.silu_mul_backward(grad.data(), xs.data(), ups.data(), out.data(), more.data(), size);
  digest.add(out);
  digest.add(more);
  return digest;
}

Digest norms() {
  const NormKernels& k = norm_kernels();
  Digest digest;
  Random random(2);
  for (const std::int64_t size : {1, 7, 16, 61, 576}) {
    constexpr std::int64_t rows = 5;
    const Floats xs = random.numbers(rows * size), grads = random.numbers(rows * size), weight = random.numbers(size);
    const Floats bias = random.numbers(size);
    Floats out = room(rows * size), scales = room(rows), means = room(rows), sums = room(size), more = room(size);
    const Rows all{xs.data(), 1, 0, size};
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* x = xs.data() + r * size;
      scales[r] = k.rms_norm_forward(x, weight.data(), out.data() + r * size, size, 1e-6f);
    }
    digest.add(out);
    for (std::int64_t r = 0; r < rows; ++r) {
      k.rms_norm_dx(grads.data() + r * size, xs.data() + r * size, weight.data(), scales[r], out.data() + r * size, size);
    }
    digest.add(out);
    k.rms_norm_dweight(grads.data(), all, scales.data(), sums.data(), rows, size, 0, size);
    digest.add(sums);
    for (std::int64_t r = 0; r < rows; ++r) {
      k.layer_norm_forward(xs.data() + r * size, weight.data(), bias.data(), out.data() + r * size, &means[r], &scales[r],
                           size, 1e-5f);
    }
    digest.add(out);
    for (std::int64_t r = 0; r < rows; ++r) {
      k.layer_norm_dx(grads.data() + r * size, xs.data() + r * size, weight.data(), means[r], scales[r],
                      out.data() + r * size, size);
    }
    digest.add(out);
    k.layer_norm_dweight(grads.data(), xs.data(), means.data(), scales.data(), sums.data(), more.data(), rows, size, 0,
                         size);
    digest.add(sums);
    digest.add(more);
  }
  return digest;
}

Digest ropes() {
  const RopeKernels& k = rope_kernels();
  Digest digest;
  Random random(3);
  constexpr std::int64_t half = 37;
  Floats frequencies = room(half), cosines = room(half), sines = room(half), out = room(2 * half);
  for (std::int64_t i = 0; i < half; ++i) frequencies[i] = 1.0f / static_cast<float>(1 + i * i);
  const Floats x = random.numbers(2 * half);
  for (const float position : {0.0f, 1.0f, 511.0f, 4095.0f, 131071.0f, 1000000.0f}) {
    k.table(position, frequencies.data(), cosines.data(), sines.data(), half);
    digest.add(cosines);
    digest.add(sines);
    for (const bool is_back : {false, true}) {
      k.rotate(x.data(), cosines.data(), sines.data(), out.data(), half, is_back);
      digest.add(out);
    }
  }
  return digest;
}

Digest losses() {
  const SoftmaxKernels& k = softmax_kernels();
  Digest digest;
  Random random(4);
  for (const std::int64_t size : {1, 5, 16, 33, 1000}) {
    const Floats xs = random.numbers(size), grad = random.numbers(size);
    Floats out = room(size), dx = room(size);
    k.softmax(xs.data(), out.data(), size);
    digest.add(out);
    k.softmax_backward(grad.data(), out.data(), dx.data(), size);
    digest.add(dx);
    digest.add(k.cross_entropy(xs.data(), size / 2, dx.data(), size));
    digest.add(dx);
    digest.add(k.sum(xs.data(), size));
  }
  return digest;
}

Digest updates() {
  const OptimKernels& k = optim_kernels();
  Digest digest;
  Random random(5);
  constexpr std::int64_t size = 777;
  Floats w = random.numbers(size), m = room(size), v = room(size), out = room(size);
  const AdamWScalars scalars{0.9999f, 0.1f, 0.95f, 0.05f, 0.25f, 1e-8f, 0.004f};
  for (int step = 0; step < 3; ++step) {
    const Floats grad = random.numbers(size);
    k.adamw(w.data(), m.data(), v.data(), grad.data(), scalars, size);
    k.momentum(m.data(), grad.data(), out.data(), 0.05f, 0.95f, size);
    k.combine(w.data(), grad.data(), w.data(), 0.5f, -1.5f, size);
    k.scale(w.data(), 0.75f, size);
    for (const Floats* xs : {&w, &m, &v, &out}) digest.add(*xs);
    digest.add(k.squared_norm(w.data(), size));
  }
  return digest;
}

Digest products() {
  Digest digest;
  Random random(6);
  const std::int64_t shapes[][3] = {{1, 1, 1}, {1, 100, 67}, {3, 33, 5}, {17, 65, 130}, {70, 97, 301}, {130, 40, 600}};
  for (const auto& [m, n, k] : shapes) {
    const Floats a = random.numbers(m * k), b = random.numbers(n * k), bias = random.numbers(n);
    Floats c = room(m * n), other = room(m * n);
    gemm(m, n, k, {a.data(), k, 1}, {b.data(), 1, k}, c.data(), n, false, bias.data());
    digest.add(c);
    gemm(m, n, k, {a.data(), 1, m}, {b.data(), n, 1}, c.data(), n, true);
    digest.add(c);
    gemm_serial(m, n, k, {a.data(), k, 1}, {b.data(), 1, k}, other.data(), n);
    digest.add(other);
    std::vector<std::uint16_t> halves(static_cast<std::size_t>(n * k));
    for (const Element element : {Element::f32, Element::bf16, Element::f16}) {
      for (auto& half : halves) half = static_cast<std::uint16_t>(random.word() & 0xbfff);  // no NaN in either format
      const void* from = element == Element::f32 ? static_cast<const void*>(b.data()) : halves.data();
      const std::size_t bytes = packed_bytes(n, k, element);
      void* packed = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      pack_weight(from, n, k, element, packed);
      const PackedWeight weight{packed, n, k, element};
      packed_linear(weight, a.data(), k, m, bias.data(), c.data(), n);
      digest.add(c);
      Floats row = room(k);
      packed_row(weight, n / 2, row.data());
      digest.add(row);
      std::free(packed);
    }
  }
  const Floats x = random.numbers(50 * 37);
  const std::vector<std::int64_t> ids(50, 3);
  Floats sums = room(37), table = room(5 * 37);
  row_kernels().sum_rows(x.data(), 50, 37, 37, sums.data());
  row_kernels().add_rows_at(x.data(), ids.data(), 50, 37, 37, table.data(), 37);
  digest.add(sums);
  digest.add(table);
  return digest;
}

Digest quantised_products() {
  Digest digest;
  Random random(7);
  for (const QuantKind kind : {QuantKind::q8_0, QuantKind::q4_0, QuantKind::q4_1}) {
    const std::int64_t bytes = raw_block_bytes(kind);
    for (const auto& [m, n, k] : {std::array<std::int64_t, 3>{1, 33, 96}, {3, 16, 32}, {7, 95, 64}, {13, 64, 256}}) {
      std::vector<std::uint8_t> raw(static_cast<std::size_t>(n * k / kQuantBlock * bytes));
      for (auto& byte : raw) byte = static_cast<std::uint8_t>(random.word());
      for (std::size_t block = 0; block < raw.size(); block += static_cast<std::size_t>(bytes)) {
        raw[block + 1] &= 0xbf;  // scales and minima are finite
        raw[block + 3] = kind == QuantKind::q4_1 ? raw[block + 3] & 0xbf : 0x80;
      }
      QuantWeight weight(kind, n, k);
      weight.set_rows(0, n, raw.data());
      Floats x = random.numbers(m * k), out = room(m * n), row = room(k);
      const Floats bias = random.numbers(n);
      x[0] = 0x1p-149f;
      if (m > 5) x[static_cast<std::size_t>(2 * k)] = std::numeric_limits<float>::infinity();
      QuantizedRows rows;
      rows.quantize(x.data(), k, m, k);
      quant_linear(weight.view(), rows, bias.data(), out.data(), n);
      digest.add(out);
      dequantize_row(weight.view(), n - 1, row.data());
      digest.add(row);
    }
  }
  return digest;
}

// Three sequences, of which one is as long as a window and one ends within a block; token by token and in chunks.
struct PagedCase {
  static constexpr std::int64_t N = 6, K = 2, H = 64, width = 5;
  std::vector<std::int32_t> tables, sequences, positions;
  Floats q, k, v, sinks;

  explicit PagedCase(Random& random) : tables(3 * width) {
    for (std::size_t i = 0; i < tables.size(); ++i) tables[i] = static_cast<std::int32_t>(tables.size() - 1 - i);
    for (const std::int32_t chunk : {1, 70}) {
      for (std::int32_t sequence = 0; sequence < 3; ++sequence) {
        for (std::int32_t place = 0; place < (chunk == 1 ? 1 : 24 * (sequence + 1)); ++place) {
          sequences.push_back(sequence);
          positions.push_back(place);
        }
      }
    }
    q = random.numbers(rows() * N * H);
    k = random.numbers(rows() * K * H);
    v = random.numbers(rows() * K * H);
    sinks = random.numbers(N);
    q[3] = 0x1p-149f;
    v[static_cast<std::size_t>(30 * K * H)] = std::numeric_limits<float>::infinity();
  }

  std::int64_t rows() const { return static_cast<std::int64_t>(positions.size()); }

  // write(row, key, value), then attend(queries) for all rows at once, whole and in a window.
  template <typename Write, typename Attend>
  Digest run(Write write, Attend attend) const {
    Digest digest;
    Floats out = room(rows() * N * H);
    for (std::int64_t row = 0; row < rows(); ++row) write(row, k.data() + row * K * H, v.data() + row * K * H);
    for (const std::int64_t window : {0, 24}) {
      attend(PagedQueries{rows(), sequences.data(), positions.data(), q.data(), N * H, N, 0.125f, window, sinks.data(),
                          out.data()});
      digest.add(out);
    }
    return digest;
  }
};

Digest paged() {
  Random random(8);
  const PagedCase test(random);
  Floats keys = room(15 * test.K * test.H * kPageTokens), values = room(15 * test.K * test.H * kPageTokens);
  const PagedCache cache = {keys.data(), values.data(), test.K, test.H, test.tables.data(), test.width};
  return test.run(
      [&](std::int64_t row, const float* key, const float* value) {
        const auto at = static_cast<std::size_t>(row);
        write_kv(cache, test.sequences[at], test.positions[at], key, value);
      },
      [&](const PagedQueries& queries) { paged_attention(cache, queries); });
}

Digest rounded_pages() {
  Random random(9);
  const PagedCase test(random);
  std::vector<std::uint8_t> pages(static_cast<std::size_t>(15 * test.K * quant_page_bytes(test.H)), 0xff);
  const QuantCache cache = {pages.data(), test.K, test.H, test.tables.data(), test.width};
  return test.run(
      [&](std::int64_t row, const float* key, const float* value) {
        const auto at = static_cast<std::size_t>(row);
        write_quant_kv(cache, test.sequences[at], test.positions[at], key, value);
      },
      [&](const PagedQueries& queries) { quant_paged_attention(cache, queries); });
}

struct Group {
  const char* name;
  Digest (*run)();
};
constexpr Group kGroups[] = {{"activations", activations}, {"norms", norms},     {"ropes", ropes},
                             {"losses", losses},           {"updates", updates}, {"products", products},
                             {"quantised_products", quantised_products},
                             {"paged_attention", paged},   {"rounded_attention", rounded_pages}};

}  // namespace
}  // namespace openbook

int main() {
  using namespace openbook;
  const FloatMode mode;
  for (const Isa isa : available_isas()) {
    set_isa(isa_name(isa));
    for (const int threads : {1, 3}) {
      set_num_threads(threads);
      for (const Group& group : kGroups) {
        std::printf("%s %s %d %016" PRIx64 "\n", group.name, isa_name(isa), threads, group.run().value());
      }
    }
  }
  return 0;
}
