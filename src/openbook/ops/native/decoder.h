// A whole dense decoder (Llama, Mistral, Qwen 2 and 3, GPT-2) for inference: token ids in, logits or hidden states out.
//
// It computes what the models in openbook/models compute through the exact Ops, to the bit: the same kernels in the same
// order, without Python between them.
//
// Each sequence may have an adapter, low-rank updates of the layers' matrices. They are added to a product, its bias
// included, row by row in the order that low_rank.h says: what other rows have, and how rows are cut into chunks and shared
// out to threads, shows in no bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "gemm.h"
#include "low_rank.h"
#include "paged_attention.h"
#include "quant.h"
#include "quant_attention.h"

namespace openbook {

enum class NormKind { rms, layer };
enum class MlpKind { swiglu, gelu_tanh };

struct DecoderShape {
  std::int64_t hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, vocab_size;
  std::int64_t num_positions;         // rows of the table of position vectors; 0: positions are rotations
  NormKind norm;                      // `layer` also has a bias in every matrix (GPT-2)
  MlpKind mlp;
  float norm_eps;
  bool has_qkv_bias;
  bool has_qk_norm;                   // queries and keys are normalised per head before they are rotated
  bool is_tied;                       // the embedding is also the output matrix
  std::vector<float> scales;          // [num_layers], on q k^T
  std::vector<std::int64_t> windows;  // [num_layers], latest tokens that are looked at, the present one included; 0: all
};

// One matrix [outputs, inputs], float or quantised, its bias if it has one, and what adapters add to it.
struct DecoderMatrix {
  std::variant<std::monostate, PackedWeight, QuantView> weight;
  std::vector<float> bias;
  std::vector<std::optional<LowRank>> updates;  // [adapter], as far as one has any
};

// Everything of a step that is not weights. All indices are checked by the binding.
struct DecoderStep {
  std::int64_t num_rows;               // M: tokens of all sequences together
  const std::int32_t* token_ids;       // [M]
  const std::int32_t* positions;       // [M]; those of a sequence stand in ascending order
  const std::int32_t* sequences;       // [M]: rows of block_tables
  const std::int32_t* block_tables;    // [num_sequences, table_width]: pages of each sequence in order
  std::int64_t table_width;
  std::uint8_t* pages;                 // [num_layers, num_blocks, num_kv_heads, quant_page_bytes], or null, then:
  float* keys;                         // [num_layers, num_blocks, num_kv_heads, head_dim, kPageTokens]
  float* values;                       // [num_layers, num_blocks, num_kv_heads, kPageTokens, head_dim]
  std::int64_t num_blocks;
  const float* cosines;                // [positions, head_dim / 2]
  const float* sines;
  std::int64_t num_wanted;             // R
  const std::int32_t* wanted;          // [R]: the rows that are asked for, ascending
  float* logits;                       // [R, vocab_size], or null, then:
  float* hidden;                       // [R, hidden_size]: the normalised rows that logits are made from
  const std::int32_t* adapters;        // [num_sequences]: the adapter of each, -1 for none; null: none has one
};

class Decoder {
 public:
  explicit Decoder(DecoderShape shape);
  ~Decoder();

  const DecoderShape& shape() const { return shape_; }

  // `name` as the parameter is called in openbook/models. Vectors are copied, matrices must outlive the decoder.
  // Throw std::invalid_argument if there is no such name, or the size is not the one expected.
  void set_vector(const std::string& name, const float* data, std::int64_t size);
  void set_matrix(const std::string& name, PackedWeight weight);
  void set_matrix(const std::string& name, QuantView weight);

  // What adapter number `adapter`, from 0, adds to the matrix `name`; copied. Not while a step runs.
  // Throws std::invalid_argument if no layer has such a matrix, updates do not fit it or overlap, or there are none.
  void set_low_rank(std::int32_t adapter, const std::string& name, const std::vector<LowRankUpdate>& updates);

  // Forgets all updates by an adapter and gives their memory back. Not while a step runs.
  void remove_adapter(std::int32_t adapter);

  // Whether it updates anything.
  bool has_adapter(std::int32_t adapter) const;

  // Names that were not set; a step needs them all.
  std::vector<std::string> missing() const;

  void step(const DecoderStep& step);

 private:
  struct Layer {
    std::vector<float> attention_norm, attention_norm_bias, mlp_norm, mlp_norm_bias, query_norm, key_norm;
    DecoderMatrix qkv, output, up, down;  // up: gate and up together for swiglu
  };
  struct VectorSlot {
    std::vector<float>* vector;
    std::int64_t size;
  };
  struct MatrixSlot {
    DecoderMatrix* matrix;
    std::int64_t outputs, inputs;
  };
  struct Rows;
  struct Scratch;

  void declare(const std::string& name, std::vector<float>* vector, std::int64_t size);
  void declare(const std::string& name, DecoderMatrix* matrix, std::int64_t outputs, std::int64_t inputs, bool has_bias);
  void declare_norm(const std::string& name, std::vector<float>* weight, std::vector<float>* bias);
  MatrixSlot& slot(const std::string& name, std::int64_t outputs, std::int64_t inputs);

  PagedCache cache(const DecoderStep& step, std::int64_t index) const;
  QuantCache quant_cache(const DecoderStep& step, std::int64_t index) const;
  const std::int32_t* row_adapters(const DecoderStep& step) const;
  Rows part(const Rows& rows, std::int64_t begin, std::int64_t end) const;
  Rows wanted(const DecoderStep& step, const Rows& rows);

  void embed(const DecoderStep& step, float* x) const;
  void project(const DecoderStep& step, std::int64_t index, const Rows& rows) const;
  void mix(const DecoderStep& step, std::int64_t index, const Rows& rows) const;
  void norm(const float* x, const std::vector<float>& weight, const std::vector<float>& bias, float* out) const;
  void linear(const DecoderMatrix& matrix, const float* x, const Rows& rows, std::int64_t inputs, float* out,
              std::int64_t outputs) const;
  // Of rows that fill(row, out) computes one by one, where they are read next.
  template <typename Fill>
  void linear_of(const DecoderMatrix& matrix, const Rows& rows, std::int64_t inputs, Fill fill, float* out,
                 std::int64_t outputs) const;
  // Adds what adapters make of the rows that have one to their products `out`.
  void adapt(const DecoderMatrix& matrix, const float* x, const Rows& rows, std::int64_t inputs, float* out,
             std::int64_t outputs) const;

  DecoderShape shape_;
  std::vector<Layer> layers_;
  std::vector<float> final_norm_, final_norm_bias_;
  DecoderMatrix embedding_, position_embedding_, head_;
  std::unordered_map<std::string, VectorSlot> vectors_;
  std::unordered_map<std::string, MatrixSlot> matrices_;
  std::vector<std::string> names_;  // in the order of their declaration
  std::int64_t num_products_ = 0, num_bytes_ = 0;  // of all matrices: multiply-adds a token, and memory
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace openbook
