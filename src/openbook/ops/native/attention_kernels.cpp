#include "attention_kernels.h"

#include "attention_tiles.h"

namespace openbook::OPENBOOK_ISA {
namespace {

// Blocks that `num_keys` keys can take up, wherever the first of them lies in its block.
Size most_blocks(Size num_keys) { return num_keys / kLanes + 2; }

void zero(float* x, Size size) { std::memset(x, 0, sizeof(float) * static_cast<std::size_t>(size)); }

void copy_row(const float* from, Size size, float* to, Size width) {
  std::memcpy(to, from, sizeof(float) * static_cast<std::size_t>(size));
  zero(to + size, width - size);
}

// Keys (or values) of a segment from slot `begin` to before `end`. Slots count from the block of 16 positions in which the
// segment begins: the lane of a slot is that of its position.
struct Slots {
  Size begin, end;
  Size lead;  // slot of the segment's first key

  Size num_blocks() const { return (end + kLanes - 1) / kLanes - begin / kLanes; }
  Size base() const { return begin / kLanes * kLanes; }
};

// How many rows ahead the laying out of keys asks for memory: they lie far apart.
constexpr Size kPrefetch = 8;

// As blocks [size, 16]: what `dot_blocks` reads. Slots without a key hold zeros.
void pack_columns(const ConstHeads& from, const Segment& segment, const std::int32_t* keys, Size head, Size size,
                  const Slots& slots, float* to, const float** blocks) {
  const Size num_blocks = slots.num_blocks(), block_size = kLanes * size;
  for (Size block = 0; block < num_blocks; ++block) {
    float* columns = to + block * block_size;
    blocks[block] = columns;
    const Size first = slots.base() + kLanes * block;
    if (first < slots.begin || first + kLanes > slots.end) zero(columns, block_size);
    for (Size lane = 0; lane < kLanes; ++lane) {
      const Size slot = first + lane;
      if (slot < slots.begin || slot >= slots.end) continue;
      const std::int32_t* token = keys + segment.key_begin + slot - slots.lead;
      if (slot + kPrefetch < slots.end) {
        const float* later = from.at(segment.row, token[kPrefetch], head);
        for (Size d = 0; d < size; d += kLanes) __builtin_prefetch(later + d);
      }
      const float* key = from.at(segment.row, *token, head);
      for (Size d = 0; d < size; ++d) columns[kLanes * d + lane] = key[d];
    }
  }
}

// As rows of `width` floats, 16 rows a block: what `add_ranges` reads. Slots without a key are left alone.
void pack_rows(const ConstHeads& from, const Segment& segment, const std::int32_t* keys, Size head, Size size,
               Size width, const Slots& slots, float* to, const float** blocks) {
  for (Size block = 0; block < slots.num_blocks(); ++block) blocks[block] = to + block * kLanes * width;
  for (Size slot = slots.begin; slot < slots.end; ++slot) {
    copy_row(from.at(segment.row, keys[segment.key_begin + slot - slots.lead], head), size,
             to + (slot - slots.base()) * width, width);
  }
}

// Query rows of a segment and a key-value head: query by query, and for each the heads of the group.
struct QueryRows {
  const AttentionPlan* plan;
  Size group, first_head, first_query;

