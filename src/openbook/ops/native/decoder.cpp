#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "activation_kernels.h"
#include "norm_kernels.h"
#include "paged_attention.h"
#include "rope_kernels.h"
#include "thread_pool.h"

namespace openbook {
namespace {

// Rows for which waking a thread pays, in what is not a matrix product.
constexpr std::int64_t kRowGrain = 8;
// Multiply-adds, and bytes of weights, of a step that one thread does in less than half a millisecond.
constexpr std::int64_t kSmallProducts = 20'000'000, kSmallBytes = 5'000'000;

void add(float* x, const float* y, std::int64_t size) {
  parallel_ranges(size, 1 << 14, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) x[i] += y[i];
  });
}

}  // namespace

// What a step computes in. Grows to the largest step so far; nothing is allocated in the others.
struct Decoder::Scratch {
  std::vector<float> stream, normed, qkv, attended, out, up, gated;
  std::vector<std::int32_t> sequences, positions;
  QuantizedRows quantized;

  static float* room(std::vector<float>& buffer, std::int64_t size) {
    if (static_cast<std::int64_t>(buffer.size()) < size) buffer.resize(static_cast<std::size_t>(size));
    return buffer.data();
  }
};

Decoder::~Decoder() = default;

Decoder::Decoder(DecoderShape shape) : shape_(std::move(shape)), scratch_(std::make_unique<Scratch>()) {
  const DecoderShape& s = shape_;
  const bool is_gpt2 = s.norm == NormKind::layer;
  const std::int64_t query_size = s.num_heads * s.head_dim, key_size = s.num_kv_heads * s.head_dim;
  const std::string attention_norm = is_gpt2 ? "attn_norm" : "input_layernorm";
  const std::string mlp_norm = is_gpt2 ? "mlp_norm" : "post_attention_layernorm";
  layers_.resize(static_cast<std::size_t>(s.num_layers));
  declare("model.embed_tokens", &embedding_, s.vocab_size, s.hidden_size, false);
  if (s.num_positions != 0) declare("model.embed_positions", &position_embedding_, s.num_positions, s.hidden_size, false);
  for (std::int64_t index = 0; index < s.num_layers; ++index) {
    Layer& layer = layers_[static_cast<std::size_t>(index)];
    const std::string prefix = "model.layers." + std::to_string(index) + ".";
    declare_norm(prefix + attention_norm, &layer.attention_norm, &layer.attention_norm_bias);
    declare(prefix + "self_attn.qkv_proj", &layer.qkv, query_size + 2 * key_size, s.hidden_size, s.has_qkv_bias);
    if (s.has_qk_norm) {
      declare(prefix + "self_attn.q_norm.weight", &layer.query_norm, s.head_dim);
      declare(prefix + "self_attn.k_norm.weight", &layer.key_norm, s.head_dim);
    }
    declare(prefix + "self_attn.o_proj", &layer.output, s.hidden_size, query_size, is_gpt2);
    declare_norm(prefix + mlp_norm, &layer.mlp_norm, &layer.mlp_norm_bias);
    if (s.mlp == MlpKind::swiglu) {
      declare(prefix + "mlp.gate_up_proj", &layer.up, 2 * s.intermediate_size, s.hidden_size, false);
    } else {
      declare(prefix + "mlp.up_proj", &layer.up, s.intermediate_size, s.hidden_size, is_gpt2);
    }
    declare(prefix + "mlp.down_proj", &layer.down, s.hidden_size, s.intermediate_size, is_gpt2);
  }
  declare_norm("model.norm", &final_norm_, &final_norm_bias_);
  if (!s.is_tied) declare("lm_head", &head_, s.vocab_size, s.hidden_size, false);
}

void Decoder::declare(const std::string& name, std::vector<float>* vector, std::int64_t size) {
  vectors_.emplace(name, VectorSlot{vector, size});
  names_.push_back(name);
}

void Decoder::declare_norm(const std::string& name, std::vector<float>* weight, std::vector<float>* bias) {
  declare(name + ".weight", weight, shape_.hidden_size);
  if (shape_.norm == NormKind::layer) declare(name + ".bias", bias, shape_.hidden_size);
}

void Decoder::declare(const std::string& name, DecoderMatrix* matrix, std::int64_t outputs, std::int64_t inputs,
                      bool has_bias) {
  matrices_.emplace(name + ".weight", MatrixSlot{matrix, outputs, inputs});
  names_.push_back(name + ".weight");
  if (has_bias) declare(name + ".bias", &matrix->bias, outputs);
}

void Decoder::set_vector(const std::string& name, const float* data, std::int64_t size) {
  const auto slot = vectors_.find(name);
  if (slot == vectors_.end()) throw std::invalid_argument("there is no vector " + name + " in this decoder");
  if (slot->second.size != size) {
    throw std::invalid_argument("the vector " + name + " has " + std::to_string(size) + " numbers, expected " +
                                std::to_string(slot->second.size));
  }
  slot->second.vector->assign(data, data + size);
}

