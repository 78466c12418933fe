// Exact attention over keys and values given as arrays, forward and backward. Which bits come out, for one query and head:
//
//   score[s] = (sum over d ascending of fma(q[d], k[s, d], acc)) * scale         acc from +0, as everywhere below
//   m = the largest visible score, or the sink if that is larger
//   e[s] = exp(score[s] - m)
//   denominator = e added up in 16 lanes, key by key ascending, then `sum_lanes`; then + exp(sink - m) if there is a sink.
//     The lane of a key is its position inside its document modulo 16.
//   inverse = 1 / denominator
//   out[d] = (sum over s ascending of fma(e[s], v[s, d], acc)) * inverse + 0.0f
//
// The + 0.0f makes a negative zero positive, so that products with e = 0 could be added or left out. A query that sees no
// key gets zeros. With do the gradient of out:
//
//   p[s] = e[s] * inverse
//   dp[s] = sum over d ascending of fma(do[d], v[s, d], acc)
//   D = fma(do[d], out[d], lane) in 16 lanes, d modulo 16, ascending, then `sum_lanes`
//   ds[s] = p[s] * (dp[s] - D)
//   dq[d] = (sum over s ascending of fma(ds[s], k[s, d], acc)) * scale + 0.0f
//   dk[s, d] = (sum over queries t and heads of fma(ds[t, s], q[t, d], acc)) * scale + 0.0f
//   dv[s, d] = (sum over queries t and heads of fma(p[t, s], do[t, d], acc)) + 0.0f
//     Queries ascend; for each of them the heads that share this key ascend.
//   dsink = -(the sum of exp(sink - m) * inverse * D over batch and queries: 16 lanes by b * T + t modulo 16, `sum_lanes`)
//
// Every sum has visible terms only: a NaN in a hidden key or value goes nowhere.
//
// Shapes: B rows of a batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H and Hv features of a head.
#pragma once

#include <cstdint>

namespace openbook {

// A float32 array [B, tokens, heads, features], features contiguous; strides in floats.
struct ConstHeads {
  const float* data;
  std::int64_t batch_stride, token_stride, head_stride;

  const float* at(std::int64_t row, std::int64_t token, std::int64_t head) const {
    return data + row * batch_stride + token * token_stride + head * head_stride;
  }
};
struct Heads {
  float* data;
  std::int64_t batch_stride, token_stride, head_stride;

  float* at(std::int64_t row, std::int64_t token, std::int64_t head) const {
    return data + row * batch_stride + token * token_stride + head * head_stride;
  }
};

// A document of one row of the batch: keys whose positions rise by one, and the queries that look at them.
struct Segment {
  std::int32_t row;
  std::int32_t first_lane;  // position of its first key modulo 16
  std::int32_t key_begin, key_end;
  std::int32_t query_begin, query_end;
};

// Which query sees which keys. The longest segments stand first.
struct AttentionPlan {
  std::int64_t num_segments;
  const Segment* segments;
  const std::int32_t* keys;           // token (0 to S - 1) of each key; those of a segment by position
  const std::int32_t* queries;        // token (0 to T - 1) of each query; those of a segment by position
  const std::int32_t* visible_begin;  // of each query: the first key of its segment that it sees, counted from the segment's
  const std::int32_t* visible_end;    // and one behind the last; neither ever descends inside a segment
};

struct AttentionShape {
  std::int64_t num_tokens;  // T
  std::int64_t num_heads, num_kv_heads, key_dim, value_dim;
  float scale;
};

struct AttentionForward {
  AttentionShape shape;
  AttentionPlan plan;
  ConstHeads q, k, v;
  const float* sinks;  // [N] or null
  Heads out;
  float* maxima;       // m and 1 / denominator [B, T, N] for the backward pass, both or none
  float* inverses;
};

struct AttentionBackward {
  AttentionShape shape;
  AttentionPlan plan;
  ConstHeads q, k, v, out, grad;
  const float* sinks;  // [N] or null
  const float* maxima;
  const float* inverses;
  Heads dq, dk, dv;
  std::int64_t num_rows;  // B * T
  float* sink_terms;      // [N, B * T], zeros at first; null without sinks
  float* dsinks;          // [N]; null without sinks
};

// Tokens that no segment has are not written.
void attention_forward(const AttentionForward& args);
void attention_backward(const AttentionBackward& args);

}  // namespace openbook
