// The parts that attention is split into: one segment and one key-value head.
#pragma once

#include <cstdint>

#include "attention.h"
#include "dispatch.h"

namespace openbook {

// Query rows (a query of one head) that the backward pass takes at a time.
constexpr std::int64_t kBackwardRows = 48;

struct AttentionKernels {
  // Floats that a call may use as scratch.
  std::int64_t (*forward_scratch)(const AttentionShape& shape, std::int64_t num_keys);
  std::int64_t (*backward_scratch)(const AttentionShape& shape, std::int64_t num_keys);
  // The queries from query_begin to before query_end of the plan, all of the same segment; scratch aligned to 64 bytes.
  void (*forward)(const AttentionForward& args, const Segment& segment, std::int64_t kv_head, std::int64_t query_begin,
                  std::int64_t query_end, float* scratch);
  // All of a segment: dq of its queries, dk and dv of its keys.
  void (*backward)(const AttentionBackward& args, const Segment& segment, std::int64_t kv_head, float* scratch);
  // The sum of x in 16 lanes by index.
  float (*sum)(const float* x, std::int64_t size);
};

OPENBOOK_KERNELS(AttentionKernels, attention_kernels)

}  // namespace openbook
