#include "quant.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "quant_kernels.h"
#include "scratch.h"
#include "thread_pool.h"

namespace openbook {
namespace {

QuantView checked_view(QuantKind kind, std::int64_t num_rows, std::int64_t num_columns) {
  if (num_rows < 1 || num_columns < 1 || num_columns % kQuantBlock != 0) {
    throw std::invalid_argument("a quantised matrix has the shape [" + std::to_string(num_rows) + ", " +
                                std::to_string(num_columns) + "], expected rows and a multiple of 32 columns");
  }
  return {nullptr, kind, num_rows, num_columns};
}

// Rows of activations whose blocks stay within a core's own cache while panels pass by.
std::int64_t rows_at_a_time(std::int64_t num_blocks) {
  constexpr std::int64_t kBytes = 384 << 10;
  const std::int64_t rows = kBytes / (num_blocks * static_cast<std::int64_t>(sizeof(QuantBlock)));
  return rows < 48 ? 48 : rows;
}

}  // namespace

QuantWeight::QuantWeight(QuantKind kind, std::int64_t num_rows, std::int64_t num_columns)
    : view_(checked_view(kind, num_rows, num_columns)) {
  std::shared_ptr<void> memory = allocate_matrix(view_.num_bytes());
  own_ = static_cast<std::uint8_t*>(memory.get());
  owner_ = std::move(memory);
  view_.data = own_;
  // The last panel may have rows that are never set: they count as zeros.
  const std::int64_t last = (view_.num_panels() - 1) * view_.panel_bytes();
  std::memset(own_ + last, 0, static_cast<std::size_t>(view_.panel_bytes()));
}

QuantWeight::QuantWeight(QuantKind kind, std::int64_t num_rows, std::int64_t num_columns, const std::uint8_t* data,
                         std::shared_ptr<const void> owner)
    : view_(checked_view(kind, num_rows, num_columns)), owner_(std::move(owner)) {
  if (reinterpret_cast<std::uintptr_t>(data) % 64 != 0) {
    throw std::invalid_argument("the bytes of a packed matrix start within a line of 64 bytes, expected them aligned");
  }
  view_.data = data;
}

void QuantWeight::set_rows(std::int64_t first, std::int64_t num_rows, const std::uint8_t* raw) {
  if (own_ == nullptr) throw std::logic_error("a packed matrix that was given its bytes takes no rows");
  if (first < 0 || num_rows < 0 || first + num_rows > view_.num_rows) {
    throw std::invalid_argument("rows " + std::to_string(first) + " to " + std::to_string(first + num_rows) +
                                " were given to a matrix of " + std::to_string(view_.num_rows));
  }
  pack_quant_rows(view_, own_, first, num_rows, raw);
}

void pack_quant_rows(const QuantView& w, std::uint8_t* data, std::int64_t first, std::int64_t num_rows,
                     const std::uint8_t* raw) {
  const std::int64_t num_blocks = w.num_blocks(), raw_bytes = raw_block_bytes(w.kind);
  const std::int64_t block_bytes = panel_block_bytes(w.kind);
  const bool has_least = w.kind == QuantKind::q4_1;
  const int num_fours = w.kind == QuantKind::q8_0 ? 8 : 4;
  const std::uint32_t flip = w.kind == QuantKind::q8_0 ? 0x80808080u : 0;
  const std::int64_t first_panel = first / kPanelRows;
  const std::int64_t num_panels = num_rows == 0 ? 0 : (first + num_rows - 1) / kPanelRows - first_panel + 1;
  parallel_for(num_panels, [&](std::int64_t index) {
    const std::int64_t panel = first_panel + index;
    const std::int64_t begin = std::max(panel * kPanelRows, first);
    const std::int64_t end = std::min((panel + 1) * kPanelRows, first + num_rows);
    std::uint8_t* out = data + panel * w.panel_bytes();
    for (std::int64_t b = 0; b < num_blocks; ++b, out += block_bytes) {
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t lane = row - panel * kPanelRows;
        const std::uint8_t* in = raw + ((row - first) * num_blocks + b) * raw_bytes;
        std::memcpy(out + 2 * lane, in, 2);
        if (has_least) std::memcpy(out + 64 + 2 * lane, in + 2, 2);
        in += has_least ? 4 : 2;
        std::uint8_t* codes = out + (has_least ? 128 : 64) + 4 * lane;
        for (int j = 0; j < num_fours; ++j) {
          std::uint32_t four;
          std::memcpy(&four, in + 4 * j, 4);
          four ^= flip;
          std::memcpy(codes + 128 * j, &four, 4);
        }
      }
    }
  });
}

void QuantizedRows::Free::operator()(QuantBlock* blocks) const { std::free(blocks); }

void QuantizedRows::resize(std::int64_t num_rows, std::int64_t num_columns) {
  if (num_columns % kQuantBlock != 0) {
    throw std::invalid_argument("activations have " + std::to_string(num_columns) +
                                " columns, expected a multiple of 32");
  }
  num_rows_ = num_rows;
  num_blocks_ = num_columns / kQuantBlock;
  if (num_rows * num_blocks_ <= capacity_) return;
  const std::size_t bytes = (static_cast<std::size_t>(num_rows * num_blocks_) * sizeof(QuantBlock) + 63) / 64 * 64;
  blocks_.reset(static_cast<QuantBlock*>(std::aligned_alloc(64, bytes)));
  if (!blocks_) {
    capacity_ = 0;
    throw std::bad_alloc();
  }
  capacity_ = num_rows * num_blocks_;
}

void QuantizedRows::set_row(std::int64_t index, const float* x) {
  quant_kernels().quantize_row(x, num_blocks_, blocks_.get() + index * num_blocks_);
}

void QuantizedRows::quantize(const float* x, std::int64_t stride, std::int64_t num_rows, std::int64_t num_columns) {
  resize(num_rows, num_columns);
  // A row of a few hundred numbers takes less time than waking a thread does.
  const std::int64_t grain = 1 + 8192 / num_columns;
  parallel_ranges(num_rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) set_row(row, x + row * stride);
  });
}

void quant_linear_range(const QuantView& w, const QuantizedRows& x, const float* bias, float* out, std::int64_t stride,
                        std::int64_t begin, std::int64_t end) {
  quant_kernels().linear(w, x.row(0), x.num_rows(), bias, out, stride, begin, end);
}

void quant_linear(const QuantView& w, const QuantizedRows& x, const float* bias, float* out, std::int64_t stride) {
  const auto kernel = quant_kernels().linear;
  const std::int64_t most = rows_at_a_time(w.num_blocks()), num_steps = (x.num_rows() + most - 1) / most;
  for (std::int64_t step = 0; step < num_steps; ++step) {
    const std::int64_t row = x.num_rows() * step / num_steps, rows = x.num_rows() * (step + 1) / num_steps - row;
    parallel_ranges(w.num_panels(), 1, [&](std::int64_t begin, std::int64_t end) {
      kernel(w, x.row(row), rows, bias, out + row * stride, stride, begin, end);
    }, 2);
  }
}

void dequantize_row(const QuantView& w, std::int64_t row, float* out) { quant_kernels().dequantize_row(w, row, out); }

}  // namespace openbook
