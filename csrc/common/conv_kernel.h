// The work of a convolution over time on one piece of a plan, for the width of vectors that this file is compiled for;
// see conv_plan.h. Three translation units include it. All of it has internal linkage.
#ifndef LF_COMMON_CONV_KERNEL_H
#define LF_COMMON_CONV_KERNEL_H

#include <utility>

#include "common/conv_lanes.h"
#include "common/conv_plan.h"
#include "common/silu.h"

namespace lf {
namespace {

constexpr int kVectors = 2;                         // of a panel's width
constexpr int64_t kPanelWidth = kVectors * kLanes;  // output channels of one kernel call
// Pixels: with what they are of, the sums leave no register over.
constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
constexpr int64_t kLineBytes = kDepth * sizeof(float);
static_assert(kRows <= kMostRows && kPanelWidth <= kMostWidth && kDepth % kLanes == 0, "what the plan has room for");

// --- memory ----------------------------------------------------------------------------------------------------------

// Elements (r, c), each `row` and `column` elements from the last, of `rows` x `columns`; and the same as dense rows of
// floats, `stride` apart. A side on which rows lie together is read and written along them.
struct Box {
  int64_t rows, columns, row, column;
};

template <class T> inline void read_box(float* to, int64_t stride, const T* from, const Box& box) {
  int64_t columns = 0;
  if (box.column == 1) {
    for (int64_t r = 0; r < box.rows; ++r) {
      for_lanes(box.columns, [&](int64_t c, auto n) {
        store(to + r * stride + c, load(from + r * box.row + c, n), n);
      });
    }
    return;
  }
  if (box.row == 1) {
    for (; columns + kLanes <= box.columns; columns += kLanes) {
      int64_t r = 0;
      for (; r + kLanes <= box.rows; r += kLanes) {
        Lanes square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) square[i] = Lanes::load(from + r + (columns + i) * box.column);
        transpose(square);
        for (int64_t i = 0; i < kLanes; ++i) square[i].store(to + (r + i) * stride + columns);
      }
      for (int64_t i = 0; i < kLanes; ++i) {
        for (int64_t rest = r; rest < box.rows; ++rest) {
          to[rest * stride + columns + i] = widen(from[rest + (columns + i) * box.column]);
        }
      }
    }
  }
  for (int64_t c = columns; c < box.columns; ++c) {
    for (int64_t r = 0; r < box.rows; ++r) to[r * stride + c] = widen(from[r * box.row + c * box.column]);
  }
}

template <class T> inline void write_box(T* to, const Box& box, const float* from, int64_t stride) {
  int64_t columns = 0;
  if (box.column == 1) {
    for (int64_t r = 0; r < box.rows; ++r) {
      for_lanes(box.columns, [&](int64_t c, auto n) {
        store(to + r * box.row + c, load(from + r * stride + c, n), n);
      });
    }
    return;
  }
  if (box.row == 1) {
    for (; columns + kLanes <= box.columns; columns += kLanes) {
      int64_t r = 0;
      for (; r + kLanes <= box.rows; r += kLanes) {
        Lanes square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) square[i] = Lanes::load(from + (r + i) * stride + columns);
        transpose(square);
        for (int64_t i = 0; i < kLanes; ++i) square[i].store(to + r + (columns + i) * box.column);
      }
      for (int64_t i = 0; i < kLanes; ++i) {
        for (int64_t rest = r; rest < box.rows; ++rest) {
          to[rest + (columns + i) * box.column] = narrow<T>(from[rest * stride + columns + i]);
        }
      }
    }
  }
  for (int64_t c = columns; c < box.columns; ++c) {
    for (int64_t r = 0; r < box.rows; ++r) to[r * box.row + c * box.column] = narrow<T>(from[r * stride + c]);
  }
}

// --- the kernel ------------------------------------------------------------------------------------------------------

// What becomes of the sums after a step.
enum class Then {
  kGoOn,    // the next step adds to them
  kPark,    // to memory
  kSplit,   // plus what is parked to the next step, minus it to where it was parked
  kFinish,  // to the next output
  kPair,    // plus what is carried to the next output, and carried from now on themselves
};

// Sums of packed input times packed weights over all input channels.
struct Step {
  const float* input;
  const float* weights;
  Then then;
  bool resume;  // after kPark, kFinish and kPair: the next step begins at what is parked, not at 0
};

