// The inner loops of attention: small products over keys that lie in blocks of 16, each key seen by a range of rows.
//
// A tile of rows keeps its sums in registers. Its height differs between instruction sets and shows in no bit: every sum
// runs over what its own row sees, in ascending order, and never over anything else.
//
// Included by kernel sources only, inside their namespace OPENBOOK_ISA (see dispatch.h).
#pragma once

#include "math.h"

namespace openbook::OPENBOOK_ISA {

using Size = std::int64_t;

// Rows of a tile at most, and vectors of sums that fit the registers.
#if defined(OPENBOOK_ISA_avx512)
constexpr int kTileRows = 8, kTileSums = 16;
#elif defined(OPENBOOK_ISA_scalar)
constexpr int kTileRows = 4, kTileSums = 4;
#else
constexpr int kTileRows = 6, kTileSums = 6;
#endif

// Vectors side by side for a tile of this many rows.
constexpr int tile_width(int rows) {
  return 8 * rows <= kTileSums ? 8 : 4 * rows <= kTileSums ? 4 : 2 * rows <= kTileSums ? 2 : 1;
}

// Tiles of few rows wait for memory: they ask for the next block while they are at one. The others wait for arithmetic.
constexpr bool asks_ahead(int rows) { return rows <= 4; }
OPENBOOK_INLINE void prefetch(const float* p) { __builtin_prefetch(p, 0, 2); }  // into the second cache

template <int N>
struct Rows {
  static constexpr int count = N;
};

// Calls body(Rows<count>), count from 1 to kTileRows.
template <typename Body>
OPENBOOK_INLINE void with_rows(int count, Body body) {
  switch (count) {
    case 1:
      return body(Rows<1>{});
    case 2:
      return body(Rows<2>{});
    case 3:
      return body(Rows<3>{});
    case 4:
      return body(Rows<4>{});
#if !defined(OPENBOOK_ISA_scalar)
    case 5:
      return body(Rows<5>{});
    case 6:
      return body(Rows<6>{});
#endif
#if defined(OPENBOOK_ISA_avx512)
    case 7:
      return body(Rows<7>{});
    case 8:
      return body(Rows<8>{});
#endif
    default:
      __builtin_unreachable();
  }
}

// out[r, 16 c + i] = scale * sum over d of a[r, d] * blocks[c][d, i]: R rows against C blocks [size, 16].
// later: C blocks that are needed next.
template <int R, int C>
OPENBOOK_INLINE void dot_tile(const float* a, Size a_stride, const float* const* blocks, const float* const* later,
                              Size size, float scale, float* out, Size out_stride) {
  const float* b[C];
  Vec sums[R][C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) b[c] = blocks[c];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sums[r][c] = splat(0.0f);
  }
  for (Size d = 0; d < size; ++d) {
    Vec key[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      key[c] = load(b[c] + kLanes * d);
      if (asks_ahead(R)) prefetch(later[c] + kLanes * d);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(a[r * a_stride + d]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sums[r][c] = fma(x, key[c], sums[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) store(out + r * out_stride + kLanes * c, mul(sums[r][c], splat(scale)));
  }
}

// The same for up to kTileRows rows and any number of blocks.
inline void dot_blocks(int rows, const float* a, Size a_stride, const float* const* blocks, Size num_blocks, Size size,
                       float scale, float* out, Size out_stride) {
  with_rows(rows, [&](auto count) {
    // Not more than four streams: blocks lie in the same sets of a cache.
    constexpr int R = decltype(count)::count, C = tile_width(R) < 4 ? tile_width(R) : 4;
    Size c = 0;
    for (; c + C <= num_blocks; c += C) {
      const float* const* later = blocks + (c + 2 * C <= num_blocks ? c + C : c);
      dot_tile<R, C>(a, a_stride, blocks + c, later, size, scale, out + kLanes * c, out_stride);
    }
    for (; c < num_blocks; ++c) {
      dot_tile<R, 1>(a, a_stride, blocks + c, blocks + c, size, scale, out + kLanes * c, out_stride);
    }
  });
}

// Rows of features in blocks of 16 rows: feature d of row j is blocks[j / 16][(j % 16) * stride + d].
struct BlockedRows {
  const float* const* blocks;
  Size stride;
  Size width;  // features of a row
};

// Where a product's left factor for row r and term j lies: by rows, a[r * stride + j]; else a[j * stride + r].
struct Weights {
  const float* data;
  Size stride;
};

// out[r, 16 c + i] += sum over j from begin to before end of weight(r, j) * b[j, 16 (first + c) + i].
template <int R, int C, bool IsByRow, bool IsPartial>
OPENBOOK_INLINE void add_tile(Weights a, const BlockedRows& b, Size first, Size begin, Size end, float* out,
                              Size out_stride) {
  Vec sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sums[r][c] = load(out + r * out_stride + kLanes * c);
  }
  const int rest = static_cast<int>(b.width - kLanes * first);
  for (Size block = begin / kLanes; kLanes * block < end; ++block) {
    const Size from = kLanes * block < begin ? begin : kLanes * block;
    const Size to = kLanes * (block + 1) > end ? end : kLanes * (block + 1);
    const Size offset = (from - kLanes * block) * b.stride + kLanes * first;
    const float* row = b.blocks[block] + offset;
    const float* later = b.blocks[to < end ? block + 1 : block] + offset;
    for (Size j = from; j < to; ++j, row += b.stride, later += b.stride) {
      Vec features[C];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        features[c] = IsPartial ? load_first(row, rest) : load(row + kLanes * c);
        if (asks_ahead(R)) prefetch(later + kLanes * c);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec x = splat(IsByRow ? a.data[r * a.stride + j] : a.data[j * a.stride + r]);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) sums[r][c] = fma(x, features[c], sums[r][c]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) store(out + r * out_stride + kLanes * c, sums[r][c]);
  }
}

// The same for all features; rows of `out` have room for a whole number of vectors.
template <int R, bool IsByRow>
inline __attribute__((noinline)) void add_rows(Weights a, const BlockedRows& b, Size begin, Size end, float* out, Size out_stride) {
  constexpr int C = tile_width(R);
  const Size whole = b.width / kLanes;
  Size c = 0;
  for (; c + C <= whole; c += C) add_tile<R, C, IsByRow, false>(a, b, c, begin, end, out + kLanes * c, out_stride);
  for (; c < whole; ++c) add_tile<R, 1, IsByRow, false>(a, b, c, begin, end, out + kLanes * c, out_stride);
  if (b.width % kLanes != 0) add_tile<R, 1, IsByRow, true>(a, b, c, begin, end, out + kLanes * c, out_stride);
}

// out[r] += sum over j from begin[r] to before end[r] of weight(r, j) * b[j], for any number of rows whose begins and ends
// do not descend. What lies outside of a row's range is not touched for it: it may be NaN.
template <bool IsByRow>
inline void add_ranges(int rows, const std::int32_t* begin, const std::int32_t* end, Weights a, const BlockedRows& b,
                       float* out, Size out_stride) {
  const Size a_step = IsByRow ? a.stride : 1;
  for (int first = 0; first < rows; first += kTileRows) {
    const int count = rows - first < kTileRows ? rows - first : kTileRows;
    const Weights weights = {a.data + first * a_step, a.stride};
    float* sums = out + first * out_stride;
    // Terms that all rows of the tile have in common; before and behind them the rows go one by one.
    const Size common_begin = begin[first + count - 1], common_end = end[first];
    for (int r = 0; r < count; ++r) {
      const Size to = end[first + r] < common_begin ? end[first + r] : common_begin;
      if (begin[first + r] < to) {
        add_rows<1, IsByRow>({weights.data + r * a_step, a.stride}, b, begin[first + r], to, sums + r * out_stride,
                             out_stride);
      }
    }
    if (common_begin < common_end) {
      with_rows(count, [&](auto tile) {
        add_rows<decltype(tile)::count, IsByRow>(weights, b, common_begin, common_end, sums, out_stride);
      });
    }
    for (int r = 0; r < count; ++r) {
      const Size from = common_end > common_begin ? common_end : common_begin;
      const Size at_least = begin[first + r] > from ? begin[first + r] : from;
      if (at_least < end[first + r]) {
        add_rows<1, IsByRow>({weights.data + r * a_step, a.stride}, b, at_least, end[first + r], sums + r * out_stride,
                             out_stride);
      }
    }
  }
}

// Lanes of the 16 places from `first` on that lie within begin and end keep x, the others get `rest`.
OPENBOOK_INLINE Vec keep_range(Vec x, Size first, Size begin, Size end, float rest) {
  if (begin > first) x = select(first_mask(static_cast<int>(begin - first)), splat(rest), x);
  if (end < first + kLanes) x = select(first_mask(static_cast<int>(end - first)), x, splat(rest));
  return x;
}

// The largest of scores[begin] to before scores[end]. A NaN may be missed: it makes the denominator NaN all the same.
inline float largest_score(const float* scores, Size begin, Size end) {
  Vec largest = splat(-__builtin_inff());
  for (Size j = begin / kLanes * kLanes; j < end; j += kLanes) {
    largest = max(keep_range(load(scores + j), j, begin, end, -__builtin_inff()), largest);
  }
  return max_lanes(largest);
}

// scores[j] = exp(scores[j] - maximum) from begin to before end; returns their sum: 16 lanes by j mod 16, then `sum_lanes`.
inline float exp_scores(float* scores, Size begin, Size end, float maximum) {
  Vec sums = splat(0.0f);
  for (Size j = begin / kLanes * kLanes; j < end; j += kLanes) {
    const Vec p = keep_range(exp(sub(load(scores + j), splat(maximum))), j, begin, end, 0.0f);
    store(scores + j, p);
    sums = add(sums, p);
  }
  return sum_lanes(sums);
}

inline float exp_one(float x) {
  float lanes[kLanes];
  store(lanes, exp(splat(x)));
  return lanes[0];
}

// m of a row; sink: null, or one more score.
inline float largest_of_row(const float* scores, Size begin, Size end, const float* sink) {
  const float largest = largest_score(scores, begin, end);
  return sink != nullptr && *sink > largest ? *sink : largest;
}

// Turns the scores from begin to before end into exp(score - maximum); returns 1 / denominator, 0 if there are none.
inline float exp_row(float* scores, Size begin, Size end, float maximum, const float* sink) {
  float denominator = exp_scores(scores, begin, end, maximum);
  if (sink != nullptr) denominator += exp_one(*sink - maximum);
  return begin < end ? 1.0f / denominator : 0.0f;
}

struct SoftmaxStats {
  float maximum;  // of the visible scores and the sink
  float inverse;  // 1 / denominator
};

// Keys in blocks [key_dim, 16] and values in blocks of 16 rows: what a tile of query rows looks at.
struct Sight {
  const float* const* keys;
  BlockedRows values;
  Size key_dim;
  float scale;
};

// A tile of query rows. Ranges count from the first key of the first block; neither begins nor ends descend.
struct RowTile {
  int count;
  std::int32_t begin[kTileRows], end[kTileRows];
  const float* sinks[kTileRows];  // null, or a score beside those of the keys
  SoftmaxStats stats[kTileRows];  // what comes out; the inverse of a row that sees nothing is 0
};

// sums[r] = sum over visible keys of exp(score - maximum) * value, not yet divided by the denominator.
// q: [count, key_dim]. scores: room for `stride` floats a row, as many as all blocks hold.
inline void attend(RowTile& tile, const float* q, const Sight& sight, float* scores, Size stride, float* sums,
                   Size sums_stride) {
  const Size first = tile.begin[0] / kLanes, last = (tile.end[tile.count - 1] + kLanes - 1) / kLanes;
  dot_blocks(tile.count, q, sight.key_dim, sight.keys + first, last - first, sight.key_dim, sight.scale,
             scores + kLanes * first, stride);
  // All maxima first: the rows do not wait for each other.
  for (int r = 0; r < tile.count; ++r) {
    tile.stats[r].maximum = largest_of_row(scores + r * stride, tile.begin[r], tile.end[r], tile.sinks[r]);
  }
  for (int r = 0; r < tile.count; ++r) {
    tile.stats[r].inverse =
        exp_row(scores + r * stride, tile.begin[r], tile.end[r], tile.stats[r].maximum, tile.sinks[r]);
  }
  std::memset(sums, 0, sizeof(float) * static_cast<std::size_t>(tile.count * sums_stride));
  add_ranges<true>(tile.count, tile.begin, tile.end, {scores, stride}, sight.values, sums, sums_stride);
}

// out[d] = x[d] * factor + 0.0f; x has room for a whole number of vectors.
inline void write_row(const float* x, Size size, float factor, float* out) {
  for (Size d = 0; d < size; d += kLanes) {
    const Vec y = add(mul(load(x + d), splat(factor)), splat(0.0f));
    if (d + kLanes <= size) {
      store(out + d, y);
    } else {
      store_first(out + d, y, static_cast<int>(size - d));
    }
  }
}

OPENBOOK_INLINE Size whole_vectors(Size size) { return (size + kLanes - 1) / kLanes * kLanes; }

// Hands out pieces of a scratch, each aligned to a vector.
struct Room {
  float* next;

  float* floats(Size count) {
    float* taken = next;
    next += whole_vectors(count);
    return taken;
  }
  const float** pointers(Size count) { return reinterpret_cast<const float**>(floats(2 * count)); }
  std::int32_t* integers(Size count) { return reinterpret_cast<std::int32_t*>(floats(count)); }
};

}  // namespace openbook::OPENBOOK_ISA
