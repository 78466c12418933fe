#include "low_rank.h"

#include "scratch.h"

namespace openbook {
namespace {

float* room(std::vector<float>& buffer, std::int64_t size) {
  if (static_cast<std::int64_t>(buffer.size()) < size) buffer.resize(static_cast<std::size_t>(size));
  return buffer.data();
}

}  // namespace

// Memory of its own, not a share of a chunk: adapters come and go one by one.
LowRank::LowRank(std::int64_t first_row, const float* a, const float* b, std::int64_t rank, std::int64_t inputs,
                 std::int64_t outputs)
    : first_row_(first_row) {
  const std::size_t a_bytes = packed_bytes(rank, inputs, Element::f32);
  memory_.reset(allocate_pages(a_bytes + packed_bytes(outputs, rank, Element::f32)), free_pages);
  char* const at = static_cast<char*>(memory_.get());
  pack_weight(a, rank, inputs, Element::f32, at);
  pack_weight(b, outputs, rank, Element::f32, at + a_bytes);
  a_ = {at, rank, inputs, Element::f32};
  b_ = {at + a_bytes, outputs, rank, Element::f32};
}

void LowRank::add_to(const float* x, std::int64_t num_rows, float* out, std::int64_t out_stride,
                     LowRankScratch& scratch) const {
  float* low = room(scratch.low, num_rows * a_.n);
  float* high = room(scratch.high, num_rows * b_.n);
  packed_linear(a_, x, a_.k, num_rows, nullptr, low, a_.n);
  packed_linear(b_, low, b_.k, num_rows, nullptr, high, b_.n);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    float* to = out + row * out_stride + first_row_;
    for (std::int64_t i = 0; i < b_.n; ++i) to[i] += high[row * b_.n + i];
  }
}

}  // namespace openbook