  Size query(Size row) const { return first_query + row / group; }
  Size token(Size row) const { return plan->queries[query(row)]; }
  Size head(Size row) const { return first_head + row % group; }
  // Slots of the first and behind the last key that it sees.
  Size begin(Size row, Size lead) const { return lead + plan->visible_begin[query(row)]; }
  Size end(Size row, Size lead) const { return lead + plan->visible_end[query(row)]; }
};

Size forward_scratch(const AttentionShape& shape, Size num_keys) {
  const Size blocks = most_blocks(num_keys), value_width = whole_vectors(shape.value_dim);
  return blocks * kLanes * (whole_vectors(shape.key_dim) + value_width + kTileRows) + 4 * (blocks + kLanes) +
         kTileRows * (whole_vectors(shape.key_dim) + value_width);
}

void forward(const AttentionForward& args, const Segment& segment, Size kv_head, Size query_begin, Size query_end,
             float* scratch) {
  const AttentionShape& shape = args.shape;
  const AttentionPlan& plan = args.plan;
  const Size H = shape.key_dim, value_dim = shape.value_dim, value_width = whole_vectors(value_dim);
  const Size group = shape.num_heads / shape.num_kv_heads, lead = segment.first_lane;
  const QueryRows rows = {&plan, group, kv_head * group, query_begin};
  const Slots slots = {lead + plan.visible_begin[query_begin], lead + plan.visible_end[query_end - 1], lead};
  const Size num_blocks = slots.num_blocks() > 0 ? slots.num_blocks() : 0, base = slots.base();
  Room room = {scratch};
  const float** key_blocks = room.pointers(num_blocks);
  const float** value_blocks = room.pointers(num_blocks);
  float* q = room.floats(kTileRows * H);
  float* out = room.floats(kTileRows * value_width);
  float* scores = room.floats(kTileRows * kLanes * num_blocks);
  pack_columns(args.k, segment, plan.keys, kv_head, H, slots, room.floats(num_blocks * kLanes * H), key_blocks);
  pack_rows(args.v, segment, plan.keys, kv_head, value_dim, value_width, slots,
            room.floats(num_blocks * kLanes * value_width), value_blocks);

  const Sight sight = {key_blocks, {value_blocks, value_width, value_width}, H, shape.scale};
  const Size num_rows = (query_end - query_begin) * group;
  for (Size first = 0; first < num_rows; first += kTileRows) {
    RowTile tile;
    tile.count = static_cast<int>(num_rows - first < kTileRows ? num_rows - first : kTileRows);
    for (int r = 0; r < tile.count; ++r) {
      const Size head = rows.head(first + r);
      copy_row(args.q.at(segment.row, rows.token(first + r), head), H, q + r * H, H);
      tile.begin[r] = static_cast<std::int32_t>(rows.begin(first + r, lead) - base);
      tile.end[r] = static_cast<std::int32_t>(rows.end(first + r, lead) - base);
      tile.sinks[r] = args.sinks != nullptr ? args.sinks + head : nullptr;
    }
    attend(tile, q, sight, scores, kLanes * num_blocks, out, value_width);
    for (int r = 0; r < tile.count; ++r) {
      const Size token = rows.token(first + r), head = rows.head(first + r);
      write_row(out + r * value_width, value_dim, tile.stats[r].inverse, args.out.at(segment.row, token, head));
      if (args.maxima == nullptr) continue;
      const Size index = (segment.row * shape.num_tokens + token) * shape.num_heads + head;
      args.maxima[index] = tile.stats[r].maximum;
      args.inverses[index] = tile.stats[r].inverse;
    }
  }
}

Size backward_scratch(const AttentionShape& shape, Size num_keys) {
  const Size blocks = most_blocks(num_keys);
  const Size widths = whole_vectors(shape.key_dim) + whole_vectors(shape.value_dim);
  return blocks * kLanes * (3 * widths + 2 * kBackwardRows + 2) + 6 * (blocks + kLanes) + 3 * kBackwardRows * widths +
         16 * kLanes;
}

// A block of query rows: what is read again and again of them.
struct RowBlock {
  int count;
  std::int32_t begin[kBackwardRows], end[kBackwardRows];  // visible slots, counted from the block's first slot
  SoftmaxStats stats[kBackwardRows];
  float deltas[kBackwardRows];  // D
};

// p into `weights` and ds into `slopes`, both [rows, stride], for the slots that the rows of the block see.
void weights_and_slopes(const RowBlock& block, const float* q, Size width, const float* grads, Size value_width,
                        const AttentionShape& shape, const float* const* key_blocks, const float* const* value_blocks,
                        float* weights, float* slopes, Size stride) {
  for (int first = 0; first < block.count; first += kTileRows) {
    const int count = block.count - first < kTileRows ? block.count - first : kTileRows;
    const Size from = block.begin[first] / kLanes, to = (block.end[first + count - 1] + kLanes - 1) / kLanes;
    float* p = weights + first * stride;
    float* ds = slopes + first * stride;
    dot_blocks(count, q + first * width, width, key_blocks + from, to - from, shape.key_dim, shape.scale,
               p + kLanes * from, stride);
    dot_blocks(count, grads + first * value_width, value_width, value_blocks + from, to - from, shape.value_dim, 1.0f,
               ds + kLanes * from, stride);
    for (int r = 0; r < count; ++r, p += stride, ds += stride) {
      const Vec maximum = splat(block.stats[first + r].maximum), inverse = splat(block.stats[first + r].inverse);
      const Vec delta = splat(block.deltas[first + r]);
      for (Size j = block.begin[first + r] / kLanes * kLanes; j < block.end[first + r]; j += kLanes) {
        const Vec weight = mul(exp(sub(load(p + j), maximum)), inverse);
        store(p + j, weight);
        store(ds + j, mul(weight, sub(load(ds + j), delta)));
      }
    }
  }
}

// The rows of a block that see each of its slots: those whose range begins at it or before, and ends behind it.
void rows_of_slots(const RowBlock& block, Size num_slots, std::int32_t* begin, std::int32_t* end) {
  std::int32_t first = 0, last = 0;
  for (Size slot = 0; slot < num_slots; ++slot) {
    while (first < block.count && block.end[first] <= slot) ++first;
    while (last < block.count && block.begin[last] <= slot) ++last;
    begin[slot] = first;
    end[slot] = last;
  }
}

float dot_lanes(const float* a, const float* b, Size size) {
  Vec sums = splat(0.0f);
  Size d = 0;
  for (; d + kLanes <= size; d += kLanes) sums = fma(load(a + d), load(b + d), sums);
  if (d < size) {
    const int rest = static_cast<int>(size - d);
    sums = fma(load_first(a + d, rest), load_first(b + d, rest), sums);
  }
  return sum_lanes(sums);
}

void backward(const AttentionBackward& args, const Segment& segment, Size kv_head, float* scratch) {
  const AttentionShape& shape = args.shape;
  const AttentionPlan& plan = args.plan;
  const Size H = shape.key_dim, value_dim = shape.value_dim;
  const Size width = whole_vectors(H), value_width = whole_vectors(value_dim);
  const Size group = shape.num_heads / shape.num_kv_heads, lead = segment.first_lane;
  const QueryRows rows = {&plan, group, kv_head * group, segment.query_begin};
  const Slots slots = {lead, lead + segment.key_end - segment.key_begin, lead};
  const Size num_blocks = slots.num_blocks(), num_slots = kLanes * num_blocks;
  Room room = {scratch};
  const float** key_columns = room.pointers(num_blocks);
  const float** key_rows = room.pointers(num_blocks);
  const float** value_columns = room.pointers(num_blocks);
  pack_columns(args.k, segment, plan.keys, kv_head, H, slots, room.floats(num_slots * H), key_columns);
  pack_columns(args.v, segment, plan.keys, kv_head, value_dim, slots, room.floats(num_slots * value_dim), value_columns);
  pack_rows(args.k, segment, plan.keys, kv_head, H, width, slots, room.floats(num_slots * width), key_rows);
  float* dk = room.floats(num_slots * width);
  float* dv = room.floats(num_slots * value_width);
  zero(dk, num_slots * width);
  zero(dv, num_slots * value_width);
  float* weights = room.floats(kBackwardRows * num_slots);
  float* slopes = room.floats(kBackwardRows * num_slots);
  std::int32_t* row_begin = room.integers(num_slots);
  std::int32_t* row_end = room.integers(num_slots);
  float* q = room.floats(kBackwardRows * width);
  float* dq = room.floats(kBackwardRows * width);
  float* grads = room.floats(kBackwardRows * value_width);
  const float* q_blocks[kBackwardRows / kLanes];
  const float* grad_blocks[kBackwardRows / kLanes];
  for (Size i = 0; i < kBackwardRows / kLanes; ++i) {
    q_blocks[i] = q + i * kLanes * width;
    grad_blocks[i] = grads + i * kLanes * value_width;
  }

  const Size num_rows = (segment.query_end - segment.query_begin) * group;
  RowBlock block;
  for (Size first = 0; first < num_rows; first += kBackwardRows) {
    block.count = static_cast<int>(num_rows - first < kBackwardRows ? num_rows - first : kBackwardRows);
    const Size base = rows.begin(first, lead) / kLanes * kLanes;
    for (int r = 0; r < block.count; ++r) {
      const Size token = rows.token(first + r), head = rows.head(first + r);
      const Size index = (segment.row * shape.num_tokens + token) * shape.num_heads + head;
      block.begin[r] = static_cast<std::int32_t>(rows.begin(first + r, lead) - base);
      block.end[r] = static_cast<std::int32_t>(rows.end(first + r, lead) - base);
      block.stats[r] = {args.maxima[index], args.inverses[index]};
      copy_row(args.q.at(segment.row, token, head), H, q + r * width, width);
      copy_row(args.grad.at(segment.row, token, head), value_dim, grads + r * value_width, value_width);
      block.deltas[r] = dot_lanes(grads + r * value_width, args.out.at(segment.row, token, head), value_dim);
      if (args.sinks != nullptr && block.begin[r] < block.end[r]) {
        const float weight = exp_one(args.sinks[head] - block.stats[r].maximum) * block.stats[r].inverse;
        args.sink_terms[head * args.num_rows + segment.row * shape.num_tokens + token] = weight * block.deltas[r];
      }
    }
    const Size first_block = base / kLanes, reach = block.end[block.count - 1];
    weights_and_slopes(block, q, width, grads, value_width, shape, key_columns + first_block,
                       value_columns + first_block, weights, slopes, num_slots);
    zero(dq, block.count * width);
    add_ranges<true>(block.count, block.begin, block.end, {slopes, num_slots}, {key_rows + first_block, width, width},
                     dq, width);
    for (int r = 0; r < block.count; ++r) {
      write_row(dq + r * width, H, shape.scale, args.dq.at(segment.row, rows.token(first + r), rows.head(first + r)));
    }
    rows_of_slots(block, reach, row_begin, row_end);
    add_ranges<false>(static_cast<int>(reach), row_begin, row_end, {weights, num_slots},
                      {grad_blocks, value_width, value_width}, dv + base * value_width, value_width);
    add_ranges<false>(static_cast<int>(reach), row_begin, row_end, {slopes, num_slots}, {q_blocks, width, width},
                      dk + base * width, width);
  }
  for (Size slot = slots.begin; slot < slots.end; ++slot) {
    const Size token = plan.keys[segment.key_begin + slot - lead];
    write_row(dk + slot * width, H, shape.scale, args.dk.at(segment.row, token, kv_head));
    write_row(dv + slot * value_width, value_dim, 1.0f, args.dv.at(segment.row, token, kv_head));
  }
}

float sum(const float* x, Size size) {
  Vec sums = splat(0.0f);
  Size i = 0;
  for (; i + kLanes <= size; i += kLanes) sums = add(sums, load(x + i));
  if (i < size) sums = add(sums, load_first(x + i, static_cast<int>(size - i)));
  return sum_lanes(sums);
}

}  // namespace

extern const AttentionKernels attention_kernels = {forward_scratch, backward_scratch, forward, backward, sum};

}  // namespace openbook::OPENBOOK_ISA
