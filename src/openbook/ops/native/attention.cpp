#include "attention.h"

#include "attention_kernels.h"
#include "scratch.h"
#include "thread_pool.h"

namespace openbook {
namespace {

// Queries that a part has at least, when a segment is split: each part lays out its keys anew.
constexpr std::int64_t kLeastQueries = 64;

float* attention_scratch(std::int64_t size) {
  return static_cast<float*>(scratch(Scratch::attention, sizeof(float) * static_cast<std::size_t>(size)));
}

}  // namespace

void attention_forward(const AttentionForward& args) {
  const AttentionKernels& kernels = attention_kernels();
  const std::int64_t whole = args.plan.num_segments * args.shape.num_kv_heads;
  if (whole == 0) return;
  const std::int64_t wanted = 4 * static_cast<std::int64_t>(num_threads());
  const std::int64_t most_parts = num_threads() == 1 ? 1 : (wanted + whole - 1) / whole;
  parallel_for(whole * most_parts, [&](std::int64_t task) {
    // The last part of a segment sees the most keys: it goes first.
    const std::int64_t part = most_parts - 1 - task / whole, head = task % whole % args.shape.num_kv_heads;
    const Segment& segment = args.plan.segments[task % whole / args.shape.num_kv_heads];
    const std::int64_t num_queries = segment.query_end - segment.query_begin;
    const std::int64_t useful = (num_queries + kLeastQueries - 1) / kLeastQueries;
    const std::int64_t parts = useful < most_parts ? useful : most_parts;
    if (part >= parts) return;
    float* room = attention_scratch(kernels.forward_scratch(args.shape, segment.key_end - segment.key_begin));
    kernels.forward(args, segment, head, segment.query_begin + num_queries * part / parts,
                    segment.query_begin + num_queries * (part + 1) / parts, room);
  });
}

void attention_backward(const AttentionBackward& args) {
  const AttentionKernels& kernels = attention_kernels();
  parallel_for(args.plan.num_segments * args.shape.num_kv_heads, [&](std::int64_t task) {
    const Segment& segment = args.plan.segments[task / args.shape.num_kv_heads];
    float* room = attention_scratch(kernels.backward_scratch(args.shape, segment.key_end - segment.key_begin));
    kernels.backward(args, segment, task % args.shape.num_kv_heads, room);
  });
  if (args.dsinks == nullptr) return;
  parallel_for(args.shape.num_heads, [&](std::int64_t head) {
    args.dsinks[head] = -kernels.sum(args.sink_terms + head * args.num_rows, args.num_rows);
  });
}

}  // namespace openbook
