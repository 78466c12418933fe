#include "norm_kernels.h"

#include "lanes.h"

namespace openbook::OPENBOOK_ISA {
namespace {

// Columns that are added up at a time: what a row gives is read once, and the sums stay in registers.
constexpr int kColumnVecs = 4;

float rms_norm_forward(const float* x, const float* weight, float* out, std::int64_t size, float eps) {
  Vec squares = splat(0.0f);
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec a = lanes.load(x + i);
    squares = fma(a, a, squares);
  });
  const float mean = sum_lanes(squares) / static_cast<float>(size);
  const float scale = 1.0f / __builtin_sqrtf(mean + eps);
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    lanes.store(out + i, mul(mul(lanes.load(x + i), splat(scale)), lanes.load(weight + i)));
  });
  return scale;
}

void rms_norm_dx(const float* grad, const float* x, const float* weight, float scale, float* dx, std::int64_t size) {
  Vec products = splat(0.0f);
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec h = mul(lanes.load(grad + i), lanes.load(weight + i));
    products = fma(h, mul(lanes.load(x + i), splat(scale)), products);
  });
  const float mean = sum_lanes(products) / static_cast<float>(size);
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec h = mul(lanes.load(grad + i), lanes.load(weight + i));
    const Vec y = mul(lanes.load(x + i), splat(scale));
    lanes.store(dx + i, mul(fma(neg(y), splat(mean), h), splat(scale)));
  });
}

// Calls add_row(row, i, lanes, sums) for every row; `Sums` holds what is added up for 16 columns from column i.
template <typename Sums, typename AddRow, typename Store>
OPENBOOK_INLINE void add_columns(std::int64_t num_rows, std::int64_t begin, std::int64_t end, AddRow add_row,
                                 Store store_sums) {
  std::int64_t i = begin;
  for (; i + kColumnVecs * kLanes <= end; i += kColumnVecs * kLanes) {
    Sums sums[kColumnVecs];
    for (std::int64_t row = 0; row < num_rows; ++row) {
      for (int v = 0; v < kColumnVecs; ++v) add_row(row, i + v * kLanes, AllLanes{}, sums[v]);
    }
    for (int v = 0; v < kColumnVecs; ++v) store_sums(i + v * kLanes, AllLanes{}, sums[v]);
  }
  for (; i < end; i += kLanes) {
    const FirstLanes lanes{static_cast<int>(end - i < kLanes ? end - i : kLanes)};
    Sums sums;
    if (lanes.n == kLanes) {
      for (std::int64_t row = 0; row < num_rows; ++row) add_row(row, i, AllLanes{}, sums);
      store_sums(i, AllLanes{}, sums);
    } else {
      for (std::int64_t row = 0; row < num_rows; ++row) add_row(row, i, lanes, sums);
      store_sums(i, lanes, sums);
    }
  }
}

void rms_norm_dweight(const float* grad, Rows x, const float* scales, float* dweight, std::int64_t num_rows,
                      std::int64_t size, std::int64_t begin, std::int64_t end) {
  struct Sums {
    Vec weight = splat(0.0f);
  };
  add_columns<Sums>(
      num_rows, begin, end,
      [&](std::int64_t row, std::int64_t i, auto lanes, Sums& sums) {
        const Vec y = mul(lanes.load(x[row] + i), splat(scales[row]));
        sums.weight = fma(lanes.load(grad + row * size + i), y, sums.weight);
      },
      [&](std::int64_t i, auto lanes, const Sums& sums) { lanes.store(dweight + i, sums.weight); });
}

void layer_norm_forward(const float* x, const float* weight, const float* bias, float* out, float* mean_out,
                        float* scale_out, std::int64_t size, float eps) {
  Vec sum = splat(0.0f);
  for_lanes(size, [&](std::int64_t i, auto lanes) { sum = add(sum, lanes.load(x + i)); });
  const float mean = sum_lanes(sum) / static_cast<float>(size);
  Vec squares = splat(0.0f);
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec a = sub(lanes.load_or(x + i, mean), splat(mean));
    squares = fma(a, a, squares);
  });
  const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(size) + eps);
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec y = mul(sub(lanes.load(x + i), splat(mean)), splat(scale));
    const Vec w = lanes.load(weight + i);
    lanes.store(out + i, bias == nullptr ? mul(y, w) : fma(y, w, lanes.load(bias + i)));
  });
  *mean_out = mean;
  *scale_out = scale;
}

void layer_norm_dx(const float* grad, const float* x, const float* weight, float mean, float scale, float* dx,
                   std::int64_t size) {
  Vec sums = splat(0.0f), products = splat(0.0f);
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec h = mul(lanes.load(grad + i), lanes.load(weight + i));
    const Vec y = mul(sub(lanes.load_or(x + i, mean), splat(mean)), splat(scale));
    sums = add(sums, h);
    products = fma(h, y, products);
  });
  const float a = sum_lanes(sums) / static_cast<float>(size), b = sum_lanes(products) / static_cast<float>(size);
  for_lanes(size, [&](std::int64_t i, auto lanes) {
    const Vec h = mul(lanes.load(grad + i), lanes.load(weight + i));
    const Vec y = mul(sub(lanes.load(x + i), splat(mean)), splat(scale));
    lanes.store(dx + i, mul(fma(neg(y), splat(b), sub(h, splat(a))), splat(scale)));
  });
}

void layer_norm_dweight(const float* grad, const float* x, const float* means, const float* scales, float* dweight,
                        float* dbias, std::int64_t num_rows, std::int64_t size, std::int64_t begin, std::int64_t end) {
  struct Sums {
    Vec weight = splat(0.0f), bias = splat(0.0f);
  };
  add_columns<Sums>(
      num_rows, begin, end,
      [&](std::int64_t row, std::int64_t i, auto lanes, Sums& sums) {
        const Vec g = lanes.load(grad + row * size + i);
        const Vec y = mul(sub(lanes.load(x + row * size + i), splat(means[row])), splat(scales[row]));
        sums.weight = fma(g, y, sums.weight);
        sums.bias = add(sums.bias, g);
      },
      [&](std::int64_t i, auto lanes, const Sums& sums) {
        lanes.store(dweight + i, sums.weight);
        if (dbias != nullptr) lanes.store(dbias + i, sums.bias);
      });
}

}  // namespace

extern const NormKernels norm_kernels = {rms_norm_forward,   rms_norm_dx,   rms_norm_dweight,
                                         layer_norm_forward, layer_norm_dx, layer_norm_dweight};

}  // namespace openbook::OPENBOOK_ISA
