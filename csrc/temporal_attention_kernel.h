// The work of temporal_attention on one piece of a plan, for the width of vectors that this file is compiled for; see
// temporal_attention.h. Three translation units include it. All of it has internal linkage.
//
// A packed unit is rows of T frames, kChunk channels at a time: [chunk][frame][channel of it]. Queries lie along the
// lanes: up to kTile of them are turned round, and scores are [key][query], so that a softmax runs down the keys with
// no sum across lanes. Each product is a sum over rows of a vector times one number, in registers from first to last.
#ifndef LF_TEMPORAL_ATTENTION_KERNEL_H
#define LF_TEMPORAL_ATTENTION_KERNEL_H

#include <initializer_list>
#include <limits>
#include <utility>

#include "common/conv_lanes.h"
#include "common/silu.h"
#include "temporal_attention.h"

namespace lf {
namespace {

constexpr int kVectors = 2;
constexpr int64_t kTile = kVectors * kLanes;  // queries at a time
constexpr int64_t kPitch = kTile + kLanes;    // from a key's scores to the next's. What is between stays 0
// Rows of sums in registers: with what they are of, no register is left over.
constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
static_assert(kTile <= kMostTurned && kLanes <= kMostLanes && kChunk % kLanes == 0, "what the plan has room for");

// --- products --------------------------------------------------------------------------------------------------------

// sum_k a(m, k) b(k, v): where its operands and sums lie, in floats from row to row and from step to step.
struct OfKeys {  // scores: a key's channels times the queries' turned
  static constexpr int64_t row = kChunk, step = 1, vector_step = kPitch, to_row = kPitch;
  static constexpr bool adds = false;
};
struct OverKeys {  // of queries: their weights, down the keys, times rows of these
  static constexpr int64_t row = 1, step = kPitch, vector_step = kChunk, to_row = kChunk;
  static constexpr bool adds = false;
};
struct OverQueries {  // of keys: their weights, along the queries, times rows of these; added to what is there
  static constexpr int64_t row = kPitch, step = 1, vector_step = kChunk, to_row = kChunk;
  static constexpr bool adds = true;
};

struct Product {
  const float* a;
  int64_t chunk;  // floats of it from kChunk steps to the next
  const float* b;
  float* to;
  int64_t depth;
  int64_t apart, to_apart;  // of b and the sums, from a vector to the next
};

template <class Lie, int M, int V> void sum_products(const Product& p) noexcept {
  Lanes sums[M][V];
  const auto at = [&p](int m, int v) { return p.to + m * Lie::to_row + v * p.to_apart; };
  if constexpr (Lie::adds) for_sums<M, V>([&](int m, int v) { sums[m][v] = Lanes::load(at(m, v)); });
  else for_sums<M, V>([&](int m, int v) { sums[m][v] = Lanes::fill(0.0f); });
  const float *a = p.a, *b = p.b;
  for (int64_t left = p.depth; left > 0; left -= kChunk, a += p.chunk) {
    const float* step = a;
    for (int64_t n = smaller(left, kChunk); n > 0; --n, step += Lie::step, b += Lie::vector_step) {
      for_sums<M, V>([&](int m, int v) {
        sums[m][v] = multiply_add(Lanes::fill(step[m * Lie::row]), Lanes::load(b + v * p.apart), sums[m][v]);
      });
    }
  }
  for_sums<M, V>([&](int m, int v) { sums[m][v].store(at(m, v)); });
}

using SumProducts = void (*)(const Product&) noexcept;
template <class Lie, int V, int... M> inline SumProducts sums_of(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr SumProducts table[] = {sum_products<Lie, M + 1, V>...};
  return table[rows - 1];
}

// All rows of `vectors` vectors, in parts of about the same size.
template <class Lie> inline void multiply(Product p, int64_t rows, int64_t vectors) {
  const std::make_integer_sequence<int, kRows> all;
  const int64_t parts = (rows + kRows - 1) / kRows;
  const float* const a = p.a;
  float* const to = p.to;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = i * rows / parts, count = (i + 1) * rows / parts - first;
    p.a = a + first * Lie::row, p.to = to + first * Lie::to_row;
    (vectors == 1 ? sums_of<Lie, 1>(count, all) : sums_of<Lie, kVectors>(count, all))(p);
  }
}

// --- packed rows -----------------------------------------------------------------------------------------------------

// Of the channel, from the first of its row.
inline int64_t place_of(int64_t channel, int64_t frames) {
  return channel / kChunk * kChunk * frames + channel % kChunk;
}

template <class T> inline void read_row(float* to, int64_t frames, const T* from, int64_t channels, int64_t stride) {
  if (stride == 1) {
    for_lanes(channels, [&](int64_t c, auto n) { load(from + c, n).store(to + place_of(c, frames)); });
    return;
  }
  for_lanes(channels, [&](int64_t c, int64_t n) {
    float some[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = widen(from[(c + i) * stride]);
    Lanes::load(some).store(to + place_of(c, frames));
  });
}

template <class T>
inline void write_row(T* to, int64_t stride, const float* from, int64_t frames, int64_t channels, float factor,
                      [[maybe_unused]] bool streamed) {
  const Lanes times = Lanes::fill(factor);
  const auto vector = [&](int64_t c) { return Lanes::load(from + place_of(c, frames)) * times; };
  if (stride == 1) {
    for_lanes(channels, [&](int64_t c, auto n) {
      if constexpr (std::is_same_v<T, float>) {
        if (streamed) return stream(to + c, vector(c));
      }
      store(to + c, vector(c), n);
    });
    return;
  }
  for_lanes(channels, [&](int64_t c, int64_t n) {
    T some[kLanes];
    vector(c).store(some);
    for (int64_t i = 0; i < n; ++i) to[(c + i) * stride] = some[i];
  });
}

// Each pair of channels by its angle, or back where `sign` is -1.
inline void turn_pairs(float* row, int64_t frames, const float* angles, int64_t channels, float sign) {
  for (int64_t first = 0; first < channels; first += kChunk, row += kChunk * frames, angles += kChunk) {
    const int64_t count = smaller(channels - first, kChunk);
    for (int64_t c = 0; c < count; c += 2) {
      const float even = row[c], odd = row[c + 1], cos = angles[c], sin = sign * angles[c + 1];
      row[c] = even * cos - odd * sin;
      row[c + 1] = even * sin + odd * cos;
    }
  }
}

// --- a piece ---------------------------------------------------------------------------------------------------------

// The operands that are packed; results take the place of those that are needed no longer.
enum Operand { kQuery, kKey, kValue, kGradient, kOfKey, kOfValue };

template <class T> class Piece {
 public:
  Piece(const AttentionPlan& plan, int64_t index, float* scratch)
      : plan_(plan), task_(plan.task), index_(index), frames_(plan.task.frames), channels_(plan.task.channels),
        vectors_((plan.task.channels + kLanes - 1) / kLanes), scratch_(scratch) {}

  void forward() {
    for_blocks([this] {
      read({{kQuery, &task_.q}, {kKey, &task_.k}, {kValue, &task_.v}});
      for (int64_t unit = 0; unit < units_; ++unit) attend(unit);
      const float* const factors = scratch_ + plan_.factors_at;
      write({{kQuery, &task_.y}}, plan_.stream, [this, factors](Operand, int64_t unit, int64_t t) {
        return factors[unit * frames_ + t];
      });
    });
    end_streams();
  }

  void backward() {
    clear(scratch_ + plan_.slopes_at - kMostLanes, kMostLanes + frames_ * kPitch);
    for_blocks([this] {
      read({{kQuery, &task_.q}, {kKey, &task_.k}, {kValue, &task_.v}, {kGradient, &task_.y}});
      clear(row(kOfKey, 0, 0), 2 * plan_.operands * plan_.unit_size);
      clear(scratch_ + plan_.lags_at, plan_.heads * plan_.lags_size);
      for (int64_t unit = 0; unit < units_; ++unit) differentiate(unit);
      write_gradients();
      if (plan_.lag_sums) add_lags();
    });
  }

 private:
  // The tile at hand: queries [first, first + count), and the keys [low, high) that any of them sees.
  struct Tile {
    int64_t first, count, low, high;
    int64_t vectors() const { return (count + kLanes - 1) / kLanes; }
    int64_t keys() const { return high - low; }
  };

  static void clear(float* at, int64_t count) {
    for (int64_t i = 0; i < count; ++i) at[i] = 0;
  }

  // Pixels of a clip by heads.
  struct Block {
    int64_t clip, first_pixel, pixels, first_head, heads;
  };

  Block block_at(int64_t index) const {
    const int64_t of_pixels = index / plan_.head_blocks, i = of_pixels % plan_.pixel_blocks;
    const int64_t first_pixel = i * plan_.clip_pixels / plan_.pixel_blocks;
    const int64_t j = index % plan_.head_blocks, first_head = j * task_.heads / plan_.head_blocks;
    return {of_pixels / plan_.pixel_blocks, first_pixel, (i + 1) * plan_.clip_pixels / plan_.pixel_blocks - first_pixel,
            first_head, (j + 1) * task_.heads / plan_.head_blocks - first_head};
  }

  template <class Work> void for_blocks(const Work& work) {
    const int64_t end = (index_ + 1) * plan_.blocks / plan_.pieces;
    for (int64_t block = index_ * plan_.blocks / plan_.pieces; block < end; ++block) {
      block_ = block_at(block);
      units_ = block_.pixels * block_.heads;
      work();
    }
  }

  int64_t head_of(int64_t unit) const { return block_.first_head + unit % block_.heads; }

  float* row(int operand, int64_t unit, int64_t frame) const {
    return scratch_ + (operand * plan_.operands + unit) * plan_.unit_size + frame * kChunk;
  }

  // An operand, or a result, and where it lies.
  struct Rows {
    Operand operand;
    const lf_heads* heads;
  };
  using Several = std::initializer_list<Rows>;

  // Calls at(rows, unit, t, row) for each row of the block. What lies together is gone through together: the operands
  // of neighbouring pixels may be parts of one projection, frame by frame.
  template <class At> void for_rows(const Several& several, const At& at) const {
    for (int64_t t = 0; t < frames_; ++t) {
      for (int64_t i = 0; i < block_.pixels; ++i) {
        const int64_t pixel = block_.first_pixel + i, h = pixel / task_.width, w = pixel % task_.width;
        for (const Rows& rows : several) {
          const int64_t* s = rows.heads->strides;
          T* row = static_cast<T*>(rows.heads->data) + block_.clip * s[0] + t * s[1] + h * s[2] + w * s[3] +
                   block_.first_head * s[4];
          for (int64_t head = 0; head < block_.heads; ++head, row += s[4]) at(rows, i * block_.heads + head, t, row);
        }
      }
    }
  }

  // The step from channel to channel, which there may be but one of.
  int64_t step_of(const lf_heads& heads) const { return channels_ == 1 ? 1 : heads.strides[5]; }

  void read(const Several& several) const {
    for_rows(several, [this](const Rows& from, int64_t unit, int64_t t, const T* at) {
      read_row(row(from.operand, unit, t), frames_, at, channels_, step_of(*from.heads));
    });
    if (task_.rotary) rotate(kQuery, 1), rotate(kKey, 1);
  }

  void rotate(Operand operand, float sign) const {
    for (int64_t unit = 0; unit < units_; ++unit) {
      for (int64_t t = 0; t < frames_; ++t) {
        turn_pairs(row(operand, unit, t), frames_, task_.rotary + t * channels_, channels_, sign);
      }
    }
  }

  // factor(operand, unit, t): of a row.
  template <class Factor> void write(const Several& several, bool streamed, const Factor& factor) const {
    for_rows(several, [&](const Rows& to, int64_t unit, int64_t t, T* at) {
      const float* const from = row(to.operand, unit, t);
      write_row(at, step_of(*to.heads), from, frames_, channels_, factor(to.operand, unit, t), streamed);
    });
  }

  // --- softmax

  Tile tile_at(int64_t first) const {
    const int64_t count = smaller(kTile, frames_ - first);
    const int64_t reach = task_.window < 0 ? frames_ : smaller(task_.window, frames_);
    const int64_t high = task_.causal ? first + count : smaller(frames_, first + count + reach);
    return {first, count, larger(0, first - reach), high};
  }

  // The tile's rows of an operand, times a factor, as [channel][query].
  void turn(Operand operand, int64_t unit, const Tile& tile, float factor, float* to) const {
    const Lanes times = Lanes::fill(factor);
    for (int64_t c = 0; c < channels_; c += kLanes, to += kLanes * kPitch) {
      const float* const from = row(operand, unit, tile.first) + place_of(c, frames_);
      for (int64_t first = 0; first < tile.count; first += kLanes) {
        Lanes square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          square[i] = first + i < tile.count ? Lanes::load(from + (first + i) * kChunk) * times : Lanes::fill(0.0f);
        }
        transpose(square);
        for (int64_t i = 0; i < kLanes; ++i) square[i].store(to + i * kPitch + first);
      }
    }
  }

  // The sums over a row's channels of keys, or values, times what is turned round.
  void score(Operand operand, int64_t unit, const Tile& tile, const float* turned, float* to) const {
    const Product product{row(operand, unit, tile.low), frames_ * kChunk, turned, to, channels_, kLanes, kLanes};
    multiply<OfKeys>(product, tile.keys(), tile.vectors());
  }

  // Of scores the weights before they are divided by their sum, which is returned for each query as its reciprocal.
  template <int V> void soften(int64_t head, const Tile& tile, float* scores, float* reciprocals) const {
    const float* table =
        plan_.table ? plan_.table + head * plan_.table_step + tile.first - tile.low + frames_ - 1 : nullptr;
    Lanes most[V], sums[V];
    for (int v = 0; v < V; ++v) most[v] = Lanes::fill(-std::numeric_limits<float>::max()), sums[v] = Lanes::fill(0.0f);
    float* const end = scores + tile.keys() * kPitch;
    for (float* at = scores; at != end; at += kPitch) {
      for (int v = 0; v < V; ++v) {
        Lanes score = Lanes::load(at + v * kLanes);
        if (table) (score = score + Lanes::load(table + v * kLanes)).store(at + v * kLanes);
        most[v] = maximum(score, most[v]);
      }
      if (table) --table;
    }
    for (float* at = scores; at != end; at += kPitch) {
      for (int v = 0; v < V; ++v) {
        const Lanes weight = exp2(Lanes::load(at + v * kLanes) - most[v]);
        weight.store(at + v * kLanes);
        sums[v] = sums[v] + weight;
      }
    }
    for (int v = 0; v < V; ++v) (Lanes::fill(1.0f) / sums[v]).store(reciprocals + v * kLanes);
    for (int64_t i = tile.count; i < V * kLanes; ++i) reciprocals[i] = 0;  // no query, which may see no key
    if (const bool* const empty = empty_rows(head, tile)) {
      for (int64_t i = 0; i < tile.count; ++i) reciprocals[i] = empty[i] ? 0 : reciprocals[i];
    }
  }

  const bool* empty_rows(int64_t head, const Tile& tile) const {
    return plan_.empty ? plan_.empty + head * frames_ + tile.first : nullptr;
  }

  void weigh(int64_t unit, const Tile& tile, float* turned, float* scores, float* reciprocals) const {
    turn(kQuery, unit, tile, plan_.scale * static_cast<float>(-kSiluScale), turned);
    score(kKey, unit, tile, turned, scores);
    const int64_t head = head_of(unit);
    if (tile.vectors() == 1) soften<1>(head, tile, scores, reciprocals);
    else soften<kVectors>(head, tile, scores, reciprocals);
  }

  // For each pair of a row's vectors, and what is left over.
  template <class At> void for_vectors(const At& at) const {
    for (int64_t v = 0; v < vectors_; v += kVectors) {
      at(place_of(v * kLanes, frames_), smaller(kVectors, vectors_ - v));
    }
  }

  template <class Lie>
  void spread(const float* weights, int64_t depth, const float* rows, float* to, int64_t count) const {
    const int64_t apart = kLanes == kChunk ? frames_ * kChunk : kLanes;
    for_vectors([&](int64_t place, int64_t vectors) {
      multiply<Lie>({weights, kChunk * Lie::step, rows + place, to + place, depth, apart, apart}, count, vectors);
    });
  }

  // --- forward

  // The result takes the place of the queries, which are turned round by then; it is still to be divided.
  void attend(int64_t unit) const {
    float *const turned = scratch_ + plan_.turned_at, *const scores = scratch_ + plan_.scores_at;
    float* const factors = scratch_ + plan_.factors_at + unit * frames_;
    for (int64_t first = 0; first < frames_; first += kTile) {
      const Tile tile = tile_at(first);
      float reciprocals[kTile];
      weigh(unit, tile, turned, scores, reciprocals);
      for (int64_t i = 0; i < tile.count; ++i) factors[first + i] = reciprocals[i];
      spread<OverKeys>(scores, tile.keys(), row(kValue, unit, tile.low), row(kQuery, unit, first), tile.count);
    }
    if (plan_.empty) clear_empty(kQuery, unit, 0, frames_);
  }

  // 0 whatever the values are.
  void clear_empty(Operand operand, int64_t unit, int64_t first, int64_t count) const {
    const bool* const empty = plan_.empty + head_of(unit) * frames_;
    for (int64_t t = first; t < first + count; ++t) {
      for (int64_t c = 0; empty[t] && c < plan_.chunks; ++c) {
        clear(row(operand, unit, t) + c * frames_ * kChunk, kChunk);
      }
    }
  }

  // --- backward

  // With weights P and their gradients G = value . gradient: the slopes P (G - sum P G) are the scores' gradients.
  template <int V> void find_slopes(const Tile& tile, const float* reciprocals, float* scores, float* slopes) const {
    Lanes factor[V], sums[V];
    for (int v = 0; v < V; ++v) factor[v] = Lanes::load(reciprocals + v * kLanes), sums[v] = Lanes::fill(0.0f);
    for (int64_t i = 0; i < tile.keys() * kPitch; i += kPitch) {
      for (int v = 0; v < V; ++v) {
        const int64_t at = i + v * kLanes;
        const Lanes weight = Lanes::load(scores + at) * factor[v];
        weight.store(scores + at);
        sums[v] = multiply_add(weight, Lanes::load(slopes + at), sums[v]);
      }
    }
    for (int64_t i = 0; i < tile.keys() * kPitch; i += kPitch) {
      for (int v = 0; v < V; ++v) {
        const int64_t at = i + v * kLanes;
        (Lanes::load(scores + at) * (Lanes::load(slopes + at) - sums[v])).store(slopes + at);
      }
      for (int v = V; v < kVectors; ++v) Lanes::fill(0.0f).store(slopes + i + v * kLanes);
    }
  }

  void differentiate(int64_t unit) const {
    float *const turned = scratch_ + plan_.turned_at, *const gradient = scratch_ + plan_.gradient_at;
    float *const scores = scratch_ + plan_.scores_at, *const slopes = scratch_ + plan_.slopes_at;
    if (plan_.empty) clear_empty(kGradient, unit, 0, frames_);
    for (int64_t first = 0; first < frames_; first += kTile) {
      const Tile tile = tile_at(first);
      float reciprocals[kTile];
      weigh(unit, tile, turned, scores, reciprocals);
      turn(kGradient, unit, tile, 1, gradient);
      score(kValue, unit, tile, gradient, slopes);
      if (tile.vectors() == 1) find_slopes<1>(tile, reciprocals, scores, slopes);
      else find_slopes<kVectors>(tile, reciprocals, scores, slopes);
      const auto keys = [&](Operand operand) { return row(operand, unit, tile.low); };
      spread<OverQueries>(scores, tile.count, row(kGradient, unit, first), keys(kOfValue), tile.keys());
      spread<OverQueries>(slopes, tile.count, row(kQuery, unit, first), keys(kOfKey), tile.keys());
      spread<OverKeys>(slopes, tile.keys(), keys(kKey), row(kQuery, unit, first), tile.count);
      if (plan_.lag_sums) sum_lags(unit % block_.heads, tile, slopes);
    }
    if (plan_.empty) clear_empty(kQuery, unit, 0, frames_);
  }

  // Down the diagonals of [key][query]: what the lanes read beyond a row of slopes are zeros.
  void sum_lags(int64_t head, const Tile& tile, const float* slopes) const {
    float* const sums = scratch_ + plan_.lags_at + head * plan_.lags_size;
    const int64_t last = tile.first + tile.count - 1 - tile.low + frames_ - 1;
    for (int64_t lag = tile.first - (tile.high - 1) + frames_ - 1; lag <= last; lag += kLanes) {
      const int64_t behind = lag - (frames_ - 1) - tile.first;  // the query of key 0, in the tile
      const int64_t low = larger(tile.low, -behind - kLanes + 1), high = smaller(tile.high, kTile - behind);
      Lanes sum = Lanes::load(sums + lag);
      for (int64_t key = low; key < high; ++key) {
        sum = sum + Lanes::load(slopes + (key - tile.low) * kPitch + behind + key);
      }
      sum.store(sums + lag);
    }
  }

  void add_lags() const {
    const int64_t lags = 2 * frames_ - 1;
    for (int64_t head = 0; head < block_.heads; ++head) {
      const float* const sums = scratch_ + plan_.lags_at + head * plan_.lags_size;
      double* const to = plan_.lag_sums + (index_ * task_.heads + block_.first_head + head) * lags;
      for (int64_t lag = 0; lag < lags; ++lag) to[lag] += sums[lag];
    }
  }

  void write_gradients() const {
    if (task_.rotary) rotate(kQuery, -1), rotate(kOfKey, -1);
    const auto factor = [this](Operand operand, int64_t, int64_t) { return operand == kOfValue ? 1 : plan_.scale; };
    if (task_.gq.data) write({{kQuery, &task_.gq}}, false, factor);
    if (task_.gk.data) write({{kOfKey, &task_.gk}}, false, factor);
    if (task_.gv.data) write({{kOfValue, &task_.gv}}, false, factor);
  }

  const AttentionPlan& plan_;
  const lf_temporal_attention& task_;
  const int64_t index_, frames_, channels_, vectors_;
  float* const scratch_;
  Block block_{};  // at hand, and of how many units
  int64_t units_ = 0;
};

template <class T> void run_forward(const AttentionPlan& plan, int64_t piece, float* scratch) noexcept {
  Piece<T>(plan, piece, scratch).forward();
}
template <class T> void run_backward(const AttentionPlan& plan, int64_t piece, float* scratch) noexcept {
  Piece<T>(plan, piece, scratch).backward();
}

template <class T> inline AttentionKernels kernels_for() { return {kLanes, run_forward<T>, run_backward<T>}; }

inline AttentionKernels kernels_for(lf_dtype dtype) {
  switch (dtype) {
    case LF_FLOAT16: return kernels_for<Half>();
    case LF_BFLOAT16: return kernels_for<BFloat16>();
    default: return kernels_for<float>();
  }
}

}  // namespace
}  // namespace lf

#endif  // LF_TEMPORAL_ATTENTION_KERNEL_H
