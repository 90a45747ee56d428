// The work of temporal_conv on one piece of a plan, for the width of vectors that this file is compiled for; see
// temporal_conv.h. Three translation units include it. All of it has internal linkage.
#ifndef LF_TEMPORAL_CONV_KERNEL_H
#define LF_TEMPORAL_CONV_KERNEL_H

#include <utility>

#include "common/silu.h"
#include "temporal_conv.h"
#include "temporal_conv_lanes.h"

namespace lf {
namespace {

constexpr int kVectors = 2;                         // of a panel's width
constexpr int64_t kPanelWidth = kVectors * kLanes;  // output channels of one kernel call
// Pixels: with what they are of, the sums leave no register over.
constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
static_assert(kRows <= kMostRows && kPanelWidth <= kMostWidth && kDepth % kLanes == 0, "what the plan has room for");

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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
  kPark,    // to memory; the next begins at 0
  kSplit,   // plus what is parked to the next step, minus it to where it was parked
  kFinish,  // to the next output; the step after it begins at what is parked
};

// Sums of packed input times packed weights over all input channels.
struct Step {
  const float* input;
  const float* weights;
  Then then;
};

struct Output {
  float* to;
  int64_t stride;     // from pixel to pixel
  const float* bias;  // as wide as the panel
};

struct Call {
  const Step* steps;
  int64_t count;
  int64_t depth;  // input channels
  int64_t chunk;  // floats from kDepth of them to the next
  float* parked;
  const Output* outputs;
  int64_t columns;  // to be stored
  bool stream;      // past the caches
};

// Sums for M pixels by V vectors of output channels stay in registers from the first step to the last.
template <int M, int V> void run_steps(const Call& call) noexcept {
  Lanes sums[M][V];
  const Output* output = call.outputs;
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) sums[m][v] = Lanes::fill(0.0f);
  }
  for (int64_t i = 0; i < call.count; ++i) {
    const float* input = call.steps[i].input;
    const float* weights = call.steps[i].weights;
    for (int64_t left = call.depth; left > 0; left -= kDepth, input += call.chunk) {
      const float* const end = input + (left < kDepth ? left : kDepth);
      for (const float* at = input; at != end; ++at, weights += V * kLanes) {
        Lanes w[V];
        for (int v = 0; v < V; ++v) w[v] = Lanes::load(weights + v * kLanes);
        for (int m = 0; m < M; ++m) {
          const Lanes h = Lanes::fill(at[m * kDepth]);
          for (int v = 0; v < V; ++v) sums[m][v] = multiply_add(h, w[v], sums[m][v]);
        }
      }
    }
    switch (call.steps[i].then) {
      case Then::kGoOn: break;
      case Then::kPark:
        for (int m = 0; m < M; ++m) {
          for (int v = 0; v < V; ++v) {
            sums[m][v].store(call.parked + (m * V + v) * kLanes);
            sums[m][v] = Lanes::fill(0.0f);
          }
        }
        break;
      case Then::kSplit:
        for (int m = 0; m < M; ++m) {
          for (int v = 0; v < V; ++v) {
            float* parked = call.parked + (m * V + v) * kLanes;
            const Lanes other = Lanes::load(parked);
            (sums[m][v] - other).store(parked);
            sums[m][v] = sums[m][v] + other;
          }
        }
        break;
      case Then::kFinish:
        for (int v = 0; v < V; ++v) {
          const Lanes bias = Lanes::load(output->bias + v * kLanes);
          const int64_t n = call.columns - v * kLanes;
          for (int m = 0; m < M; ++m) {
            float* to = output->to + m * output->stride + v * kLanes;
            const Lanes sum = sums[m][v] + bias;
            if (call.stream) stream(to, sum);
            else if (n >= kLanes) sum.store(to);
            else store(to, sum, n);
            sums[m][v] = Lanes::load(call.parked + (m * V + v) * kLanes);
          }
        }
        ++output;
        break;
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

// The panel's vectors, each of `kLanes` output channels, taken `kPackedAtOnce` input channels at a time: turned round
// into scratch [input channel][tap][lane], and from there in the order of the products.
template <class T> void pack_panel(const ConvPlan& plan, int64_t panel, float* scratch) noexcept {
  const int64_t first = panel * kPanelWidth, width = smaller(kPanelWidth, plan.padded_out - first), taps = plan.taps;
  const Place& place = plan.weight;
  const bool merged = place.frame == 1 && place.channel == taps;
  float* const packed = plan.weights + first * plan.products * plan.in;
  for (int64_t c = 0; c < plan.in; c += kPackedAtOnce) {
    const int64_t channels = smaller(kPackedAtOnce, plan.in - c);
    for (int64_t v = 0; v < width; v += kLanes) {
      const int64_t lanes = larger(0, smaller(kLanes, plan.out - first - v));
      if (lanes < kLanes) {
        for (int64_t i = 0; i < channels * taps * kLanes; ++i) scratch[i] = 0;
      }
      const T* from = reinterpret_cast<const T*>(place.data) + (first + v) * place.batch + c * place.channel;
      if (merged) {
        read_box(scratch, kLanes, from, {channels * taps, lanes, 1, place.batch});
      } else {
        for (int64_t j = 0; j < taps; ++j) {
          const Box box{channels, lanes, place.channel, place.batch};
          read_box(scratch + j * kLanes, taps * kLanes, from + j * place.frame, box);
        }
      }
      for (int64_t i = 0; i < channels; ++i) {
        const float* g = scratch + i * taps * kLanes;
        float* to = packed + (c + i) * width + v;
        const int64_t product = plan.in * width;
        if (plan.minimal) {
          const Lanes g0 = Lanes::load(g), g1 = Lanes::load(g + kLanes), g2 = Lanes::load(g + 2 * kLanes);
          const Lanes half = Lanes::fill(0.5f);
          ((g0 + g2 - g1) * half).store(to);
          ((g0 + g2 + g1) * half).store(to + product);
          g0.store(to + 2 * product);
          g2.store(to + 3 * product);
        } else {
          for (int64_t j = 0; j < taps; ++j) Lanes::load(g + j * kLanes).store(to + j * product);
        }
      }
    }
  }
}

// --- a piece ---------------------------------------------------------------------------------------------------------

template <class T> class Piece {
 public:
  Piece(const ConvPlan& plan, int64_t index, float* scratch)
      : plan_(plan),
        index_(index),
        clip_(index / (plan.rows * plan.blocks)),
        row_(index / plan.blocks % plan.rows),
        first_(index % plan.blocks * plan.pixels / plan.blocks),
        pixels_((index % plan.blocks + 1) * plan.pixels / plan.blocks - first_),
        chunk_(plan.block * kDepth),
        scratch_(scratch) {}

  void run() {
    if (plan_.minimal && !plan_.replicate) {
      for (int64_t i = 0; i < plan_.slot_size; i += kLanes) Lanes::fill(0.0f).store(scratch_ + plan_.zeros_at + i);
    }
    for (int64_t t = 0; t < plan_.frames; t += plan_.group) {
      const int64_t end = smaller(plan_.frames, t + plan_.group);
      for (const int64_t needed = smaller(plan_.frames, end + plan_.radius); read_ < needed; ++read_) read_frame(read_);
      if (plan_.minimal) {
        for (int64_t pair = t; pair < end; pair += 2) filter(pair, filtered(pair - t));
      }
      for (int64_t column = 0; column < plan_.padded_out; column += kPanelWidth) convolve(t, end, column);
    }
    if (plan_.stats_groups > 0) summarise();
    if (plan_.stream) end_streams();
  }

 private:
  template <class E> E* at(const Place& place, int64_t t, int64_t pixel) const {
    return reinterpret_cast<E*>(place.data) + clip_ * place.batch + t * place.frame + row_ * place.row +
           (first_ + pixel) * place.pixel;
  }
  float* slot(int64_t t) const { return scratch_ + t % plan_.slots * plan_.slot_size; }
  float* filtered(int64_t frame) const {
    return scratch_ + plan_.filtered_at + frame / 2 * kMinimalProducts * plan_.slot_size;
  }
  // Null for a frame of zeros.
  const float* frame(int64_t t) const {
    if (plan_.replicate) return slot(larger(0, smaller(t, plan_.frames - 1)));
    return t < 0 || t >= plan_.frames ? nullptr : slot(t);
  }

  void read_frame(int64_t t) {
    const T* from = at<const T>(plan_.x, t, 0);
    float* to = slot(t);
    if (plan_.x.channel == 1) return plan_.multiplier ? read_rows<true>(to, from, t) : read_rows<false>(to, from, t);
    for (int64_t c = 0; c < plan_.in; c += kDepth, to += chunk_) {
      const Box box{pixels_, smaller(kDepth, plan_.in - c), plan_.x.pixel, plan_.x.channel};
      read_box(to, kDepth, from + c * plan_.x.channel, box);
      if (plan_.multiplier) normalise(to, c, t);
    }
  }

  // Where channels lie together: along them, pixel after pixel.
  template <bool normed> void read_rows(float* to, const T* from, int64_t t) {
    const float* multiplier = plan_.multiplier + (clip_ * plan_.frames + t) * plan_.depth;
    const float* offset = plan_.offset + (clip_ * plan_.frames + t) * plan_.depth;
    const int64_t in = plan_.in, step = plan_.x.pixel, chunk = chunk_;
    for (int64_t p = 0; p < pixels_; ++p, from += step, to += kDepth) {
      for_lanes(in, [=](int64_t c, auto n) {
        Lanes h = load(from + c, n);
        if (normed) h = silu(multiply_add(h, Lanes::load(multiplier + c), Lanes::load(offset + c)));
        h.store(to + c / kDepth * chunk + c % kDepth);
      });
    }
  }

  void normalise(float* packed, int64_t channel, int64_t t) {
    const int64_t where = (clip_ * plan_.frames + t) * plan_.depth + channel;
    for (int64_t c = 0; c < kDepth; c += kLanes) {
      const Lanes multiplier = Lanes::load(plan_.multiplier + where + c);
      const Lanes offset = Lanes::load(plan_.offset + where + c);
      for (int64_t p = 0; p < pixels_; ++p) {
        float* h = packed + p * kDepth + c;
        silu(multiply_add(Lanes::load(h), multiplier, offset)).store(h);
      }
    }
  }

  // What the products of frames t and t + 1 are of.
  void filter(int64_t t, float* to) {
    const float* d[4];
    for (int i = 0; i < 4; ++i) {
      d[i] = frame(t - 1 + i);
      if (d[i] == nullptr) d[i] = scratch_ + plan_.zeros_at;
    }
    const int64_t size = plan_.slot_size;
    for (int64_t i = 0; i < size; i += kLanes) {
      const Lanes d0 = Lanes::load(d[0] + i), d1 = Lanes::load(d[1] + i);
      const Lanes d2 = Lanes::load(d[2] + i), d3 = Lanes::load(d[3] + i);
      (d2 - d1).store(to + i);
      (d1 + d2).store(to + i + size);
      (d0 - d2).store(to + i + 2 * size);
      (d3 - d1).store(to + i + 3 * size);
    }
  }

  // Frames [t, end) of the output channels of one panel.
  void convolve(int64_t t, int64_t end, int64_t column) {
    const int64_t strips = (pixels_ + kRows - 1) / kRows, step = plan_.minimal ? 2 : 1;
    for (const int64_t start = t; t < end; t += step) {
      const int64_t outputs = smaller(step, end - t);
      for (int64_t i = 0; i < strips; ++i) {
        const int64_t pixel = pixels_ * i / strips, rows = pixels_ * (i + 1) / strips - pixel;
        const int64_t count = plan_.minimal ? minimal_steps(outputs, filtered(t - start) + pixel * kDepth, column)
                                            : direct_steps(t, pixel, column);
        run_tile(t, outputs, pixel, rows, column, count);
      }
    }
  }

  Step* steps() const { return reinterpret_cast<Step*>(scratch_ + plan_.steps_at); }
  int64_t width_at(int64_t column) const { return smaller(kPanelWidth, plan_.padded_out - column); }

  int64_t minimal_steps(int64_t outputs, const float* filtered, int64_t column) {
    constexpr Then then[] = {Then::kPark, Then::kSplit, Then::kFinish, Then::kFinish};
    const int64_t count = outputs == 2 ? kMinimalProducts : kMinimalProducts - 1;
    const float* weights = plan_.weights + column * plan_.products * plan_.in;
    for (int64_t i = 0; i < count; ++i, weights += plan_.in * width_at(column)) {
      steps()[i] = {filtered + i * plan_.slot_size, weights, then[i]};
    }
    return count;
  }

  int64_t direct_steps(int64_t t, int64_t pixel, int64_t column) {
    int64_t count = 0;
    const float* weights = plan_.weights + column * plan_.products * plan_.in;
    for (int64_t j = 0; j < plan_.taps; ++j, weights += plan_.in * width_at(column)) {
      if (const float* input = frame(t + j - plan_.radius)) {
        steps()[count++] = {input + pixel * kDepth, weights, Then::kGoOn};
      }
    }
    steps()[count - 1].then = Then::kFinish;
    return count;
  }

  // Into y itself where it is floats that lie together, else by way of scratch memory; so too where y is to be
  // streamed, which is done once, and the sums are not all of it.
  void run_tile(int64_t t, int64_t outputs, int64_t pixel, int64_t rows, int64_t column, int64_t count) {
    constexpr bool same = std::is_same<T, float>::value;
    const bool finished = !plan_.silu && !plan_.residual.data && plan_.stats_groups == 0;
    const bool straight = same && plan_.y.channel == 1 && (finished || !plan_.stream);
    const int64_t columns = smaller(kPanelWidth, plan_.out - column);
    Output output[2];
    for (int64_t i = 0; i < outputs; ++i) {
      const float* bias = plan_.bias + (clip_ * plan_.frames + t + i) * plan_.frame_bias + column;
      float* tile = scratch_ + plan_.tiles_at + i * kMostRows * kMostWidth;
      output[i] = {tile, kPanelWidth, bias};
      if (straight) output[i] = {at<float>(plan_.y, t + i, pixel) + column, plan_.y.pixel, bias};
    }
    float* parked = scratch_ + plan_.parked_at;
    const Call call{steps(), count, plan_.in, chunk_, parked, output, straight ? columns : kPanelWidth,
                    straight && plan_.stream};
    kernel_of(rows, width_at(column) / kLanes)(call);
    for (int64_t i = 0; i < outputs; ++i) {
      finish(output[i], t + i, pixel, rows, column, columns);
      if (straight) continue;
      T* to = at<T>(plan_.y, t + i, pixel) + column * plan_.y.channel;
      if (plan_.stream) stream_rows(at<float>(plan_.y, t + i, pixel) + column, output[i], rows, columns);
      else write_box(to, {rows, columns, plan_.y.pixel, plan_.y.channel}, output[i].to, output[i].stride);
    }
  }

  void stream_rows(float* to, const Output& from, int64_t rows, int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r, to += plan_.y.pixel) {
      for (int64_t c = 0; c < columns; c += kLanes) stream(to + c, Lanes::load(from.to + r * from.stride + c));
    }
  }

  void finish(const Output& output, int64_t t, int64_t pixel, int64_t rows, int64_t column, int64_t columns) {
    if (plan_.residual.data) {
      const T* residual = at<const T>(plan_.residual, t, pixel) + column * plan_.residual.channel;
      if (plan_.residual.channel == 1) {
        add_residual(output, residual, plan_.residual.pixel, rows, columns);
      } else {
        float* read = scratch_ + plan_.residual_at;
        read_box(read, kPanelWidth, residual, {rows, columns, plan_.residual.pixel, plan_.residual.channel});
        add_residual(output, read, kPanelWidth, rows, columns);
      }
    } else if (plan_.silu) {
      each_vector(output, rows, columns, [](Lanes y, int64_t, int64_t, auto) { return silu(y); });
    }
    if (plan_.stats_groups > 0) add_to_stats(output, t, pixel, rows, column, columns);
  }

  template <class E>
  void add_residual(const Output& output, const E* residual, int64_t stride, int64_t rows, int64_t columns) {
    if (plan_.silu) {
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
    const int64_t channels = plan_.out / plan_.stats_groups;
    double* partial = plan_.partials + index_ * plan_.frames * plan_.stats_groups * 2;
    for (int64_t t = 0; t < plan_.frames; ++t) {
      const float* means = scratch_ + plan_.stats_at + 2 * t * plan_.padded_out;
      const float* squares = means + plan_.padded_out;
      for (int64_t c = 0; c < plan_.out; c += channels, partial += 2) {
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
  const int64_t index_, clip_, row_, first_, pixels_;  // of which clip, row of it and pixels of that
  const int64_t chunk_;  // floats from kDepth channels of a packed frame to the next
  float* const scratch_;
  int64_t read_ = 0;  // frames
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

#endif  // LF_TEMPORAL_CONV_KERNEL_H
