#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "activation_kernels.h"
#include "norm_kernels.h"
#include "paged_attention.h"
#include "rope_kernels.h"
#include "scratch.h"
#include "thread_pool.h"

namespace openbook {
namespace {

// Rows for which waking a thread pays, in what is not a matrix product.
constexpr std::int64_t kRowGrain = 8;
// The same for what adapters add.
constexpr std::int64_t kAdapterGrain = 4;
// Multiply-adds, and bytes of weights, of a step that one thread does in less than half a millisecond.
constexpr std::int64_t kSmallProducts = 20'000'000, kSmallBytes = 5'000'000;

void add(float* x, const float* y, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i) x[i] += y[i];
}

}  // namespace

// Rows of a step that are computed together, and where: row i of x is at x + i * hidden_size, and so on.
struct Decoder::Rows {
  std::int64_t count;
  const std::int32_t *sequences, *positions;
  const std::int32_t* adapters;  // of each row, -1 for none; null: none has one
  float *x, *qkv, *attended, *change;  // change: what is still to be added to x
};

// What a step computes in. Grows to the largest step so far; nothing is allocated in the others.
struct Decoder::Scratch {
  std::vector<float> stream, qkv, attended, change;
  std::vector<std::int32_t> sequences, positions, adapters;
};

namespace {

float* room(std::vector<float>& buffer, std::int64_t size) {
  if (static_cast<std::int64_t>(buffer.size()) < size) buffer.resize(static_cast<std::size_t>(size));
  return buffer.data();
}

// What is read where it was written: of each thread, and so in its own cache.
struct OwnScratch {
  std::vector<float> inputs, up;
  QuantizedRows quantized;
  LowRankScratch low_rank;
};

OwnScratch& own_scratch() {
  thread_local OwnScratch own;
  return own;
}

// Rows that make a chunk worth reading all weights of a layer for, and what heights of tiles divide.
constexpr std::int64_t kChunkRows = 48, kChunkUnit = 12;

// Calls body(begin, end) for parts of the rows. If there are enough for all threads each part is one task, which takes its
// rows through several products: what is between them stays with the thread. Otherwise body shares out its products.
template <typename Body>
void in_chunks(std::int64_t rows, Body body) {
  const std::int64_t threads = num_threads(), rounds = std::min<std::int64_t>(rows / (kChunkRows * threads), 4);
  if (rounds == 0) return body(std::int64_t{0}, rows);
  const std::int64_t num_tasks = rounds * threads, units = (rows + kChunkUnit - 1) / kChunkUnit;
  parallel_for(num_tasks, [&](std::int64_t task) {
    const std::int64_t part = num_tasks - 1 - task;  // the last rows of a prompt see the most: they go first
    body(kChunkUnit * (units * part / num_tasks), std::min(kChunkUnit * (units * (part + 1) / num_tasks), rows));
  });
}

}  // namespace

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

void Decoder::set_low_rank(std::int32_t adapter, const std::string& name, const std::vector<LowRankUpdate>& updates) {
  const auto found = matrices_.find(name);
  if (found == matrices_.end() || !name.starts_with("model.layers.")) {
    throw std::invalid_argument("no layer of this decoder has a matrix " + name);
  }
  if (adapter < 0 || updates.empty()) throw std::invalid_argument("expected an adapter from 0 on, and updates");
  const MatrixSlot& expected = found->second;
  std::int64_t end = 0;
  for (const auto& [first_row, a, b] : updates) {
    const std::int64_t last_end = end;
    end = first_row + b.rows;
    if (first_row < last_end || end > expected.outputs || b.rows < 1 || a.rows < 1 || b.columns != a.rows ||
        a.columns != expected.inputs) {
      throw std::invalid_argument(
          "rows " + std::to_string(first_row) + " to " + std::to_string(end) + " of " + name + " are updated with " +
          std::to_string(a.columns) + " inputs and ranks " + std::to_string(a.rows) + " and " +
          std::to_string(b.columns) + ": expected rows " + std::to_string(last_end) + " to " +
          std::to_string(expected.outputs) + ", " + std::to_string(expected.inputs) + " inputs and one rank");
    }
  }
  auto& of_matrix = expected.matrix->updates;
  if (of_matrix.size() <= static_cast<std::size_t>(adapter)) of_matrix.resize(static_cast<std::size_t>(adapter) + 1);
  of_matrix[static_cast<std::size_t>(adapter)].emplace(updates);
}

