#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "attention.h"
#include "bindings.h"

namespace openbook {
namespace {

// [B, tokens, heads, features] with any strides but features contiguous: parts of a larger array are not copied.
using ConstView = nb::ndarray<const float, nb::ndim<4>, nb::device::cpu>;
using View = nb::ndarray<float, nb::ndim<4>, nb::device::cpu>;
using Indices1 = Array<const std::int32_t, 1>;
using Indices2 = Array<const std::int32_t, 2>;
using MaybeFloats1 = std::optional<ConstFloats1>;

std::int64_t size(const auto& array, std::size_t axis) { return static_cast<std::int64_t>(array.shape(axis)); }

void check(bool is_good, const char* expected) {
  if (!is_good) throw nb::value_error(expected);
}

template <typename Target, typename Source>
Target heads_of(const Source& x) {
  check(x.shape(3) <= 1 || x.stride(3) == 1, "attention: the last axis of an array is not contiguous: make it so");
  return {x.data(), x.stride(0), x.stride(1), x.stride(2)};
}
ConstHeads heads(const ConstView& x) { return heads_of<ConstHeads>(x); }
Heads heads(const View& x) { return heads_of<Heads>(x); }

bool has_shape(const auto& x, std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) {
  return size(x, 0) == a && size(x, 1) == b && size(x, 2) == c && size(x, 3) == d;
}

AttentionShape shape_of(const ConstView& q, const ConstView& k, const ConstView& v, float scale) {
  check(size(k, 2) > 0 && size(q, 2) % size(k, 2) == 0 &&
            has_shape(k, size(q, 0), size(k, 1), size(k, 2), size(q, 3)) &&
            has_shape(v, size(k, 0), size(k, 1), size(k, 2), size(v, 3)),
        "attention: shapes differ: expected q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv], K a divisor of N");
  return {size(q, 1), size(q, 2), size(k, 2), size(q, 3), size(v, 3), scale};
}

struct PlanArrays {
  Indices2 segments;
  Indices1 keys, queries, visible_begin, visible_end;
};

// Refuses a plan that would reach outside of the arrays.
AttentionPlan plan_of(const PlanArrays& arrays, std::int64_t batch, std::int64_t num_queries, std::int64_t num_keys) {
  static_assert(sizeof(Segment) == 6 * sizeof(std::int32_t));
  const std::int64_t most_keys = size(arrays.keys, 0), most_queries = size(arrays.queries, 0);
  check(size(arrays.segments, 1) == 6 && size(arrays.visible_begin, 0) == most_queries &&
            size(arrays.visible_end, 0) == most_queries,
        "attention: the plan's arrays do not fit each other");
  const AttentionPlan plan = {size(arrays.segments, 0),
                              reinterpret_cast<const Segment*>(arrays.segments.data()),
                              arrays.keys.data(),
                              arrays.queries.data(),
                              arrays.visible_begin.data(),
                              arrays.visible_end.data()};
  bool is_inside = true;
  for (std::int64_t i = 0; i < most_keys; ++i) is_inside &= plan.keys[i] >= 0 && plan.keys[i] < num_keys;
  for (std::int64_t i = 0; i < most_queries; ++i) is_inside &= plan.queries[i] >= 0 && plan.queries[i] < num_queries;
  for (std::int64_t i = 0; i < plan.num_segments && is_inside; ++i) {
    const Segment& s = plan.segments[i];
    is_inside = s.row >= 0 && s.row < batch && s.first_lane >= 0 && s.first_lane < 16 && s.key_begin >= 0 && s.key_begin <= s.key_end &&
                s.key_end <= most_keys && s.query_begin >= 0 && s.query_begin < s.query_end &&
                s.query_end <= most_queries;
    std::int32_t begin = 0, end = 0;
    for (std::int32_t j = s.query_begin; j < s.query_end && is_inside; ++j) {
      is_inside = plan.visible_begin[j] >= begin && plan.visible_end[j] >= end &&
                  plan.visible_begin[j] <= plan.visible_end[j] && plan.visible_end[j] <= s.key_end - s.key_begin;
      begin = plan.visible_begin[j];
      end = plan.visible_end[j];
    }
  }
  check(is_inside, "attention: the plan was made for a batch of another shape: prepare the mask anew");
  return plan;
}

const float* sinks_of(const MaybeFloats1& sinks, std::int64_t num_heads) {
  check(!sinks || size(*sinks, 0) == num_heads, "attention: sinks are not one a head: expected [N]");
  return sinks ? sinks->data() : nullptr;
}

void forward(const ConstView& q, const ConstView& k, const ConstView& v, const MaybeFloats1& sinks,
             const Indices2& segments, const Indices1& keys, const Indices1& queries, const Indices1& visible_begin,
             const Indices1& visible_end, float scale, const View& out, std::optional<Floats4> stats) {
  const AttentionShape shape = shape_of(q, k, v, scale);
  const std::int64_t B = size(q, 0), T = size(q, 1), N = size(q, 2);
  check(has_shape(out, B, T, N, size(v, 3)), "attention_forward: expected out [B, T, N, Hv]");
  check(!stats || has_shape(*stats, 2, B, T, N), "attention_forward: expected stats [2, B, T, N]");
  float* maxima = stats ? stats->data() : nullptr;
  const AttentionForward args = {shape,
                                 plan_of({segments, keys, queries, visible_begin, visible_end}, B, T, size(k, 1)),
                                 heads(q),
                                 heads(k),
                                 heads(v),
                                 sinks_of(sinks, N),
                                 heads(out),
                                 maxima,
                                 maxima == nullptr ? nullptr : maxima + B * T * N};
  const nb::gil_scoped_release release;
  attention_forward(args);
}

void backward(const ConstView& grad, const ConstView& q, const ConstView& k, const ConstView& v, const ConstView& out,
              const ConstFloats4& stats, const MaybeFloats1& sinks, const Indices2& segments, const Indices1& keys,
              const Indices1& queries, const Indices1& visible_begin, const Indices1& visible_end, float scale,
              const View& dq, const View& dk, const View& dv, std::optional<Floats1> dsinks) {
  const AttentionShape shape = shape_of(q, k, v, scale);
  const std::int64_t B = size(q, 0), T = size(q, 1), N = size(q, 2), H = size(q, 3), S = size(k, 1), K = size(k, 2);
  const std::int64_t value_dim = size(v, 3);
  check(has_shape(grad, B, T, N, value_dim) && has_shape(out, B, T, N, value_dim) && has_shape(stats, 2, B, T, N) &&
            has_shape(dq, B, T, N, H) && has_shape(dk, B, S, K, H) && has_shape(dv, B, S, K, value_dim),
        "attention_backward: expected grad and out [B, T, N, Hv], stats [2, B, T, N], gradients shaped as q, k, v");
  check(sinks.has_value() == dsinks.has_value() && (!dsinks || size(*dsinks, 0) == N),
        "attention_backward: expected dsinks [N] with sinks, none without");
  std::vector<float> sink_terms(dsinks ? static_cast<std::size_t>(N * B * T) : 0);
  const AttentionBackward args = {shape,
                                  plan_of({segments, keys, queries, visible_begin, visible_end}, B, T, S),
                                  heads(q),
                                  heads(k),
                                  heads(v),
                                  heads(out),
                                  heads(grad),
                                  sinks_of(sinks, N),
                                  stats.data(),
                                  stats.data() + B * T * N,
                                  heads(dq),
                                  heads(dk),
                                  heads(dv),
                                  B * T,
                                  dsinks ? sink_terms.data() : nullptr,
                                  dsinks ? dsinks->data() : nullptr};
  const nb::gil_scoped_release release;
  attention_backward(args);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention_forward", &forward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("sinks").none(),
        nb::arg("segments"), nb::arg("keys"), nb::arg("queries"), nb::arg("visible_begin"), nb::arg("visible_end"),
        nb::arg("scale"), nb::arg("out"), nb::arg("stats").none(),
        "float32 q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv], sinks [N] or None to out [B, T, N, Hv]; stats "
        "[2, B, T, N] gets maxima and 1 / denominators. The plan says who sees whom; other tokens are not written.");
  m.def("attention_backward", &backward, nb::arg("grad"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"),
        nb::arg("stats"), nb::arg("sinks").none(), nb::arg("segments"), nb::arg("keys"), nb::arg("queries"),
        nb::arg("visible_begin"), nb::arg("visible_end"), nb::arg("scale"), nb::arg("dq"), nb::arg("dk"), nb::arg("dv"),
        nb::arg("dsinks").none(), "The gradients of attention_forward; tokens outside of the plan are not written.");
}

}  // namespace openbook