// Frames of the same sums; there may be none.
struct Output {
  float* to;
  int64_t stride;     // from pixel to pixel
  const float* bias;  // as wide as the panel
  int64_t copies, step;
};

// Lines of memory from `at` to `end` that are soon read, some to be asked for at a time.
struct Ahead {
  const char *at, *end;
  int64_t lines;
};

struct Call {
  const Step* steps;
  int64_t count;
  int64_t pixel;  // floats from the steps' inputs to the first pixel's
  int64_t depth;  // input channels
  int64_t chunk;  // floats from kDepth of them to the next
  float *parked, *carried;
  const Output* outputs;
  int64_t columns;  // to be stored
  bool stream;      // past the caches
  Ahead ahead;
};

template <int M, int V> inline void begin(Lanes (&sums)[M][V], const float* at) {
  if (at) for_sums<M, V>([&](int m, int v) { sums[m][v] = Lanes::load(at + (m * V + v) * kLanes); });
  else for_sums<M, V>([&](int m, int v) { sums[m][v] = Lanes::fill(0.0f); });
}

template <int M, int V> inline void write(const Lanes (&sums)[M][V], const Output& output, const Call& call) {
  float* to = output.to;
  for (int64_t i = 0; i < output.copies; ++i, to += output.step) {
    const auto at = [=](int m, int v) { return to + m * output.stride + v * kLanes; };
    if (call.stream) {
      for_sums<M, V>([&](int m, int v) { stream(at(m, v), sums[m][v]); });
    } else if (call.columns >= V * kLanes) {
      for_sums<M, V>([&](int m, int v) { sums[m][v].store(at(m, v)); });
    } else {
      for_sums<M, V>([&](int m, int v) {
        const int64_t n = call.columns - v * kLanes;
        if (n >= kLanes) sums[m][v].store(at(m, v));
        else store(at(m, v), sums[m][v], n);
      });
    }
  }
}

// Sums for M pixels by V vectors of output channels stay in registers from the first step to the last.
template <int M, int V> void run_steps(const Call& call) noexcept {
  Lanes sums[M][V];
  const Output* output = call.outputs;
  const char* ahead = call.ahead.at;
  begin(sums, nullptr);
  for (int64_t i = 0; i < call.count; ++i) {
    const Step& step = call.steps[i];
    const float* input = step.input + call.pixel;
    const float* weights = step.weights;
    for (int64_t left = call.depth; left > 0; left -= kDepth, input += call.chunk) {
      const float* const end = input + (left < kDepth ? left : kDepth);
      for (int64_t n = call.ahead.lines; n > 0 && ahead < call.ahead.end; --n, ahead += kLineBytes) prefetch(ahead);
      for (const float* at = input; at != end; ++at, weights += V * kLanes) {
        for_sums<M, V>([&](int m, int v) {
          sums[m][v] = multiply_add(Lanes::fill(at[m * kDepth]), Lanes::load(weights + v * kLanes), sums[m][v]);
        });
      }
    }
    float* const tile = step.then == Then::kPair ? call.carried : call.parked;
    const auto kept = [=](int m, int v) { return tile + (m * V + v) * kLanes; };
    const float* const next = step.resume ? call.parked : nullptr;
    switch (step.then) {
      case Then::kGoOn: break;
      case Then::kPark:
        for_sums<M, V>([&](int m, int v) { sums[m][v].store(kept(m, v)); });
        begin(sums, next);
        break;
      case Then::kSplit:
        for_sums<M, V>([&](int m, int v) {
          const Lanes other = Lanes::load(kept(m, v));
          (sums[m][v] - other).store(kept(m, v));
          sums[m][v] = sums[m][v] + other;
        });
        break;
      case Then::kPair:
        for_sums<M, V>([&](int m, int v) {
          const Lanes other = Lanes::load(kept(m, v));
          sums[m][v].store(kept(m, v));
          sums[m][v] = sums[m][v] + other;
        });
        [[fallthrough]];
      case Then::kFinish: {
        const float* const bias = output->bias;
        for_sums<M, V>([&](int m, int v) { sums[m][v] = sums[m][v] + Lanes::load(bias + v * kLanes); });
        write(sums, *output++, call);
        begin(sums, next);
        break;
      }
    }
  }
}

using RunSteps = void (*)(const Call&) noexcept;
template <int V, int... M> inline RunSteps kernel_of(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr RunSteps table[] = {run_steps<M + 1, V>...};
  return table[rows - 1];
}
inline RunSteps kernel_of(int64_t rows, int64_t vectors) {
  const std::make_integer_sequence<int, kRows> all;
  return vectors == 1 ? kernel_of<1>(rows, all) : kernel_of<kVectors>(rows, all);
}