void Decoder::remove_adapter(std::int32_t adapter) {
  for (auto& [name, slot] : matrices_) {
    auto& updates = slot.matrix->updates;
    if (adapter >= 0 && static_cast<std::size_t>(adapter) < updates.size()) {
      updates[static_cast<std::size_t>(adapter)].reset();
    }
    while (!updates.empty() && !updates.back()) updates.pop_back();
  }
}

bool Decoder::has_adapter(std::int32_t adapter) const {
  return adapter >= 0 && std::any_of(matrices_.begin(), matrices_.end(), [&](const auto& entry) {
    const auto& updates = entry.second.matrix->updates;
    return static_cast<std::size_t>(adapter) < updates.size() && updates[static_cast<std::size_t>(adapter)];
  });
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

void Decoder::linear(const DecoderMatrix& matrix, const float* x, const Rows& rows, std::int64_t inputs, float* out,
                     std::int64_t outputs) const {
  const float* bias = matrix.bias.empty() ? nullptr : matrix.bias.data();
  if (const auto* packed = std::get_if<PackedWeight>(&matrix.weight)) {
    packed_linear(*packed, x, inputs, rows.count, bias, out, outputs);
  } else {
    QuantizedRows& quantized = own_scratch().quantized;
    quantized.quantize(x, inputs, rows.count, inputs);
    quant_linear(std::get<QuantView>(matrix.weight), quantized, bias, out, outputs);
  }
  adapt(matrix, x, rows, inputs, out, outputs);
}

template <typename Fill>
void Decoder::linear_of(const DecoderMatrix& matrix, const Rows& rows, std::int64_t inputs, Fill fill, float* out,
                        std::int64_t outputs) const {
  const float* bias = matrix.bias.empty() ? nullptr : matrix.bias.data();
  OwnScratch& own = own_scratch();  // of the thread that calls: the others fill rows of it
  if (const auto* packed = std::get_if<PackedWeight>(&matrix.weight)) {
    float* x = room(own.inputs, rows.count * inputs);
    parallel_ranges(rows.count, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) fill(row, x + row * inputs);
    });
    packed_linear(*packed, x, inputs, rows.count, bias, out, outputs);
    adapt(matrix, x, rows, inputs, out, outputs);
    return;
  }
  // Adapters want the rows once more, as they were before they were rounded.
  const bool is_kept = rows.adapters != nullptr && !matrix.updates.empty();
  float* kept = is_kept ? room(own.inputs, rows.count * inputs) : nullptr;
  own.quantized.resize(rows.count, inputs);
  parallel_ranges(rows.count, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    auto* x = static_cast<float*>(scratch(openbook::Scratch::inputs, sizeof(float) * static_cast<std::size_t>(inputs)));
    for (std::int64_t row = begin; row < end; ++row) {
      if (is_kept) x = kept + row * inputs;
      fill(row, x);
      own.quantized.set_row(row, x);
    }
  });
  quant_linear(std::get<QuantView>(matrix.weight), own.quantized, bias, out, outputs);
  if (is_kept) adapt(matrix, kept, rows, inputs, out, outputs);
}

void Decoder::adapt(const DecoderMatrix& matrix, const float* x, const Rows& rows, std::int64_t inputs, float* out,
                    std::int64_t outputs) const {
  const auto num_adapters = static_cast<std::int64_t>(matrix.updates.size());
  if (rows.adapters == nullptr || num_adapters == 0) return;
  parallel_ranges(rows.count, kAdapterGrain, [&](std::int64_t begin, std::int64_t end) {
    LowRankScratch& own = own_scratch().low_rank;
    for (std::int64_t row = begin, next; row < end; row = next) {
      const std::int64_t adapter = rows.adapters[row];
      for (next = row + 1; next < end && rows.adapters[next] == adapter;) ++next;
      if (adapter < 0 || adapter >= num_adapters) continue;
      if (const auto& updates = matrix.updates[static_cast<std::size_t>(adapter)]) {
        updates->add_to(x + row * inputs, next - row, out + row * outputs, outputs, own);
      }
    }
  });
}

