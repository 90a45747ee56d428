// Learned resizing in time by the matrix products of warps (mma.sync), on any CUDA device of compute capability 8.0 on.
//
// A product has the pixels of a frame as its rows, output channels as its columns and input channels as its depth; x
// and the weights are read where they lie. Two kernels:
//
//   gather  a block makes a tile of one frame of the result, summing over the taps whose frames there are.
//   walk    for three taps going up: a block goes from frame to frame of x and multiplies each by all three taps at
//           once, P_k[i] = W_k x[i]: three products a frame of x whatever t is. They add up to
//
//             y[t i]         = P0[i - 1] + P1[i] + P2[i]
//             y[t i + p]     = P0[i] + P1[i] + P2[i]      for 0 < p < t - 1
//             y[t i + t - 1] = P0[i] + P1[i] + P2[i + 1]
//
// Where x, the weights and y do not all lie in packs of 16 bytes, `gather` loads and stores element by element.
#include <algorithm>

#include "common/ptx.h"
#include "common/resized_axis.h"
#include "common/temporal_resize_device.h"
#include "common/temporal_resize_packs.h"

namespace lf {
namespace {

constexpr int kDepth = 32;  // input channels of a stage
constexpr int kPacks = kDepth / kPack;
constexpr int kRowBytes = kDepth * 2;
constexpr int kStages = 4;

// A block's part of the result, and how its warps share it: each has kRowTiles x 16 pixels by kGroups x 32 channels.
template <int kTaps, int kWarpRows, int kWarpColumns, int kRowTiles, int kGroups, int kBlocks> struct Tile {
  static constexpr int taps = kTaps, warp_columns = kWarpColumns, row_tiles = kRowTiles, groups = kGroups;
  static constexpr int blocks = kBlocks;  // that are to fit on a multiprocessor
  static constexpr int threads = 32 * kWarpRows * kWarpColumns;
  static constexpr int pixels = kWarpRows * kRowTiles * 16, channels = kWarpColumns * kGroups * 32;
  static constexpr int x_bytes = pixels * kRowBytes, stage_bytes = x_bytes + kTaps * channels * kRowBytes;
  static constexpr int shared_bytes = kStages * stage_bytes + channels * static_cast<int>(sizeof(float));
  static constexpr int rows_at_once = threads / kPacks;  // that the threads load, a pack each
  static constexpr int x_loads = pixels / rows_at_once, weight_loads = kTaps * channels / rows_at_once;
  static_assert(rows_at_once % 32 == 0 && pixels % rows_at_once == 0 && channels % rows_at_once == 0, "uneven loads");
  static_assert(blocks * (shared_bytes + 1024) <= 164 * 1024, "more shared memory than sm_80 has for so many blocks");
};

using WideGather = Tile<1, 2, 2, 4, 2, 2>;    // 128 pixels x 128 channels
using NarrowGather = Tile<1, 4, 1, 2, 2, 3>;  // 128 x 64
using WideWalk = Tile<3, 4, 2, 2, 1, 1>;      // 128 x 64 of each tap
using NarrowWalk = Tile<3, 4, 1, 2, 1, 2>;    // 128 x 32
using AnyGather = Tile<1, 4, 1, 2, 2, 2>;     // 128 x 64, element by element

// Where a frame's pixels lie, counted row by row.
struct Pixels {
  int64_t width, row, pixel;  // width 0: all of them one `pixel` apart