Decoder::MatrixSlot& Decoder::slot(const std::string& name, std::int64_t outputs, std::int64_t inputs) {
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) throw std::invalid_argument("there is no matrix " + name + " in this decoder");
  MatrixSlot& expected = found->second;
  if (outputs != expected.outputs || inputs != expected.inputs) {
    throw std::invalid_argument("the matrix " + name + " is " + std::to_string(outputs) + " x " +
                                std::to_string(inputs) + ", expected " + std::to_string(expected.outputs) + " x " +
                                std::to_string(expected.inputs));
  }
  return expected;
}

void Decoder::set_matrix(const std::string& name, PackedWeight weight) {
  slot(name, weight.n, weight.k).matrix->weight = weight;
  num_products_ += weight.n * weight.k;
  num_bytes_ += static_cast<std::int64_t>(packed_bytes(weight.n, weight.k, weight.element));
}

void Decoder::set_matrix(const std::string& name, QuantView weight) {
  slot(name, weight.num_rows, weight.num_columns).matrix->weight = weight;
  num_products_ += weight.num_rows * weight.num_columns;
  num_bytes_ += weight.num_bytes();
}

std::vector<std::string> Decoder::missing() const {
  std::vector<std::string> names;
  for (const std::string& name : names_) {
    const auto matrix = matrices_.find(name);
    const bool is_there = matrix != matrices_.end()
                              ? !std::holds_alternative<std::monostate>(matrix->second.matrix->weight)
                              : !vectors_.at(name).vector->empty();
    if (!is_there) names.push_back(name);
  }
  return names;
}

void Decoder::linear(const DecoderMatrix& matrix, const float* x, std::int64_t rows, std::int64_t inputs, float* out,
                     std::int64_t outputs) {
  const float* bias = matrix.bias.empty() ? nullptr : matrix.bias.data();
  if (const auto* packed = std::get_if<PackedWeight>(&matrix.weight)) {
    packed_linear(*packed, x, inputs, rows, bias, out, outputs);
    return;
  }
  scratch_->quantized.quantize(x, inputs, rows, inputs);
  quant_linear(std::get<QuantView>(matrix.weight), scratch_->quantized, bias, out, outputs);
}

void Decoder::norm(const float* x, const std::vector<float>& weight, const std::vector<float>& bias, float* out,
                   std::int64_t rows) const {
  const std::int64_t size = shape_.hidden_size;
  const NormKernels& kernels = norm_kernels();
  parallel_ranges(rows, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const float* from = x + row * size;
      float* to = out + row * size;
      if (shape_.norm == NormKind::rms) {
        kernels.rms_norm_forward(from, weight.data(), to, size, shape_.norm_eps);
      } else {
        float mean, scale;
        kernels.layer_norm_forward(from, weight.data(), bias.data(), to, &mean, &scale, size, shape_.norm_eps);
      }
    }
  });
}

void Decoder::embed(const DecoderStep& step, float* x) const {
  const std::int64_t size = shape_.hidden_size;
  const auto read = [](const DecoderMatrix& matrix, std::int64_t row, float* out) {
    if (const auto* packed = std::get_if<PackedWeight>(&matrix.weight)) {
      packed_row(*packed, row, out);
    } else {
      dequantize_row(std::get<QuantView>(matrix.weight), row, out);
    }
  };
  parallel_ranges(step.num_rows, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> place(static_cast<std::size_t>(shape_.num_positions != 0 ? size : 0));
    for (std::int64_t row = begin; row < end; ++row) {
      read(embedding_, step.token_ids[row], x + row * size);
      if (shape_.num_positions != 0) {
        read(position_embedding_, step.positions[row], place.data());
        for (std::int64_t i = 0; i < size; ++i) x[row * size + i] += place[static_cast<std::size_t>(i)];
      }
    }
  });
}

// Normalises and rotates queries and keys, and puts keys and values into their pages.
void Decoder::place(const DecoderStep& step, const Layer& layer, std::int64_t index, float* qkv) const {
  const DecoderShape& s = shape_;
  const std::int64_t H = s.head_dim, N = s.num_heads, K = s.num_kv_heads, width = (N + 2 * K) * H;
  const NormKernels& norms = norm_kernels();
  const RopeKernels& ropes = rope_kernels();
  const PagedCache pages = cache(step, index);
  parallel_ranges(step.num_rows, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      float* heads = qkv + row * width;
      const std::int64_t position = step.positions[row];
      for (std::int64_t head = 0; head < N + K; ++head) {
        float* x = heads + head * H;
        if (s.has_qk_norm) {
          const std::vector<float>& weight = head < N ? layer.query_norm : layer.key_norm;
          norms.rms_norm_forward(x, weight.data(), x, H, s.norm_eps);
        }
        if (s.num_positions == 0) {
          ropes.rotate(x, step.cosines + position * (H / 2), step.sines + position * (H / 2), x, H / 2, false);
        }
      }
      write_kv(pages, step.sequences[row], position, heads + N * H, heads + (N + K) * H);
    }
  });
}

