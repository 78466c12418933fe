// Products with quantised weights: int8 by int8, summed in int32, scaled block by block. The same bits everywhere.
//
// The specification. A block is 32 neighbours along k.
//   Weights, as GGUF stores them, d and m half floats, q whole numbers:
//     Q8_0  d * q, q from -128 to 127        Q4_0  d * (q - 8), q from 0 to 15        Q4_1  d * q + m, q from 0 to 15
//   Activations x of a block (llama.cpp's quantize_row_q8_0 and q8_1, AVX2): a = max |x|,
//     inverse = 127 / a, or 0 if that is infinite; q = x * inverse, rounded to nearest, halves to even: -127 to 127;
//     d = half(a / 127); s = half((a / 127) * float(sum of q)), products and quotients rounded to float32 one by one.
//     If an x is infinite or NaN: every q is 0, d and s are NaN, so that every output of the row is NaN.
//   One output, block after block, from +0: sum = the exact integer sum of q_w * q_x (Q4_0: of (q_w - 8) * q_x),
//     acc = fma(float(sum), d_w * d_x, acc);  Q4_1 then: acc = fma(m_w, s_x, acc).  At the end one addition of bias.
//   Scales are taken as they come: infinite or NaN ones give infinities and NaN by the rules of IEEE 754.
//
// The layout, `kQuantLayout`: panels of 32 rows, the last one filled up with zero rows; in a panel one stretch after
// the other for each block: 32 scales, for Q4_1 32 minima, then the codes. Codes of 4 neighbours in k are 4 adjacent
// bytes, those of 16 rows one vector of 64 bytes. Q8_0: vectors j = 0..7 (k from 4 j), each for rows 0-15, then for
// rows 16-31, codes stored as q + 128. Q4_0 and Q4_1: vectors j = 0..3 likewise, low halves k from 4 j, high ones from
// 4 j + 16. So every byte is read once, in order, and every vector lies on a line of the cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace openbook {

enum class QuantKind : std::int32_t { q8_0, q4_0, q4_1 };

constexpr int kQuantLayout = 1;         // changes whenever the bytes of a packed matrix do
constexpr std::int64_t kQuantBlock = 32;  // weights along k that share a scale
constexpr std::int64_t kPanelRows = 32;

// Bytes of one block of one row in GGUF, and of one block of a panel here.
constexpr std::int64_t raw_block_bytes(QuantKind kind) {
  return kind == QuantKind::q8_0 ? 34 : kind == QuantKind::q4_0 ? 18 : 20;
}
constexpr std::int64_t panel_block_bytes(QuantKind kind) {
  return kind == QuantKind::q8_0 ? 1088 : kind == QuantKind::q4_0 ? 576 : 640;
}

// One block of activations.
struct alignas(16) QuantBlock {
  float scale;              // d
  float sum;                // s
  std::int32_t start_q8;    // -128 times the sum of q: what the bytes q + 128 of Q8_0 add too much
  std::int32_t start_q4;    // -8 times the sum of q
  std::int8_t codes[32];    // q
};
static_assert(sizeof(QuantBlock) == 48);

// What a kernel sees of a packed matrix [num_rows, num_columns].
struct QuantView {
  const std::uint8_t* data;
  QuantKind kind;
  std::int64_t num_rows;
  std::int64_t num_columns;

  std::int64_t num_blocks() const { return num_columns / kQuantBlock; }
  std::int64_t num_panels() const { return (num_rows + kPanelRows - 1) / kPanelRows; }
  std::int64_t panel_bytes() const { return num_blocks() * panel_block_bytes(kind); }
  std::int64_t num_bytes() const { return num_panels() * panel_bytes(); }
};

// A packed matrix that owns its bytes, or keeps alive whoever does (a mapped file).
class QuantWeight {
 public:
  // Room for [num_rows, num_columns]; all rows come by `set_rows`. On huge pages where the system allows.
  // Throws std::invalid_argument if there are no rows, or the columns are no multiple of 32.
  QuantWeight(QuantKind kind, std::int64_t num_rows, std::int64_t num_columns);

  // What `view().data` of the same shape held, not copied: 64-byte aligned, alive as long as `owner`.
  QuantWeight(QuantKind kind, std::int64_t num_rows, std::int64_t num_columns, const std::uint8_t* data,
              std::shared_ptr<const void> owner);

  // Rows [first, first + num_rows) from GGUF's bytes; q, k and v, or gate and up, are put below each other so.
  // Only before the matrix is used, and not of one made from another's bytes (std::logic_error).
  void set_rows(std::int64_t first, std::int64_t num_rows, const std::uint8_t* raw);

  const QuantView& view() const { return view_; }

 private:
  QuantView view_;
  std::shared_ptr<const void> owner_;
  std::uint8_t* own_ = nullptr;
};

// The same into memory of the caller, `w.num_bytes()` at `data`; w.data is not read. Rows of the last panel that are
// never given must be zero before.
void pack_quant_rows(const QuantView& w, std::uint8_t* data, std::int64_t first, std::int64_t num_rows,
                     const std::uint8_t* raw);

// Activations [num_rows, num_columns], quantised once for all matrices that read them. Room is kept for reuse.
class QuantizedRows {
 public:
  // x: row m starts at x + m * stride.
  void quantize(const float* x, std::int64_t stride, std::int64_t num_rows, std::int64_t num_columns);

  // Room for so many rows; they are filled by `set_row`, from inside tasks.
  void resize(std::int64_t num_rows, std::int64_t num_columns);
  void set_row(std::int64_t index, const float* x);

  const QuantBlock* row(std::int64_t index) const { return blocks_.get() + index * num_blocks_; }
  std::int64_t num_rows() const { return num_rows_; }
  std::int64_t num_columns() const { return num_blocks_ * kQuantBlock; }

 private:
  struct Free {
    void operator()(QuantBlock* blocks) const;
  };
  std::unique_ptr<QuantBlock[], Free> blocks_;
  std::int64_t capacity_ = 0, num_rows_ = 0, num_blocks_ = 0;
};

// out[m, n] = x[m] . w[n] (+ bias[n]); row m of out starts at out + m * stride. Columns of x and w are as many.
void quant_linear(const QuantView& w, const QuantizedRows& x, const float* bias, float* out, std::int64_t stride);

// The same for the panels [begin, end) alone (outputs 32 begin to 32 end), on the calling thread.
void quant_linear_range(const QuantView& w, const QuantizedRows& x, const float* bias, float* out, std::int64_t stride,
                        std::int64_t begin, std::int64_t end);

// Row `row` as floats [num_columns], as GGUF defines them: d * q, d * (q - 8), or d * q rounded, + m.
void dequantize_row(const QuantView& w, std::int64_t row, float* out);

}  // namespace openbook