  LF_HD int64_t offset(int64_t i) const { return width == 0 ? i * pixel : i / width * row + i % width * pixel; }
};

struct Problem {
  TemporalResize resize;
  Pixels x, y;
  int64_t pixels;       // of a frame
  int64_t pixel_tiles, channel_tiles;
  int64_t pieces;       // of a clip: frames of the result (gather), or runs of `length` frames of x (walk)
  int64_t length;
  int64_t first_block;  // of this launch
};

// What a block makes.
template <class Tile> struct Place {
  int64_t pixel, channel, piece, clip;

  __device__ explicit Place(const Problem& p) {
    int64_t block = p.first_block + blockIdx.x;
    channel = block % p.channel_tiles * Tile::channels;  // neighbours read the same pixels
    block /= p.channel_tiles;
    pixel = block % p.pixel_tiles * Tile::pixels;
    block /= p.pixel_tiles;
    piece = block % p.pieces;
    clip = block / p.pieces;
  }
};

// The products of a segment are those of one frame of x: with one tap (gather) or with all of them (walk).
struct Segments {
  int64_t frame, tap, count;
};

// Taps [tap, tap + count) of frame `at` of the result are of frames that there are. The centre is always one.
__device__ inline Segments taps_of(const TemporalResize& r, int64_t at) {
  const bool down = r.direction == Direction::kDown;
  const int64_t first = (down ? r.factor * at : at) - r.taps / 2, frames = down ? r.frames : r.out_frames;
  const int64_t tap = larger_of<int64_t>(0, -first);
  return {first, tap, smaller_of(r.taps, frames - first) - tap};
}

// 16 bytes of a row lie where no two rows of eight meet in a bank, neither when loaded nor when read as matrices.
__device__ inline int swizzled(int row, int pack) {
  return row * kRowBytes + ((pack ^ (row >> 1 & (kPacks - 1))) << 4);
}

// Which of 32 channels the columns of four matrices stand for: so that a lane's columns of the product, 2 q and 2 q + 1
// of each, are eight channels that lie behind one another.
__device__ inline int channel_of_column(int column) {
  return (column >> 1 & 3) * kPack + (column >> 3 & 3) * 2 + (column & 1) + (column & ~31);
}

// Brings pixels and weights to shared memory, stage by stage.
template <class T, class Tile, bool kPacked> class Loader {
 public:
  __device__ Loader(const Problem& p, const Place<Tile>& place, const Segments& segments)
      : p_(p), segments_(segments), pack_(threadIdx.x % kPacks) {
    const TemporalResize& r = p.resize;
    const int row = threadIdx.x / kPacks;
    to_ = swizzled(row, pack_);
#pragma unroll
    for (int i = 0; i < Tile::x_loads; ++i) {
      const int64_t pixel = place.pixel + row + i * Tile::rows_at_once;
      const bool inside = pixel < p.pixels;
      pixel_offsets_[i] = inside ? p.x.offset(pixel) : 0;
      pixels_inside_ |= static_cast<uint32_t>(inside) << i;
    }
    const int64_t channel = place.channel + channel_of_column(row);
#pragma unroll
    for (int i = 0; i < Tile::weight_loads; ++i) {
      const bool inside = channel + i * Tile::rows_at_once % Tile::channels < r.out;
      channels_inside_ |= static_cast<uint32_t>(inside) << i;
    }
    x_of_clip_ = static_cast<const T*>(r.x.data) + place.clip * r.x.strides[0];
    weight_of_channel_ = static_cast<const T*>(r.weight) + channel * r.weight_strides[0];
    aim();
  }

  // Loads a stage; once all are, zeros.
  __device__ void load(uint32_t stage) {
    char* const to = shared_memory() + stage * Tile::stage_bytes + to_;
    const TemporalResize& r = p_.resize;
#pragma unroll
    for (int i = 0; i < Tile::x_loads; ++i) {
      load_pack(to + i * Tile::rows_at_once * kRowBytes, x_ + pixel_offsets_[i], kPacked ? 1 : r.x.strides[1],
                pixels_inside_ >> i & 1);
    }
#pragma unroll
    for (int i = 0; i < Tile::weight_loads; ++i) {
      const int row = i * Tile::rows_at_once;
      const int64_t offset = row % Tile::channels * r.weight_strides[0] + row / Tile::channels * r.weight_strides[2];
      load_pack(to + Tile::x_bytes + row * kRowBytes, weight_ + offset, kPacked ? 1 : r.weight_strides[1],
                channels_inside_ >> i & 1);
    }
    channel_ += kDepth;
    x_ += kPacked ? kDepth : kDepth * r.x.strides[1];
    weight_ += kPacked ? kDepth : kDepth * r.weight_strides[1];
  }

  // To be called between two loads: goes on to the next segment where it is time. Apart, since `load` has no branches
  // and so mixes with products.
  __device__ void advance() {
    if (channel_ - pack_ * kPack < p_.resize.in) return;
    ++segments_.tap;
    if (--segments_.count > 0) aim();
  }

 private:
  __device__ void load_pack(char* to, const T* from, int64_t stride, bool inside) const {
    if constexpr (kPacked) {
      start_copy(shared_address(to), from, inside && channel_ < p_.resize.in ? 16 : 0);
    } else {
      uint32_t pairs[kPack / 2] = {};
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        if (!inside || channel_ + i >= p_.resize.in) continue;
        pairs[i / 2] |= static_cast<uint32_t>(from[i * stride].bits) << (16 * (i % 2));
      }
      *reinterpret_cast<uint4*>(to) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }

  __device__ void aim() {
    const TemporalResize& r = p_.resize;
    int64_t frame = segments_.frame + segments_.tap;
    if (Tile::taps == 1 && r.direction == Direction::kUp) frame /= r.factor;
    channel_ = pack_ * kPack;
    x_ = x_of_clip_ + frame * r.x.strides[2] + channel_ * r.x.strides[1];
    weight_ = weight_of_channel_ + channel_ * r.weight_strides[1];
    if (Tile::taps == 1) weight_ += segments_.tap * r.weight_strides[2];
  }

  const Problem& p_;
  Segments segments_;  // what is left; of a walk `frame` + `tap` is the frame
  const int pack_;
  int to_;
  uint32_t pixels_inside_ = 0, channels_inside_ = 0;
  int64_t pixel_offsets_[Tile::x_loads];
  int64_t channel_;
  const T *x_of_clip_, *weight_of_channel_, *x_, *weight_;
};

// A lane's part of the products of its warp, for each tap: row tiles by matrices of 8 columns.
template <class Tile> using Part = float[Tile::row_tiles][4 * Tile::groups][4];
template <class Tile> using Sums = Part<Tile>[Tile::taps];

enum class Taps { kAll, kFirst, kLast };

template <Taps kWhich> LF_HD constexpr bool takes(int tap, int taps) {
  return kWhich == Taps::kAll || tap == (kWhich == Taps::kFirst ? 0 : taps - 1);
}

// Adds the products of a stage, and calls `between` when half of them are on their way.
template <class T, class Tile, Taps kWhich, class Between>
__device__ void multiply(uint32_t stage, Sums<Tile>& sums, const Between& between) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t base = shared_address(shared_memory()) + stage * Tile::stage_bytes;
  const uint32_t rows = base + warp / Tile::warp_columns * Tile::row_tiles * 16 * kRowBytes;
  const uint32_t columns = base + Tile::x_bytes + warp % Tile::warp_columns * Tile::groups * 32 * kRowBytes;
#pragma unroll
  for (int k = 0; k < kPacks; k += 2) {
    if (k == kPacks / 2) between();
    uint32_t a[Tile::row_tiles][4];
#pragma unroll
    for (int m = 0; m < Tile::row_tiles; ++m) {
      load_matrices(a[m], rows + m * 16 * kRowBytes + swizzled(lane % 16, k + lane / 16));
    }
#pragma unroll
    for (int tap = 0; tap < Tile::taps; ++tap) {
      if (!takes<kWhich>(tap, Tile::taps)) continue;
#pragma unroll
      for (int n = 0; n < 4 * Tile::groups; n += 2) {
        uint32_t b[4];
        load_matrices(b, columns + (tap * Tile::channels + n * 8) * kRowBytes +
                             swizzled(lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < Tile::row_tiles; ++m) {
          multiply_add<T>(sums[tap][m][n], a[m], b[0], b[1]);
          multiply_add<T>(sums[tap][m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// Loads run kStages - 1 stages ahead of products.
template <class T, class Tile, bool kPacked> class Pipeline {
 public:
  __device__ Pipeline(const Problem& p, const Place<Tile>& place, const Segments& segments)
      : loader_(p, place, segments) {
    for (int i = 0; i < kStages - 1; ++i) {
      loader_.load(i);
      close_copies();
      loader_.advance();
    }
  }

  template <Taps kWhich> __device__ void step(Sums<Tile>& sums) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // all see the stage, and are done with the one before, which is loaded over next
    multiply<T, Tile, kWhich>(stage_, sums, [&] {
      loader_.load((stage_ + kStages - 1) % kStages);
      close_copies();
    });
    loader_.advance();
    stage_ = (stage_ + 1) % kStages;
  }

  __device__ void finish() const { wait_for_copies<0>(); }

 private:
  Loader<T, Tile, kPacked> loader_;
  uint32_t stage_ = 0;
};

template <class T, class Tile> __device__ float* load_bias(const Problem& p, const Place<Tile>& place) {
  auto* bias = reinterpret_cast<float*>(shared_memory() + kStages * Tile::stage_bytes);
  const TemporalResize& r = p.resize;
  for (int i = threadIdx.x; i < Tile::channels; i += Tile::threads) {
    const bool there = r.bias != nullptr && place.channel + i < r.out;
    bias[i] = there ? widen(static_cast<const T*>(r.bias)[(place.channel + i) * r.bias_stride]) : 0;
  }
  return bias;
}

// Writes a block's part of a frame: value(m, n, i) + bias, with the indices of a Part.
template <class T, class Tile, bool kPacked, class Value>
__device__ void store(const Problem& p, const Place<Tile>& place, const float* bias, int64_t frame,
                      const Value& value) {
  const TemporalResize& r = p.resize;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = warp % Tile::warp_columns * Tile::groups * 32 + lane % 4 * kPack;
  const int64_t pixel = place.pixel + warp / Tile::warp_columns * Tile::row_tiles * 16 + lane / 4;
  T* const y = static_cast<T*>(r.y.data) + place.clip * r.y.strides[0] + frame * r.y.strides[2];
#pragma unroll
  for (int m = 0; m < Tile::row_tiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = pixel + m * 16 + half * 8;
      if (at >= p.pixels) continue;
      T* const row = y + p.y.offset(at);
#pragma unroll
      for (int group = 0; group < Tile::groups; ++group) {
        const int64_t channel = place.channel + column + group * 32;
        float values[kPack];
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          values[i] = value(m, group * 4 + i / 2, half * 2 + i % 2) + bias[column + group * 32 + i];
        }
        if constexpr (kPacked) {
          if (channel >= r.out) continue;
          store_16(row + channel, narrow_pair<T>(values[0], values[1]), narrow_pair<T>(values[2], values[3]),
                   narrow_pair<T>(values[4], values[5]), narrow_pair<T>(values[6], values[7]));
        } else {
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            if (channel + i < r.out) row[(channel + i) * r.y.strides[1]] = narrow<T>(values[i]);
          }
        }
      }
    }
  }
}

__device__ inline int64_t stages_of_segment(const TemporalResize& r) { return (r.in + kDepth - 1) / kDepth; }

template <class T, class Tile, bool kPacked>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks) gather_kernel(const __grid_constant__ Problem p) {
  const Place<Tile> place(p);
  const float* const bias = load_bias<T>(p, place);
  const Segments segments = taps_of(p.resize, place.piece);
  Pipeline<T, Tile, kPacked> pipeline(p, place, segments);
  Sums<Tile> sums = {};
  for (int64_t i = segments.count * stages_of_segment(p.resize); i > 0; --i) {
    pipeline.template step<Taps::kAll>(sums);
  }
  pipeline.finish();
  store<T, Tile, kPacked>(p, place, bias, place.piece, [&](int m, int n, int i) { return sums[0][m][n][i]; });
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks) walk_kernel(const __grid_constant__ Problem p) {
  const Place<Tile> place(p);
  const float* const bias = load_bias<T>(p, place);
  const int64_t t = p.resize.factor, stages = stages_of_segment(p.resize);
  const int64_t begin = place.piece * p.length, end = smaller_of(begin + p.length, p.resize.frames);
  const int64_t first = larger_of<int64_t>(begin - 1, 0), last = smaller_of(end, p.resize.frames - 1);  // what it takes
  Pipeline<T, Tile, true> pipeline(p, place, {first, 0, last - first + 1});
  Part<Tile> before = {}, upto = {};  // of the frame before: P0, and P0 + P1
  const auto write = [&](int64_t frame, const auto& value) {
    store<T, Tile, true>(p, place, bias, frame, value);
  };
  for (int64_t frame = first; frame <= last; ++frame) {
    Sums<Tile> sums = {};
    // The frames beside the block's own are needed with one tap.
    if (frame < begin) {
      for (int64_t i = 0; i < stages; ++i) pipeline.template step<Taps::kFirst>(sums);
    } else if (frame == end) {
      for (int64_t i = 0; i < stages; ++i) pipeline.template step<Taps::kLast>(sums);
    } else {
      for (int64_t i = 0; i < stages; ++i) pipeline.template step<Taps::kAll>(sums);
    }
    if (frame > begin) {
      write(t * frame - 1, [&](int m, int n, int i) { return upto[m][n][i] + sums[2][m][n][i]; });
    }
    if (frame >= begin && frame < end) {
      write(t * frame, [&](int m, int n, int i) { return before[m][n][i] + sums[1][m][n][i] + sums[2][m][n][i]; });
      for (int64_t phase = 1; phase < t - 1; ++phase) {
        write(t * frame + phase,
              [&](int m, int n, int i) { return sums[0][m][n][i] + sums[1][m][n][i] + sums[2][m][n][i]; });
      }
    }
#pragma unroll
    for (int m = 0; m < Tile::row_tiles; ++m) {
#pragma unroll
      for (int n = 0; n < 4 * Tile::groups; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          before[m][n][i] = sums[0][m][n][i];
          upto[m][n][i] = sums[0][m][n][i] + sums[1][m][n][i];
        }
      }
    }
  }
  pipeline.finish();
  if (end == p.resize.frames) write(t * end - 1, [&](int m, int n, int i) { return upto[m][n][i]; });
}

// Whether each position's channels lie in packs.
bool packs_channels(const lf_clip& clip, int64_t channels, const Sizes& sizes) {
  bool fits = is_aligned(clip.data) && clip.strides[kChannel] == 1 && channels % kPack == 0;
  for (const int axis : {0, 2, 3, 4}) fits = fits && (sizes[axis] == 1 || clip.strides[axis] % kPack == 0);
  return fits;
}

bool packs_all(const TemporalResize& r) {
  const bool weight = is_aligned(r.weight) && r.weight_strides[1] == 1 &&
                      (r.out == 1 || r.weight_strides[0] % kPack == 0) &&
                      (r.taps == 1 || r.weight_strides[2] % kPack == 0);
  return weight && packs_channels(r.x, r.in, {r.batch, r.in, r.frames, r.height, r.width}) &&
         packs_channels(r.y, r.out, {r.batch, r.out, r.out_frames, r.height, r.width});
}

Pixels pixels_of(const lf_clip& clip, int64_t height, int64_t width) {
  const int64_t row = clip.strides[3], pixel = clip.strides[4];
  if (height == 1) return {0, 0, pixel};
  if (width == 1) return {0, 0, row};
  return row == width * pixel ? Pixels{0, 0, pixel} : Pixels{width, row, pixel};
}

// Cuts the walk over a clip into pieces, so that the device's multiprocessors are busy and little is done twice.
void cut_walk(Problem& p, int64_t slots) {
  const int64_t frames = p.resize.frames, tiles = p.pixel_tiles * p.channel_tiles * p.resize.batch;
  int64_t least = INT64_MAX;
  for (int64_t pieces = 1; pieces <= std::min<int64_t>(frames, 64); ++pieces) {
    const int64_t length = divide_up(frames, pieces), products = 3 * length + std::min<int64_t>(pieces - 1, 2);
    const int64_t cost = divide_up(tiles * pieces, slots) * products;
    if (cost >= least) continue;
    least = cost;
    p.length = length;
    p.pieces = divide_up(frames, length);
  }
}

template <class Kernel>
lf_status launch(Kernel* kernel, Problem& p, int threads, int shared_bytes, cudaStream_t stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  const int64_t blocks = p.pixel_tiles * p.channel_tiles * p.pieces * p.resize.batch;
  for (p.first_block = 0; p.first_block < blocks && error == cudaSuccess; p.first_block += INT32_MAX) {
    const auto count = static_cast<unsigned>(std::min<int64_t>(blocks - p.first_block, INT32_MAX));
    void* parameters[] = {&p};
    error = cudaLaunchKernel(kernel, dim3(count), dim3(threads), parameters, shared_bytes, stream);
  }
  return status_of(error);
}

template <class T, class Tile, bool kPacked>
lf_status run(const TemporalResize& r, int64_t multiprocessors, cudaStream_t stream) {
  Problem p{r, pixels_of(r.x, r.height, r.width), pixels_of(r.y, r.height, r.width), r.height * r.width, 0, 0, 0, 0, 0};
  p.pixel_tiles = divide_up(p.pixels, Tile::pixels);
  p.channel_tiles = divide_up(r.out, Tile::channels);
  if constexpr (Tile::taps == 1) {
    p.pieces = r.out_frames;
    return launch(gather_kernel<T, Tile, kPacked>, p, Tile::threads, Tile::shared_bytes, stream);
  } else {
    cut_walk(p, multiprocessors * Tile::blocks);
    return launch(walk_kernel<T, Tile>, p, Tile::threads, Tile::shared_bytes, stream);
  }
}

// The wide tile unless at most half of its last column would be used.
template <class T, class Wide, class Narrow>
lf_status run_packed(const TemporalResize& r, int64_t multiprocessors, cudaStream_t stream) {
  return (r.out - 1) % Wide::channels < Narrow::channels ? run<T, Narrow, true>(r, multiprocessors, stream)
                                                         : run<T, Wide, true>(r, multiprocessors, stream);
}

template <class T> lf_status run(const TemporalResize& r, int64_t multiprocessors, cudaStream_t stream) {
  if (!packs_all(r)) return run<T, AnyGather, false>(r, multiprocessors, stream);
  const bool walks = r.direction == Direction::kUp && r.taps == 3 && r.factor > 1;
  return walks ? run_packed<T, WideWalk, NarrowWalk>(r, multiprocessors, stream)
               : run_packed<T, WideGather, NarrowGather>(r, multiprocessors, stream);
}

}  // namespace

lf_status temporal_resize_mma(const TemporalResize& r, int device, cudaStream_t stream) {
  if (r.dtype != LF_BFLOAT16 && r.dtype != LF_FLOAT16) return LF_UNSUPPORTED_DTYPE;
  int major = 0, multiprocessors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return status_of(error);
  if (major < 8) return LF_UNSUPPORTED_DEVICE;
  return r.dtype == LF_BFLOAT16 ? run<BFloat16>(r, multiprocessors, stream) : run<Half>(r, multiprocessors, stream);
}

}  // namespace lf