void Decoder::attend(const DecoderStep& step, std::int64_t index, const float* qkv, const std::int32_t* wanted,
                     std::int64_t num_rows, float* out) {
  const DecoderShape& s = shape_;
  Scratch& scratch = *scratch_;
  const std::int32_t *sequences = step.sequences, *positions = step.positions;
  if (wanted != nullptr) {  // those rows of qkv alone
    scratch.sequences.resize(static_cast<std::size_t>(num_rows));
    scratch.positions.resize(static_cast<std::size_t>(num_rows));
    for (std::int64_t row = 0; row < num_rows; ++row) {
      scratch.sequences[static_cast<std::size_t>(row)] = sequences[wanted[row]];
      scratch.positions[static_cast<std::size_t>(row)] = positions[wanted[row]];
    }
    sequences = scratch.sequences.data();
    positions = scratch.positions.data();
  }
  paged_attention(cache(step, index), {num_rows, sequences, positions, qkv,
                                       (s.num_heads + 2 * s.num_kv_heads) * s.head_dim, s.num_heads,
                                       s.scales[static_cast<std::size_t>(index)],
                                       s.windows[static_cast<std::size_t>(index)], nullptr, out});
}

PagedCache Decoder::cache(const DecoderStep& step, std::int64_t index) const {
  const std::int64_t layer = index * step.num_blocks * shape_.num_kv_heads * shape_.head_dim * kPageTokens;
  return {step.keys + layer, step.values + layer, shape_.num_kv_heads, shape_.head_dim, step.block_tables,
          step.table_width};
}

void Decoder::feed_forward(const Layer& layer, float* x, std::int64_t rows) {
  const DecoderShape& s = shape_;
  Scratch& scratch = *scratch_;
  float* normed = Scratch::room(scratch.normed, rows * s.hidden_size);
  float* out = Scratch::room(scratch.out, rows * s.hidden_size);
  norm(x, layer.mlp_norm, layer.mlp_norm_bias, normed, rows);
  const std::int64_t up_size = s.mlp == MlpKind::swiglu ? 2 * s.intermediate_size : s.intermediate_size;
  float* up = Scratch::room(scratch.up, rows * up_size);
  float* gated = Scratch::room(scratch.gated, rows * s.intermediate_size);
  linear(layer.up, normed, rows, s.hidden_size, up, up_size);
  const ActivationKernels& kernels = activation_kernels();
  parallel_ranges(rows, 2, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      if (s.mlp == MlpKind::swiglu) {
        const float* gate = up + row * up_size;
        kernels.silu_mul(gate, gate + s.intermediate_size, gated + row * s.intermediate_size, s.intermediate_size);
      } else {
        kernels.gelu_tanh(up + row * up_size, gated + row * s.intermediate_size, s.intermediate_size);
      }
    }
  });
  linear(layer.down, gated, rows, s.intermediate_size, out, s.hidden_size);
  add(x, out, rows * s.hidden_size);
}

void Decoder::step(const DecoderStep& step) {
  const DecoderShape& s = shape_;
  const OneThread one_thread(step.num_rows * num_products_ < kSmallProducts && num_bytes_ < kSmallBytes);
  Scratch& scratch = *scratch_;
  const std::int64_t rows = step.num_rows, D = s.hidden_size, query_size = s.num_heads * s.head_dim;
  const std::int64_t width = query_size + 2 * s.num_kv_heads * s.head_dim;
  float* x = Scratch::room(scratch.stream, rows * D);
  float* normed = Scratch::room(scratch.normed, rows * D);
  float* qkv = Scratch::room(scratch.qkv, rows * width);
  float* attended = Scratch::room(scratch.attended, rows * query_size);
  float* out = Scratch::room(scratch.out, rows * D);
  embed(step, x);
  std::int64_t alive = rows;  // rows that are still computed: in the last layer only those whose logits are wanted
  for (std::int64_t index = 0; index < s.num_layers; ++index) {
    const Layer& layer = layers_[static_cast<std::size_t>(index)];
    norm(x, layer.attention_norm, layer.attention_norm_bias, normed, rows);
    linear(layer.qkv, normed, rows, D, qkv, width);
    place(step, layer, index, qkv);
    if (index + 1 == s.num_layers && step.num_wanted < rows) {
      alive = step.num_wanted;
      for (std::int64_t row = 0; row < alive; ++row) {  // ascending: nothing is overwritten before it is read
        std::memmove(x + row * D, x + step.wanted[row] * D, sizeof(float) * static_cast<std::size_t>(D));
        std::memmove(qkv + row * width, qkv + step.wanted[row] * width, sizeof(float) * static_cast<std::size_t>(width));
      }
      if (alive == 0) return;
      attend(step, index, qkv, step.wanted, alive, attended);
    } else {
      attend(step, index, qkv, nullptr, rows, attended);
    }
    linear(layer.output, attended, alive, query_size, out, D);
    add(x, out, alive * D);
    feed_forward(layer, x, alive);
  }
  norm(x, final_norm_, final_norm_bias_, normed, alive);
  linear(s.is_tied ? embedding_ : head_, normed, alive, D, step.logits, s.vocab_size);
}

}  // namespace openbook