// --- weights ---------------------------------------------------------------------------------------------------------

// Of three taps filtered two at a time: W_0, W_1, W_2, W_0 + W_2, and all three.
constexpr int64_t kOuter = 3, kWhole = 4;

// Taps [first, end).
struct Taps {
  int64_t first, end;
};

// The phases of copies whose taps fall on the same frames, those from `phase` on, and these frames, from the one that
// is copied.
struct Phases {
  int64_t end, first_frame, last_frame;
};
inline int64_t floor_divide(int64_t a, int64_t b) { return a < 0 ? -((b - 1 - a) / b) : a / b; }
inline Phases phases_from(int64_t phase, int64_t radius, int64_t copies) {
  const bool middle = phase >= radius && phase < copies - radius;
  return {middle ? copies - radius : phase + 1, floor_divide(phase - radius, copies), (phase + radius) / copies};
}

// Calls at(product, taps) for each matrix of packed weights that is a sum of taps behind one another.
template <class At> inline void for_products(const ConvPlan& plan, const At& at) {
  const int64_t taps = plan.task.taps, radius = plan.radius, copies = plan.task.copies;
  int64_t product = 0;
  if (plan.schedule == ConvSchedule::kPhases) {
    for (int64_t phase = 0; phase < copies;) {
      const Phases phases = phases_from(phase, radius, copies);
      for (int64_t v = phases.first_frame; v <= phases.last_frame; ++v) {
        const int64_t first = v * copies - phase + radius;
        at(product++, Taps{larger(first, 0), smaller(first + copies, taps)});
      }
      phase = phases.end;
    }
    return;
  }
  for (; product < taps; ++product) at(product, Taps{product, product + 1});
  if (plan.schedule == ConvSchedule::kFilteredUp && copies > 2) at(kWhole, Taps{0, taps});
}

// From [input channel][tap][lane] to the products, `width` floats from channel to channel.
inline void pack_vector(const ConvPlan& plan, const float* from, int64_t channels, float* packed, int64_t width,
                        int64_t product_size) {
  const int64_t step = plan.task.taps * kLanes;
  const auto each = [&](int64_t product, const auto& of_taps) {
    float* to = packed + product * product_size;
    const float* g = from;
    for (int64_t i = 0; i < channels; ++i, g += step, to += width) of_taps(g).store(to);
  };
  const auto tap = [](const float* g, int64_t j) { return Lanes::load(g + j * kLanes); };
  if (plan.schedule == ConvSchedule::kFiltered) {
    const Lanes half = Lanes::fill(0.5f);
    each(0, [&](const float* g) { return (tap(g, 0) + tap(g, 2) - tap(g, 1)) * half; });
    each(1, [&](const float* g) { return (tap(g, 0) + tap(g, 2) + tap(g, 1)) * half; });
    each(2, [&](const float* g) { return tap(g, 0); });
    each(3, [&](const float* g) { return tap(g, 2); });
    return;
  }
  for_products(plan, [&](int64_t product, Taps taps) {
    each(product, [&](const float* g) {
      Lanes sum = tap(g, taps.first);
      for (int64_t j = taps.first + 1; j < taps.end; ++j) sum = sum + tap(g, j);
      return sum;
    });
  });
  if (plan.filtered > 0) each(kOuter, [&](const float* g) { return tap(g, 0) + tap(g, 2); });
}

// The panel's vectors, each of `kLanes` output channels, taken `kPackedAtOnce` input channels at a time: turned round
// into scratch [input channel][tap][lane], and from there in the order of the products.
template <class T> void pack_panel(const ConvPlan& plan, int64_t panel, float* scratch) noexcept {
  const ConvTask& task = plan.task;
  const int64_t first = panel * kPanelWidth, width = smaller(kPanelWidth, plan.padded_out - first), taps = task.taps;
  const int64_t of_out = task.weight_strides[0], of_in = task.weight_strides[1], of_tap = task.weight_strides[2];
  const bool merged = of_tap == 1 && of_in == taps;
  const int64_t product_size = task.in * width;
  float* const packed = plan.weights + first * plan.products * task.in;
  for (int64_t c = 0; c < task.in; c += kPackedAtOnce) {
    const int64_t channels = smaller(kPackedAtOnce, task.in - c);
    for (int64_t v = 0; v < width; v += kLanes) {
      const int64_t lanes = larger(0, smaller(kLanes, task.out - first - v));
      if (lanes < kLanes) {
        for (int64_t i = 0; i < channels * taps * kLanes; ++i) scratch[i] = 0;
      }
      const T* from = static_cast<const T*>(task.weight) + (first + v) * of_out + c * of_in;
      if (merged) {
        read_box(scratch, kLanes, from, {channels * taps, lanes, 1, of_out});
      } else {
        for (int64_t j = 0; j < taps; ++j) {
          read_box(scratch + j * kLanes, taps * kLanes, from + j * of_tap, {channels, lanes, of_in, of_out});
        }
      }
      pack_vector(plan, scratch, channels, packed + c * width + v, width, product_size);
    }
  }
}