void Decoder::norm(const float* x, const std::vector<float>& weight, const std::vector<float>& bias, float* out) const {
  const std::int64_t size = shape_.hidden_size;
  if (shape_.norm == NormKind::rms) {
    norm_kernels().rms_norm_forward(x, weight.data(), out, size, shape_.norm_eps);
  } else {
    float mean, scale;
    norm_kernels().layer_norm_forward(x, weight.data(), bias.data(), out, &mean, &scale, size, shape_.norm_eps);
  }
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

// Computes queries, keys and values, normalises and rotates them, and puts keys and values into their pages.
void Decoder::project(const DecoderStep& step, std::int64_t index, const Rows& rows) const {
  const DecoderShape& s = shape_;
  const Layer& layer = layers_[static_cast<std::size_t>(index)];
  const std::int64_t D = s.hidden_size, H = s.head_dim, N = s.num_heads, K = s.num_kv_heads, width = (N + 2 * K) * H;
  const auto normed = [&](std::int64_t row, float* out) {
    float* x = rows.x + row * D;
    if (index > 0) add(x, rows.change + row * D, D);
    norm(x, layer.attention_norm, layer.attention_norm_bias, out);
  };
  linear_of(layer.qkv, rows, D, normed, rows.qkv, width);
  const NormKernels& norms = norm_kernels();
  const RopeKernels& ropes = rope_kernels();
  parallel_ranges(rows.count, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      float* heads = rows.qkv + row * width;
      const std::int64_t position = rows.positions[row];
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
      const float *key = heads + N * H, *value = heads + (N + K) * H;
      if (step.pages != nullptr) {
        write_quant_kv(quant_cache(step, index), rows.sequences[row], position, key, value);
      } else {
        write_kv(cache(step, index), rows.sequences[row], position, key, value);
      }
    }
  });
}

// The rest of a layer, once the keys and values of all rows are in their pages.
void Decoder::mix(const DecoderStep& step, std::int64_t index, const Rows& rows) const {
  const DecoderShape& s = shape_;
  const Layer& layer = layers_[static_cast<std::size_t>(index)];
  const std::int64_t D = s.hidden_size, I = s.intermediate_size, query_size = s.num_heads * s.head_dim;
  const PagedQueries queries = {rows.count,  rows.sequences,
                                rows.positions, rows.qkv,
                                query_size + 2 * s.num_kv_heads * s.head_dim, s.num_heads,
                                s.scales[static_cast<std::size_t>(index)], s.windows[static_cast<std::size_t>(index)],
                                nullptr, rows.attended};
  if (step.pages != nullptr) {
    quant_paged_attention(quant_cache(step, index), queries);
  } else {
    paged_attention(cache(step, index), queries);
  }
  linear(layer.output, rows.attended, rows, query_size, rows.change, D);

  const std::int64_t up_size = s.mlp == MlpKind::swiglu ? 2 * I : I;
  float* up = room(own_scratch().up, rows.count * up_size);
  const auto normed = [&](std::int64_t row, float* out) {
    float* x = rows.x + row * D;
    add(x, rows.change + row * D, D);
    norm(x, layer.mlp_norm, layer.mlp_norm_bias, out);
  };
  linear_of(layer.up, rows, D, normed, up, up_size);
  const ActivationKernels& kernels = activation_kernels();
  const auto activated = [&](std::int64_t row, float* out) {
    const float* gate = up + row * up_size;
    if (s.mlp == MlpKind::swiglu) {
      kernels.silu_mul(gate, gate + I, out, I);
    } else {
      kernels.gelu_tanh(gate, out, I);
    }
  };
  linear_of(layer.down, rows, I, activated, rows.change, D);
}

PagedCache Decoder::cache(const DecoderStep& step, std::int64_t index) const {
  const std::int64_t layer = index * step.num_blocks * shape_.num_kv_heads * shape_.head_dim * kPageTokens;
  return {step.keys + layer, step.values + layer, shape_.num_kv_heads, shape_.head_dim, step.block_tables,
          step.table_width};
}

QuantCache Decoder::quant_cache(const DecoderStep& step, std::int64_t index) const {
  const std::int64_t bytes = step.num_blocks * shape_.num_kv_heads * quant_page_bytes(shape_.head_dim);
  return {step.pages + index * bytes, shape_.num_kv_heads, shape_.head_dim, step.block_tables, step.table_width};
}

