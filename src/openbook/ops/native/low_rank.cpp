#include "low_rank.h"

#include "scratch.h"

namespace openbook {
namespace {

float* room(std::vector<float>& buffer, std::int64_t size) {
  if (static_cast<std::int64_t>(buffer.size()) < size) buffer.resize(static_cast<std::size_t>(size));
  return buffer.data();
}

}  // namespace

LowRank::LowRank(const std::vector<LowRankUpdate>& updates) {
  std::vector<float> stacked;
  std::int64_t num_low = 0;
  for (const LowRankUpdate& update : updates) {
    stacked.insert(stacked.end(), update.a.data, update.a.data + update.a.rows * update.a.columns);
    parts_.push_back({update.first_row, num_low, pack(update.b)});
    num_low += update.a.rows;
  }
  a_ = pack({stacked.data(), num_low, updates.front().a.columns});
}

PackedWeight LowRank::pack(const FloatMatrix& matrix) {
  const std::size_t bytes = packed_bytes(matrix.rows, matrix.columns, Element::f32);
  memory_.push_back(allocate_matrix(static_cast<std::int64_t>(bytes)));
  pack_weight(matrix.data, matrix.rows, matrix.columns, Element::f32, memory_.back().get());
  return {memory_.back().get(), matrix.rows, matrix.columns, Element::f32};
}

void LowRank::add_to(const float* x, std::int64_t num_rows, float* out, std::int64_t out_stride,
                     LowRankScratch& scratch) const {
  float* low = room(scratch.low, num_rows * a_.n);
  packed_linear(a_, x, a_.k, num_rows, nullptr, low, a_.n);
  for (const Part& part : parts_) {
    const std::int64_t outputs = part.b.n;
    float* high = room(scratch.high, num_rows * outputs);
    packed_linear(part.b, low + part.first_low, a_.n, num_rows, nullptr, high, outputs);
    for (std::int64_t row = 0; row < num_rows; ++row) {
      float* to = out + row * out_stride + part.first_row;
      for (std::int64_t i = 0; i < outputs; ++i) to[i] += high[row * outputs + i];
    }
  }
}

}  // namespace openbook