// --- a piece ---------------------------------------------------------------------------------------------------------

template <class T> class Piece {
 public:
  Piece(const ConvPlan& plan, int64_t index, float* scratch)
      : plan_(plan),
        task_(plan.task),
        index_(index),
        clip_(index / (plan.rows * plan.blocks)),
        row_(index / plan.blocks % plan.rows),
        first_(index % plan.blocks * plan.pixels / plan.blocks),
        pixels_((index % plan.blocks + 1) * plan.pixels / plan.blocks - first_),
        chunk_(plan.block * kDepth),
        scratch_(scratch),
        steps_(reinterpret_cast<Step*>(scratch + plan.steps_at)) {}

  void run() {
    if (plan_.filtered > 0 && !task_.replicate) {
      for (int64_t i = 0; i < plan_.slot_size; i += kLanes) Lanes::fill(0.0f).store(scratch_ + plan_.zeros_at + i);
    }
    for (int64_t t = 0; t < plan_.turns; t += plan_.group) {
      const int64_t end = smaller(plan_.turns, t + plan_.group);
      for (const int64_t needed = frames_before(end); read_ < needed; ++read_) {
        if (takes(read_)) read_frame(read_);
      }
      if (plan_.ahead) look_ahead(t, end);
      for (int64_t turn = t; plan_.filtered > 0 && turn < end; turn += plan_.step) filter(turn, filtered(turn - t));
      for (int64_t column = 0; column < plan_.padded_out; column += kPanelWidth) convolve(t, end, column);
    }
    if (task_.stats_groups > 0) summarise();
    if (plan_.stream) end_streams();
  }

 private:
  template <class E> E* at(const Place& place, int64_t t, int64_t pixel) const {
    return reinterpret_cast<E*>(place.data) + clip_ * place.batch + t * place.frame + row_ * place.row +
           (first_ + pixel) * place.pixel;
  }
  float* slot(int64_t t) const { return scratch_ + t % plan_.slots * plan_.slot_size; }
  float* filtered(int64_t turn) const {
    return scratch_ + plan_.filtered_at + turn / plan_.step * plan_.filtered * plan_.slot_size;
  }
  // Those that turns before `end` take are before this one.
  int64_t frames_before(int64_t end) const {
    return smaller(task_.frames, task_.stride * (end - 1) + plan_.after + 1);
  }
  // Whether any turn does: a stride may step over frames.
  bool takes(int64_t t) const { return (t + plan_.before) % task_.stride <= plan_.before + plan_.after; }
  // Null for a frame of zeros.
  const float* frame(int64_t t) const {
    if (task_.replicate) return slot(larger(0, smaller(t, task_.frames - 1)));
    return t < 0 || t >= task_.frames ? nullptr : slot(t);
  }

  void read_frame(int64_t t) {
    const T* from = at<const T>(plan_.x, t, 0);
    float* to = slot(t);
    if (plan_.x.channel == 1) {
      if (!task_.multiplier) return read_rows<false, false>(to, from, t);
      return task_.norm_silu ? read_rows<true, true>(to, from, t) : read_rows<true, false>(to, from, t);
    }
    for (int64_t c = 0; c < task_.in; c += kDepth, to += chunk_) {
      const Box box{pixels_, smaller(kDepth, task_.in - c), plan_.x.pixel, plan_.x.channel};
      read_box(to, kDepth, from + c * plan_.x.channel, box);
      if (task_.multiplier) task_.norm_silu ? normalise<true>(to, c, t) : normalise<false>(to, c, t);
    }
  }

  // The frames that the turns after [t, end) read first are asked for while those are convolved, in equal shares.
  void look_ahead(int64_t t, int64_t end) {
    const int64_t panels = (plan_.padded_out + kPanelWidth - 1) / kPanelWidth, strips = (pixels_ + kRows - 1) / kRows;
    const int64_t calls = panels * strips * ((end - t + plan_.step - 1) / plan_.step);
    ahead_frame_ = read_;
    ahead_end_ = frames_before(smaller(plan_.turns, end + plan_.group));
    ahead_at_ = 0;
    ahead_share_ = ((ahead_end_ - read_) * frame_bytes() / calls / kLineBytes + 1) * kLineBytes;
    while (ahead_frame_ < ahead_end_ && !takes(ahead_frame_)) ++ahead_frame_;
  }
  int64_t frame_bytes() const { return pixels_ * task_.in * static_cast<int64_t>(sizeof(T)); }
  Ahead next_ahead() {
    if (ahead_frame_ >= ahead_end_) return {};
    const char* const frame = reinterpret_cast<const char*>(at<const T>(plan_.x, ahead_frame_, 0));
    const int64_t from = ahead_at_;
    ahead_at_ = smaller(frame_bytes(), from + ahead_share_);
    const Ahead ahead{frame + from, frame + ahead_at_, ahead_lines_};
    if (ahead_at_ == frame_bytes()) {
      ahead_at_ = 0;
      while (++ahead_frame_ < ahead_end_ && !takes(ahead_frame_)) continue;
    }
    return ahead;
  }

  // Where channels lie together: along them, pixel after pixel. Inlined, its forms would cost one another registers.
  template <bool normed, bool activated> [[gnu::noinline]] void read_rows(float* to, const T* from, int64_t t) {
    const float* multiplier = task_.multiplier + (clip_ * task_.frames + t) * plan_.depth;
    const float* offset = task_.offset + (clip_ * task_.frames + t) * plan_.depth;
    const int64_t in = task_.in, step = plan_.x.pixel, chunk = chunk_;
    for (int64_t p = 0; p < pixels_; ++p, from += step, to += kDepth) {
      for_lanes(in, [=](int64_t c, auto n) {
        Lanes h = load(from + c, n);
        if (normed) h = multiply_add(h, Lanes::load(multiplier + c), Lanes::load(offset + c));
        if (activated) h = silu(h);
        h.store(to + c / kDepth * chunk + c % kDepth);
      });
    }
  }

  template <bool activated> [[gnu::noinline]] void normalise(float* packed, int64_t channel, int64_t t) {
    const int64_t where = (clip_ * task_.frames + t) * plan_.depth + channel;
    for (int64_t c = 0; c < kDepth; c += kLanes) {
      const Lanes multiplier = Lanes::load(task_.multiplier + where + c);
      const Lanes offset = Lanes::load(task_.offset + where + c);
      for (int64_t p = 0; p < pixels_; ++p) {
        float* const value = packed + p * kDepth + c;
        const Lanes h = multiply_add(Lanes::load(value), multiplier, offset);
        (activated ? silu(h) : h).store(value);
      }
    }
  }

  const float* frame_or_zeros(int64_t t) const {
    const float* known = frame(t);
    return known ? known : scratch_ + plan_.zeros_at;
  }

  // Sums and differences of frames, for the products of a turn and the next.
  void filter(int64_t turn, float* to) {
    const int64_t size = plan_.slot_size;
    if (plan_.schedule == ConvSchedule::kFiltered) {
      const float *d0 = frame_or_zeros(turn - 1), *d1 = frame_or_zeros(turn);
      const float *d2 = frame_or_zeros(turn + 1), *d3 = frame_or_zeros(turn + 2);
      for (int64_t i = 0; i < size; i += kLanes) {
        const Lanes h0 = Lanes::load(d0 + i), h1 = Lanes::load(d1 + i);
        const Lanes h2 = Lanes::load(d2 + i), h3 = Lanes::load(d3 + i);
        (h2 - h1).store(to + i);
        (h1 + h2).store(to + i + size);
        (h0 - h2).store(to + i + 2 * size);
        (h3 - h1).store(to + i + 3 * size);
      }
    } else {
      const int64_t middle = shared(turn), step = task_.stride;
      const float *a = frame_or_zeros(middle - step), *b = frame_or_zeros(middle), *c = frame_or_zeros(middle + step);
      for (int64_t i = 0; i < size; i += kLanes) {
        const Lanes h = Lanes::load(b + i);
        (Lanes::load(a + i) - h).store(to + i);
        (Lanes::load(c + i) - h).store(to + i + size);
      }
    }
  }

  // Of F(2, 2): the frame that both outputs of a turn and the next take.
  int64_t shared(int64_t turn) const { return plan_.schedule == ConvSchedule::kFilteredDown ? 2 * turn + 1 : turn; }

  // --- turns ---

  // Turns [t, end) of the output channels of one panel.
  void convolve(int64_t t, int64_t end, int64_t column) {
    const int64_t strips = (pixels_ + kRows - 1) / kRows;
    column_ = column;
    for (int64_t turn = t; turn < end; turn += plan_.step) {
      const float* known = filtered(turn - t);
      for (int64_t phase = 0; phase < task_.copies;) {
        count_ = outputs_ = 0;
        phase = prepare(turn, phase, known);
        const int64_t chunks = count_ * plan_.depth / kDepth;
        if (plan_.ahead) ahead_lines_ = (ahead_share_ / kLineBytes + chunks - 1) / chunks;
        for (int64_t i = 0; i < strips; ++i) {
          const int64_t pixel = pixels_ * i / strips;
          run_tile(pixel, pixels_ * (i + 1) / strips - pixel);
        }
      }
    }
  }

  // Steps and outputs from a phase of a turn on; the phase to go on with.
  int64_t prepare(int64_t turn, int64_t phase, const float* known) {
    switch (plan_.schedule) {
      case ConvSchedule::kDirect: direct(turn); break;
      case ConvSchedule::kPhases: return phases(turn, phase);
      case ConvSchedule::kFiltered: filtered_plain(turn, known); break;
      case ConvSchedule::kFilteredDown: filtered_down(turn, known); break;
      case ConvSchedule::kFilteredUp: filtered_up(turn, known); break;
    }
    return task_.copies;
  }

  void direct(int64_t i) {
    const int64_t first = task_.stride * i - plan_.radius;
    for (int64_t j = 0; j < task_.taps; ++j) add_frame(first + j, j);
    finish(i, 1);
  }

  int64_t phases(int64_t v, int64_t phase) {
    if (phase == 0) product_ = 0;
    const Phases phases = phases_from(phase, plan_.radius, task_.copies);
    for (int64_t i = phases.first_frame; i <= phases.last_frame; ++i) add_frame(v + i, product_++);
    finish(task_.copies * v + phase, phases.end - phase);
    return phases.end;
  }

  void filtered_plain(int64_t t, const float* known) {
    add(known, 0), then(Then::kPark);
    add(known + plan_.slot_size, 1), then(Then::kSplit);
    add(known + 2 * plan_.slot_size, 2), finish(t, 1, kResume);
    if (t + 1 < task_.frames) add(known + 3 * plan_.slot_size, 3), finish(t + 1, 1);
  }

  void filtered_down(int64_t i, const float* known) {
    if (i + 1 == task_.out_frames) return direct(i);
    add(frame(2 * i + 1), kOuter), then(Then::kPark, kResume);
    add(known, 0);
    add(frame(2 * i), 1), finish(i, 1, kResume);
    add(known + plan_.slot_size, 2);
    add(frame(2 * i + 2), 1), finish(i + 1, 1);
  }

  // What is carried is the last of m and p so far, from turn to turn.
  void filtered_up(int64_t v, const float* known) {
    const int64_t next = task_.copies * v;
    if (v == task_.frames) {
      add(frame(v - 1), 0), pair(next - 1, 1);
      return;
    }
    add(frame(v), kOuter), then(Then::kPark, kResume);
    add(known, 0), pair(next - 1, v > 0);
    all_but_last_of(v, kResume);
    add(known + plan_.slot_size, 2), pair(next + task_.copies - 1, 1);
    if (v + 1 < task_.frames) all_but_last_of(v + 1);
  }

  void all_but_last_of(int64_t v, bool resume = false) {
    const int64_t first = task_.copies * v, others = task_.copies - 2;
    add(frame(v), 1), pair(first, 1, resume && others == 0);
    if (others > 0) add(frame(v), kWhole), finish(first + 1, others, resume);
  }

  // --- what a kernel is called with ---

  void add(const float* input, int64_t product) {
    const float* weights = plan_.weights + (column_ * plan_.products + product * width()) * task_.in;
    steps_[count_++] = {input, weights, Then::kGoOn, false};
  }
  void add_frame(int64_t t, int64_t product) {
    if (const float* input = frame(t)) add(input, product);
  }
  void then(Then what, bool resume = false) {
    Step& step = steps_[count_ - 1];
    step.then = what, step.resume = resume;
  }
  void finish(int64_t t, int64_t copies, bool resume = false) {
    then(Then::kFinish, resume);
    runs_[outputs_++] = {t, copies};
  }
  void pair(int64_t t, int64_t copies, bool resume = false) {
    then(Then::kPair, resume);
    runs_[outputs_++] = {t, copies};
  }
  int64_t width() const { return smaller(kPanelWidth, plan_.padded_out - column_); }

  // Into y itself where it is floats that lie together, else by way of scratch memory; so too where y is to be
  // streamed, which is done once, and the sums are not all of it.
  void run_tile(int64_t pixel, int64_t rows) {
    constexpr bool same = std::is_same<T, float>::value;
    const int64_t column = column_;
    const bool finished = !task_.silu && !task_.residual.data && task_.stats_groups == 0;
    const bool straight = same && plan_.y.channel == 1 && (finished || !plan_.stream);
    const int64_t columns = smaller(kPanelWidth, task_.out - column);
    Output output[kMostRuns];
    for (int64_t i = 0; i < outputs_; ++i) {
      const auto [t, copies] = runs_[i];
      const float* bias = plan_.bias + (clip_ * task_.out_frames + t) * plan_.frame_bias + column;
      output[i] = {scratch_ + plan_.tiles_at + i * kMostRows * kMostWidth, kPanelWidth, bias, 1, 0};
      if (straight) output[i] = {at<float>(plan_.y, t, pixel) + column, plan_.y.pixel, bias, copies, plan_.y.frame};
    }
    float* const parked = scratch_ + plan_.parked_at;
    float* const carried = scratch_ + plan_.carried_at + column * pixels_ + pixel * width();
    const Call call{steps_,  count_, pixel * kDepth,                  task_.in, chunk_, parked,
                    carried, output, straight ? columns : kPanelWidth, straight && plan_.stream,
                    next_ahead()};
    kernel_of(rows, width() / kLanes)(call);
    for (int64_t i = 0; i < outputs_; ++i) {
      auto [t, copies] = runs_[i];
      finish_rows(output[i], t, pixel, rows, column, columns);
      for (int64_t end = t + copies; !straight && t < end; ++t) {
        T* to = at<T>(plan_.y, t, pixel) + column * plan_.y.channel;
        if (plan_.stream) stream_rows(at<float>(plan_.y, t, pixel) + column, output[i], rows, columns);
        else write_box(to, {rows, columns, plan_.y.pixel, plan_.y.channel}, output[i].to, output[i].stride);
      }
    }
  }

  void stream_rows(float* to, const Output& from, int64_t rows, int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r, to += plan_.y.pixel) {
      for (int64_t c = 0; c < columns; c += kLanes) stream(to + c, Lanes::load(from.to + r * from.stride + c));
    }
  }

  void finish_rows(const Output& output, int64_t t, int64_t pixel, int64_t rows, int64_t column, int64_t columns) {
    if (plan_.residual.data) {
      const T* residual = at<const T>(plan_.residual, t, pixel) + column * plan_.residual.channel;
      if (plan_.residual.channel == 1) {
        add_residual(output, residual, plan_.residual.pixel, rows, columns);
      } else {
        float* read = scratch_ + plan_.residual_at;
        read_box(read, kPanelWidth, residual, {rows, columns, plan_.residual.pixel, plan_.residual.channel});
        add_residual(output, read, kPanelWidth, rows, columns);
      }
    } else if (task_.silu) {
      each_vector(output, rows, columns, [](Lanes y, int64_t, int64_t, auto) { return silu(y); });
    }
    if (task_.stats_groups > 0) add_to_stats(output, t, pixel, rows, column, columns);
  }

  template <class E>
  void add_residual(const Output& output, const E* residual, int64_t stride, int64_t rows, int64_t columns) {
    if (task_.silu) {
      each_vector(output, rows, columns, [=](Lanes y, int64_t r, int64_t c, auto n) {
        return silu(y) + load(residual + r * stride + c, n);
      });
    } else {
      each_vector(output, rows, columns, [=](Lanes y, int64_t r, int64_t c, auto n) {
        return y + load(residual + r * stride + c, n);
      });
    }
  }

  template <class Change>
  static void each_vector(const Output& output, int64_t rows, int64_t columns, const Change& change) {
    for (int64_t r = 0; r < rows; ++r) {
      float* y = output.to + r * output.stride;
      for_lanes(columns, [=](int64_t c, auto n) { store(y + c, change(load(y + c, n), r, c, n), n); });
    }
  }

  // Mean of each channel over the pixels so far and the sum of the squared distances from it: those of these rows, each
  // by two passes, joined to those of the `pixel` rows before as Chan, Golub and LeVeque do.
  void add_to_stats(const Output& output, int64_t t, int64_t pixel, int64_t rows, int64_t column, int64_t columns) {
    float* means = scratch_ + plan_.stats_at + 2 * t * plan_.padded_out + column;
    float* squares = means + plan_.padded_out;
    const float share = static_cast<float>(rows) / static_cast<float>(pixel + rows);
    const Lanes part = Lanes::fill(1.0f / static_cast<float>(rows)), step = Lanes::fill(share);
    const Lanes weight = Lanes::fill(share * static_cast<float>(pixel));
    for_lanes(columns, [&](int64_t c, auto n) {
      const float* y = output.to + c;
      Lanes mean = Lanes::fill(0.0f), square = Lanes::fill(0.0f);
      for (int64_t r = 0; r < rows; ++r) mean = mean + load(y + r * output.stride, n);
      mean = mean * part;
      for (int64_t r = 0; r < rows; ++r) {
        const Lanes distance = load(y + r * output.stride, n) - mean;
        square = multiply_add(distance, distance, square);
      }
      if (pixel > 0) {
        const Lanes apart = mean - Lanes::load(means + c);
        mean = multiply_add(apart, step, Lanes::load(means + c));
        square = multiply_add(apart * apart, weight, square + Lanes::load(squares + c));
      }
      mean.store(means + c);
      square.store(squares + c);
    });
  }

  // The piece's statistics of each frame and group, from those of the channels.
  void summarise() {
    const int64_t channels = task_.out / task_.stats_groups;
    double* partial = task_.partials + index_ * task_.frames * task_.stats_groups * 2;
    for (int64_t t = 0; t < task_.frames; ++t) {
      const float* means = scratch_ + plan_.stats_at + 2 * t * plan_.padded_out;
      const float* squares = means + plan_.padded_out;
      for (int64_t c = 0; c < task_.out; c += channels, partial += 2) {
        double mean = 0, square = 0;
        for (int64_t i = c; i < c + channels; ++i) mean += means[i];
        mean /= static_cast<double>(channels);
        for (int64_t i = c; i < c + channels; ++i) {
          const double distance = means[i] - mean;
          square += squares[i] + static_cast<double>(pixels_) * distance * distance;
        }
        partial[0] = mean;
        partial[1] = square;
      }
    }
  }

  const ConvPlan& plan_;
  const ConvTask& task_;
  const int64_t index_, clip_, row_, first_, pixels_;  // of which clip, row of it and pixels of that
  const int64_t chunk_;  // floats from kDepth channels of a packed frame to the next
  float* const scratch_;
  int64_t read_ = 0;  // frames

  // At hand: a panel, steps of its sums, and the frames of y that each of the sums is.
  struct Run {
    int64_t frame, copies;
  };
  static constexpr bool kResume = true;
  int64_t column_ = 0;
  Step* const steps_;
  Run runs_[kMostRuns];
  int64_t count_ = 0, outputs_ = 0;
  int64_t product_ = 0;  // of kPhases, the next

  // Of frames asked for ahead: the next, that after the last, bytes of it so far, and of a call; lines at a time.
  int64_t ahead_frame_ = 0, ahead_end_ = 0, ahead_at_ = 0, ahead_share_ = 0, ahead_lines_ = 0;
};

template <class T> void run_piece(const ConvPlan& plan, int64_t index, float* scratch) noexcept {
  Piece<T>(plan, index, scratch).run();
}

template <class T> inline ConvKernels kernels_for() { return {kLanes, sizeof(Step), pack_panel<T>, run_piece<T>}; }

inline ConvKernels kernels_for(lf_dtype dtype) {
  switch (dtype) {
    case LF_FLOAT16: return kernels_for<Half>();
    case LF_BFLOAT16: return kernels_for<BFloat16>();
    default: return kernels_for<float>();
  }
}

}  // namespace
}  // namespace lf

#endif  // LF_COMMON_CONV_KERNEL_H