Decoder::Rows Decoder::part(const Rows& rows, std::int64_t begin, std::int64_t end) const {
  const DecoderShape& s = shape_;
  const std::int64_t D = s.hidden_size, query_size = s.num_heads * s.head_dim;
  const std::int64_t width = query_size + 2 * s.num_kv_heads * s.head_dim;
  return {end - begin,
          rows.sequences + begin,
          rows.positions + begin,
          rows.adapters == nullptr ? nullptr : rows.adapters + begin,
          rows.x + begin * D,
          rows.qkv + begin * width,
          rows.attended + begin * query_size,
          rows.change + begin * D};
}

// Of each row the adapter of its sequence; null if no row has one.
const std::int32_t* Decoder::row_adapters(const DecoderStep& step) const {
  if (step.adapters == nullptr) return nullptr;
  std::vector<std::int32_t>& adapters = scratch_->adapters;
  adapters.clear();
  for (std::int64_t row = 0; row < step.num_rows; ++row) adapters.push_back(step.adapters[step.sequences[row]]);
  const bool has_any = std::any_of(adapters.begin(), adapters.end(), [](std::int32_t adapter) { return adapter >= 0; });
  return has_any ? adapters.data() : nullptr;
}

// Keeps the rows that are wanted, and no others.
Decoder::Rows Decoder::wanted(const DecoderStep& step, const Rows& rows) {
  std::vector<std::int32_t>&sequences = scratch_->sequences, &positions = scratch_->positions;
  std::int32_t* adapters = rows.adapters == nullptr ? nullptr : scratch_->adapters.data();
  sequences.clear();
  positions.clear();
  for (std::int64_t row = 0; row < step.num_wanted; ++row) {  // ascending: nothing is overwritten before it is read
    const Rows from = part(rows, step.wanted[row], step.wanted[row] + 1), to = part(rows, row, row + 1);
    sequences.push_back(*from.sequences);
    positions.push_back(*from.positions);
    if (adapters != nullptr) adapters[row] = *from.adapters;
    std::memmove(to.x, from.x, sizeof(float) * static_cast<std::size_t>(shape_.hidden_size));
    std::memmove(to.qkv, from.qkv, sizeof(float) * static_cast<std::size_t>(shape_.num_heads * shape_.head_dim));
  }
  return {step.num_wanted, sequences.data(), positions.data(), adapters, rows.x, rows.qkv, rows.attended, rows.change};
}

void Decoder::step(const DecoderStep& step) {
  const DecoderShape& s = shape_;
  const OneThread one_thread(step.num_rows * num_products_ < kSmallProducts && num_bytes_ < kSmallBytes);
  const std::int64_t M = step.num_rows, D = s.hidden_size, query_size = s.num_heads * s.head_dim;
  Rows rows = {M,
               step.sequences,
               step.positions,
               row_adapters(step),
               room(scratch_->stream, M * D),
               room(scratch_->qkv, M * (query_size + 2 * s.num_kv_heads * s.head_dim)),
               room(scratch_->attended, M * query_size),
               room(scratch_->change, M * D)};
  embed(step, rows.x);
  for (std::int64_t index = 0; index < s.num_layers; ++index) {
    in_chunks(rows.count, [&](std::int64_t begin, std::int64_t end) { project(step, index, part(rows, begin, end)); });
    if (index + 1 == s.num_layers && step.num_wanted < M) rows = wanted(step, rows);
    if (rows.count == 0) return;
    in_chunks(rows.count, [&](std::int64_t begin, std::int64_t end) { mix(step, index, part(rows, begin, end)); });
  }
  const auto normed = [&](std::int64_t row, float* out) {
    add(rows.x + row * D, rows.change + row * D, D);
    norm(rows.x + row * D, final_norm_, final_norm_bias_, out);
  };
  if (step.hidden != nullptr) {
    parallel_ranges(rows.count, kRowGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) normed(row, step.hidden + row * D);
    });
    return;
  }
  linear_of(s.is_tied ? embedding_ : head_, rows, D, normed, step.logits, s.vocab_size);
}

}  // namespace openbook
