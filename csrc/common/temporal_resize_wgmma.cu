// Learned resizing in time by warpgroup instructions and bulk copies, of compute capability 9.0 alone.
//
// A block works on tiles of 128 pixels of a frame. One thread has tiles of x, 64 channels deep, copied to a ring in
// shared memory; two warpgroups, 64 pixels each, multiply them with tiles of the weight, sum in fp32 and write. A block
// keeps to one tile of output channels, so that its weights stay in shared memory wherever they fit: what streams then
// is x alone. Blocks next to each other take the same pixels, so that x comes from memory once and from the L2 cache
// after that.
//
// There are two kernels:
//   gather  every frame of the result sums over its taps. Down; and up with other than 3 taps.
//   share   up with 3 taps by t >= 2. Frame i of x is multiplied by all taps at once, side by side: P0, P1 and P2 of i.
//           The frames made of it and of its neighbours are sums of those,
//             y[t i] = P0[i - 1] + P1[i] + P2[i],  y[t i + t - 1] = P0[i] + P1[i] + P2[i + 1],
//           and P0[i] + P1[i] + P2[i] between these two. P0[i - 1] and P0[i - 1] + P1[i - 1] are kept in registers.
//           3 products for t frames, where gathering takes 3 t.
#include "common/temporal_resize_wgmma.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <utility>

#include "common/ptx_sm90.h"
#include "common/temporal_resize_device.h"

namespace lf {

#if !defined(LF_WITH_SM90A)

lf_status temporal_resize_wgmma(const TemporalResize&, void*, int, cudaStream_t) { return LF_UNSUPPORTED_DEVICE; }

#else

namespace {

constexpr int kPixels = 128;   // of a tile
constexpr int kDepth = 64;     // channels of a tile: rows of 128 bytes, which the tensor cores read by a fixed pattern
constexpr int kPart = 64;      // output channels that leave at once
constexpr int kWarp = 32, kConsumers = 256, kThreads = kConsumers + 128;  // the producer's warpgroup is the last
constexpr int kSharedTaps = 3;

constexpr int kRowBytes = 2 * kDepth;
constexpr int kPixelBytes = kPixels * kRowBytes;
constexpr int kWarpRows = 16;
constexpr int kStagingBytes = kWarpRows * 2 * kPart;  // of a warp
constexpr int kBiasBytes = 1024;
constexpr int kSharedLimit = 227 * 1024;
constexpr int kMostStages = 8, kFewestStages = 4;

// All that a launch is. Strides are in elements.
struct Plan {
  CUtensorMap x;       // (channel, pixel, frame, clip)
  CUtensorMap weight;  // (input channel, output channel, tap)
  void* y;
  const void* bias;
  int64_t strides[kAxes];  // of y
  int64_t bias_stride;
  int64_t works;           // of one tile of output channels
  int32_t pixels, width;   // width is that of a row of y, or all pixels where rows lie behind one another
  int32_t out, frames, out_frames, factor, taps;
  int32_t pixel_tiles, columns, depth_tiles;
  int32_t runs, run;       // of frames of x, where products are shared
  int32_t stages;
  bool up, resident;       // whether all weights of a block fit into its shared memory
  bool packs;              // whether 16 bytes of y can be written at once
};

// Where a block's shared memory has what, as addresses. Tiles begin at multiples of 1024 bytes, as their pattern does.
template <int kColumns> struct Memory {
  static constexpr int kWeightBytes = kColumns * kRowBytes;

  LF_HD static int slots(const Plan& p, int taps) { return p.resident ? taps * p.depth_tiles : p.stages; }
  LF_HD static int bytes(const Plan& p, int taps) {
    return p.stages * kPixelBytes + slots(p, taps) * kWeightBytes + kConsumers / kWarp * kStagingBytes + kBiasBytes +
           (2 * p.stages + 1) * 8;
  }

  __device__ Memory(const Plan& p, int taps) {
    char* const start = shared_memory();
    pixels = shared_address(start);
    weights = pixels + p.stages * kPixelBytes;
    const uint32_t staged = weights + slots(p, taps) * kWeightBytes;
    staging = reinterpret_cast<uint32_t*>(start + (staged - pixels));
    bias = reinterpret_cast<float*>(start + (staged - pixels) + kConsumers / kWarp * kStagingBytes);
    full = staged + kConsumers / kWarp * kStagingBytes + kBiasBytes;
    empty = full + 8 * p.stages;
    resident = empty + 8 * p.stages;
  }

  uint32_t pixels, weights, full, empty, resident;  // the last three are barriers
  uint32_t* staging;
  float* bias;
};

// Of device code the passes for other architectures see the kernels' names alone: the host asks no other device.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LF_SM90A(work) work

constexpr int kDepthStep = 16;  // channels of one instruction

// Of the 168 registers that each thread starts with.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(128 * kProducerRegisters + kConsumers * kConsumerRegisters <= 168 * kThreads);

// A place in the ring of stages. Producer and consumers go round it alike.
struct Ring {
  int stage = 0;
  uint32_t round = 0;  // its parity

  __device__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    round ^= 1;
  }
};

// A tile of pixels, and which of the frames, or runs of them, of it.
struct Work {
  int32_t clip, pixel, index;
};

__device__ Work work_at(const Plan& p, int64_t i, int32_t per_tile) {
  const int64_t tile = i / per_tile;
  return {static_cast<int32_t>(tile / p.pixel_tiles), static_cast<int32_t>(tile % p.pixel_tiles) * kPixels,
          static_cast<int32_t>(i % per_tile)};
}

// The frame of x that tap k of frame j of the result takes; -1 for none.
__device__ int32_t frame_of(const Plan& p, int32_t j, int32_t k) {
  const int64_t place = (p.up ? int64_t{j} : int64_t{p.factor} * j) - p.taps / 2 + k;
  if (place < 0) return -1;
  const int64_t frame = p.up ? place / p.factor : place;
  return frame < p.frames ? static_cast<int32_t>(frame) : -1;
}

// Frames of x that a run goes through. But for the first it begins with one that only the next is in need of.
struct Run {
  int32_t begin, end;
};

__device__ Run run_at(const Plan& p, int32_t index) {
  const int32_t begin = index * p.run, end = begin + p.run;
  return {begin > 0 ? begin - 1 : 0, end < p.frames ? end : p.frames};
}

// What the single thread that has tiles copied does. kTaps: of the weight in one tile of it.
template <int kColumns, int kTaps> class Producer {
 public:
  __device__ Producer(const Plan& p, const Memory<kColumns>& memory, int column)
      : p_(p), memory_(memory), channel_(column * (kColumns / kTaps)) {
    prefetch_tensor_map(p_.x);
    prefetch_tensor_map(p_.weight);
  }

  __device__ void load_resident(int taps) {
    const int slots = Memory<kColumns>::slots(p_, taps);
    barrier_arrive_expecting(memory_.resident, slots * Memory<kColumns>::kWeightBytes);
    for (int slot = 0; slot < slots; ++slot) {
      load_weight(slot, slot % p_.depth_tiles, slot / p_.depth_tiles, memory_.resident);
    }
  }

  // All channels of a frame's tile, and the weights of a tap along with them where they are not here to stay.
  __device__ void load(const Work& work, int32_t frame, int32_t tap) {
    constexpr int kBytes = kPixelBytes + Memory<kColumns>::kWeightBytes;
    for (int32_t depth = 0; depth < p_.depth_tiles; ++depth) {
      const uint32_t full = memory_.full + 8 * ring_.stage;
      barrier_wait(memory_.empty + 8 * ring_.stage, ring_.round ^ 1);
      barrier_arrive_expecting(full, p_.resident ? kPixelBytes : kBytes);
      bulk_load(memory_.pixels + ring_.stage * kPixelBytes, p_.x, depth * kDepth, work.pixel, frame, work.clip, full);
      if (!p_.resident) load_weight(ring_.stage, depth, tap, full);
      ring_.advance(p_.stages);
    }
  }

 private:
  __device__ void load_weight(int slot, int32_t depth, int32_t tap, uint32_t barrier) {
    const uint32_t to = memory_.weights + slot * Memory<kColumns>::kWeightBytes;
    bulk_load(to, p_.weight, depth * kDepth, channel_, tap, barrier);
  }

  const Plan& p_;
  const Memory<kColumns>& memory_;
  const int32_t channel_;
  Ring ring_;
};

// Of a matrix in shared memory whose rows of 128 bytes lie behind one another, swizzled: the pattern's name, the bytes
// from 8 rows to the next 8, and the address. All lengths are in 16 bytes; the one at bit 16 has no meaning here.
__device__ uint64_t matrix_at(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kStride = uint64_t{8 * kRowBytes / 16} << 32;
  return kSwizzle128 | kStride | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

// What a thread of the warpgroups does.
template <class T, int kColumns> class Consumer {
 public:
  __device__ Consumer(const Plan& p, const Memory<kColumns>& memory, int column)
      : p_(p), memory_(memory), channel_(column), warp_(threadIdx.x / kWarp), lane_(threadIdx.x % kWarp) {}

  __device__ void await_resident() const {
    if (p_.resident) barrier_wait(memory_.resident, 0);
  }

  // Adds the product of all channels of a frame's tile with the weights of a tap, or begins with it. The last of its
  // instructions may still be under way.
  __device__ void multiply(float (&sums)[kColumns / 2], int32_t tap, bool accumulate) {
    for (int32_t depth = 0; depth < p_.depth_tiles; ++depth) {
      barrier_wait(memory_.full + 8 * ring_.stage, ring_.round);
      const int slot = p_.resident ? tap * p_.depth_tiles + depth : ring_.stage;
      const uint32_t rows = warp_ / 4 * 4 * kWarpRows;
      const uint64_t a = matrix_at(memory_.pixels + ring_.stage * kPixelBytes + rows * kRowBytes);
      const uint64_t b = matrix_at(memory_.weights + slot * Memory<kColumns>::kWeightBytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kDepth / kDepthStep; ++step) {
        constexpr uint64_t kStep = 2 * kDepthStep / 16;
        wgmma<T, kColumns>(sums, a + step * kStep, b + step * kStep, accumulate || depth > 0 || step > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      release();
      held_ = memory_.empty + 8 * ring_.stage;
      ring_.advance(p_.stages);
    }
  }

  __device__ void finish(float (&sums)[kColumns / 2]) {
    wgmma_wait_for(sums);
    release();
  }

  // Writes kPart channels of the tile, from part * kPart on, in frame j of the result; value(i) is the sum of number i
  // among those of this thread (see wgmma). Each warp for itself: its 16 pixels go through shared memory, so that 8
  // threads write a row's 128 bytes. Its 16-byte units are swapped about so that no two accesses want one bank.
  template <class Value> __device__ void write(const Work& work, int32_t j, int part, const Value& value) const {
    uint32_t* const staging = memory_.staging + warp_ * (kStagingBytes / 4);
    const float* const bias = memory_.bias + part * kPart + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < kPart / 2; i += 2) {
      const int unit = i / 4, row = lane_ / 4 + i % 4 / 2 * 8;
      staging[row * (kPart / 2) + (unit ^ row % 8) * 4 + lane_ % 4] =
          narrow_pair<T>(value(i) + bias[8 * unit], value(i + 1) + bias[8 * unit + 1]);
    }
    __syncwarp();
    T* const frame = static_cast<T*>(p_.y) + work.clip * p_.strides[kBatch] + j * p_.strides[kTime];
    const int32_t channel = channel_ + part * kPart;
    if (p_.packs && channel + kPart <= p_.out) {
#pragma unroll
      for (int i = 0; i < kWarpRows / 4; ++i) write_unit<true>(work, frame, channel, i, staging);
    } else {
#pragma unroll 1
      for (int i = 0; i < kWarpRows / 4; ++i) write_unit<false>(work, frame, channel, i, staging);
    }
    __syncwarp();
  }

 private:
  // Gives back the stage whose products are done.
  __device__ void release() {
    if (held_ && lane_ == 0) barrier_arrive(held_);
    held_ = 0;
  }

  // The 8 channels of a pixel that are this thread's in round i of 4.
  template <bool kWhole>
  __device__ void write_unit(const Work& work, T* frame, int32_t first, int i, const uint32_t* staging) const {
    const int row = i * 4 + lane_ / 8, at = lane_ % 8;
    const int32_t pixel = work.pixel + warp_ * kWarpRows + row, channel = first + 8 * at;
    if (pixel >= p_.pixels) return;
    const uint32_t* const unit = staging + row * (kPart / 2) + (at ^ row % 8) * 4;
    T* const to = frame + offset_of(pixel);
    const bool whole = kWhole || (p_.packs && channel + 8 <= p_.out);
    if (whole) *reinterpret_cast<uint4*>(to + channel) = *reinterpret_cast<const uint4*>(unit);
#pragma unroll 1
    for (int c = 0; !whole && c < 8 && channel + c < p_.out; ++c) {
      to[(channel + c) * p_.strides[kChannel]] = T{static_cast<uint16_t>(unit[c / 2] >> (c % 2 * 16))};
    }
  }

  __device__ int64_t offset_of(int32_t pixel) const {
    if (pixel < p_.width) return pixel * p_.strides[kWidth];
    return pixel / p_.width * p_.strides[kHeight] + pixel % p_.width * p_.strides[kWidth];
  }

  const Plan& p_;
  const Memory<kColumns>& memory_;
  const int32_t channel_;  // the first of the tile
  const int warp_, lane_;
  Ring ring_;
  uint32_t held_ = 0;  // the barrier of a stage that products under way read; 0 for none
};

// Barriers and the bias, for all threads of a block.
template <class T, int kColumns>
__device__ void set_up(const Plan& p, const Memory<kColumns>& memory, int32_t channel, int channels) {
  for (int i = threadIdx.x; i < channels; i += kThreads) {
    const bool is = p.bias && channel + i < p.out;
    memory.bias[i] = is ? widen(static_cast<const T*>(p.bias)[(channel + i) * p.bias_stride]) : 0.0f;
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < p.stages; ++stage) {
      barrier_init(memory.full + 8 * stage, 1);
      barrier_init(memory.empty + 8 * stage, kConsumers / kWarp);
    }
    barrier_init(memory.resident, 1);
    fence_async_proxy();
  }
  __syncthreads();
}

template <class T, int kColumns> __device__ void gather(const Plan& p) {
  const Memory<kColumns> memory(p, p.taps);
  const int32_t column = blockIdx.x % p.columns;
  const int64_t first = blockIdx.x / p.columns, step = gridDim.x / p.columns;
  set_up<T>(p, memory, column * kColumns, kColumns);
  if (threadIdx.x >= kConsumers) {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x > kConsumers) return;
    Producer<kColumns, 1> producer(p, memory, column);
    if (p.resident) producer.load_resident(p.taps);
    for (int64_t i = first; i < p.works; i += step) {
      const Work work = work_at(p, i, p.out_frames);
      for (int32_t k = 0; k < p.taps; ++k) {
        const int32_t frame = frame_of(p, work.index, k);
        if (frame >= 0) producer.load(work, frame, k);
      }
    }
    return;
  }
  take_registers<kConsumerRegisters>();
  Consumer<T, kColumns> consumer(p, memory, column * kColumns);
  float sums[kColumns / 2];
  consumer.await_resident();
  for (int64_t i = first; i < p.works; i += step) {
    const Work work = work_at(p, i, p.out_frames);
    bool begun = false;
    for (int32_t k = 0; k < p.taps; ++k) {
      if (frame_of(p, work.index, k) < 0) continue;
      consumer.multiply(sums, k, begun);
      begun = true;
    }
    consumer.finish(sums);
#pragma unroll
    for (int part = 0; part < kColumns / kPart; ++part) {
      if (column * kColumns + part * kPart >= p.out) break;
      consumer.write(work, work.index, part, [&](int n) { return sums[part * kPart / 2 + n]; });
    }
  }
}

template <class T> __device__ void share(const Plan& p) {
  constexpr int kColumns = kSharedTaps * kPart, kSums = kPart / 2;
  const Memory<kColumns> memory(p, 1);
  const int32_t column = blockIdx.x % p.columns;
  const int64_t first = blockIdx.x / p.columns, step = gridDim.x / p.columns;
  set_up<T>(p, memory, column * kPart, kPart);
  if (threadIdx.x >= kConsumers) {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x > kConsumers) return;
    Producer<kColumns, kSharedTaps> producer(p, memory, column);
    if (p.resident) producer.load_resident(1);
    for (int64_t i = first; i < p.works; i += step) {
      const Work work = work_at(p, i, p.runs);
      const Run run = run_at(p, work.index);
      for (int32_t frame = run.begin; frame < run.end; ++frame) producer.load(work, frame, 0);
    }
    return;
  }
  take_registers<kConsumerRegisters>();
  Consumer<T, kColumns> consumer(p, memory, column * kPart);
  float sums[kColumns / 2];                // P0, P1 and P2 of a frame
  float before[kSums], before_two[kSums];  // of the frame before: P0, and P0 + P1
  consumer.await_resident();
  for (int64_t i = first; i < p.works; i += step) {
    const Work work = work_at(p, i, p.runs);
    const Run run = run_at(p, work.index);
#pragma unroll
    for (int n = 0; n < kSums; ++n) before[n] = before_two[n] = 0;
    for (int32_t frame = run.begin; frame < run.end; ++frame) {
      consumer.multiply(sums, 0, false);
      consumer.finish(sums);
      const bool own = frame >= work.index * p.run;
      const int32_t j = frame * p.factor;
      if (own && frame > 0) {
        consumer.write(work, j - 1, 0, [&](int n) { return before_two[n] + sums[2 * kSums + n]; });
      }
      if (own) {
        consumer.write(work, j, 0, [&](int n) { return before[n] + sums[kSums + n] + sums[2 * kSums + n]; });
      }
#pragma unroll
      for (int n = 0; n < kSums; ++n) before[n] = sums[n], before_two[n] = sums[n] + sums[kSums + n];
      for (int32_t phase = 1; own && phase < p.factor - 1; ++phase) {
        consumer.write(work, j + phase, 0, [&](int n) { return before_two[n] + sums[2 * kSums + n]; });
      }
      if (frame == p.frames - 1) {
        consumer.write(work, j + p.factor - 1, 0, [&](int n) { return before_two[n]; });
      }
    }
  }
}

#else
#define LF_SM90A(work)
#endif

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) gather_kernel(const __grid_constant__ Plan plan) {
  LF_SM90A((gather<T, kColumns>(plan)));
}

template <class T> __global__ void __launch_bounds__(kThreads, 1) share_kernel(const __grid_constant__ Plan plan) {
  LF_SM90A(share<T>(plan));
}

#undef LF_SM90A

// Copies of 2-byte elements to (taps, out, in), rows of `row` elements.
struct Packing {
  const uint16_t* from;
  uint16_t* to;
  int64_t strides[3];  // of the output channel, the input channel, the tap
  int64_t out, in, row, size;
};

constexpr int kPackingThreads = 256;

__global__ void __launch_bounds__(kPackingThreads) pack_kernel(const Packing p) {
  const int64_t step = int64_t{gridDim.x} * kPackingThreads;
  for (int64_t i = int64_t{blockIdx.x} * kPackingThreads + threadIdx.x; i < p.size; i += step) {
    const int64_t in = i % p.row, out = i / p.row % p.out, tap = i / p.row / p.out;
    if (in < p.in) p.to[i] = p.from[out * p.strides[0] + in * p.strides[1] + tap * p.strides[2]];
  }
}

// Of x, strides counted in pixels that lie behind one another; false where they do not, or where bulk copies cannot
// take them.
bool bulk_clip(const TemporalResize& r, int64_t& pixel_stride) {
  const int64_t* strides = r.x.strides;
  pixel_stride = r.width > 1 ? strides[kWidth] : strides[kHeight];
  return is_aligned(r.x.data) && (r.in == 1 || strides[kChannel] == 1) &&
         (r.height == 1 || r.width == 1 || strides[kHeight] == r.width * strides[kWidth]) &&
         bulk_stride(r.height * r.width, pixel_stride) && bulk_stride(r.frames, strides[kTime]) &&
         bulk_stride(r.batch, strides[kBatch]);
}

// Whether 8 channels of y can be written at once, wherever a pack of them begins.
bool packs_y(const TemporalResize& r) {
  const int64_t sizes[kAxes] = {r.batch, 1, r.out_frames, r.height, r.width};
  bool all = is_aligned(r.y.data) && r.y.strides[kChannel] == 1;
  for (int axis = 0; axis < kAxes; ++axis) all = all && (sizes[axis] == 1 || r.y.strides[axis] % kPack == 0);
  return all;
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's, whatever the device; what fails is tried again at the next call.
lf_status find_encode(Encode& encode) {
  static std::atomic<Encode> known{nullptr};
  if ((encode = known)) return LF_OK;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                             cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return status_of(error);
  if (found != cudaDriverEntryPointSuccess) return LF_UNSUPPORTED_DEVICE;
  known = encode = reinterpret_cast<Encode>(function);
  return LF_OK;
}

lf_status encode(CUtensorMap& map, lf_dtype dtype, const void* data, int rank, const int64_t* sizes,
                 const int64_t* strides, const int* box) {
  Encode function;
  if (const lf_status status = find_encode(function)) return status;
  constexpr int kMostAxes = 4;
  cuuint64_t dims[kMostAxes], steps[kMostAxes];
  cuuint32_t tile[kMostAxes], ones[kMostAxes];
  for (int axis = 0; axis < rank; ++axis) {
    dims[axis] = static_cast<cuuint64_t>(sizes[axis]);
    // Nobody steps along an axis of size 1, but the driver refuses a stride that is no multiple of 16 bytes even there:
    // it gets the stride of the axis before.
    if (axis == 0) steps[axis] = (2 * dims[axis] + 15) / 16 * 16;  // what a second row would be at; not handed over
    else steps[axis] = sizes[axis] > 1 ? static_cast<cuuint64_t>(2 * strides[axis]) : steps[axis - 1];
    tile[axis] = static_cast<cuuint32_t>(box[axis]);
    ones[axis] = 1;
  }
  const auto type = dtype == LF_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = function(
      &map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(data), dims, steps + 1, tile, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? LF_OK : cuda_error("cuTensorMapEncodeTiled", "refused a tensor");
}

// Where the weight lies: its own place, or packed in the workspace.
struct Weight {
  const void* data;
  int64_t strides[3];
};

cudaError_t pack_weight(const TemporalResize& r, void* workspace, cudaStream_t stream, Weight& weight) {
  weight = {r.weight, {r.weight_strides[0], r.weight_strides[1], r.weight_strides[2]}};
  if (bulk_weight(r)) return cudaSuccess;
  const int64_t row = packed_row(r);
  Packing packing{static_cast<const uint16_t*>(r.weight), static_cast<uint16_t*>(workspace), {}, r.out, r.in, row,
                  r.taps * r.out * row};
  std::copy_n(r.weight_strides, 3, packing.strides);
  weight = {workspace, {row, 1, r.out * row}};
  const int64_t blocks = std::min<int64_t>((packing.size + kPackingThreads - 1) / kPackingThreads, 1024);
  void* parameters[] = {&packing};
  return cudaLaunchKernel(&pack_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kPackingThreads), parameters, 0,
                          stream);
}

// Chooses what stays in shared memory, and how many stages of the ring it leaves room for.
template <int kColumns> void place(Plan& plan, int taps) {
  const int64_t slots = int64_t{taps} * plan.depth_tiles;
  for (const bool resident : {true, false}) {
    plan.resident = resident;
    if (resident && slots > kSharedLimit / Memory<kColumns>::kWeightBytes) continue;
    for (plan.stages = kMostStages; plan.stages >= kFewestStages; --plan.stages) {
      if (Memory<kColumns>::bytes(plan, taps) <= kSharedLimit) return;
    }
  }
}

class Launcher {
 public:
  Launcher(const TemporalResize& r, int64_t pixel_stride, int processors, cudaStream_t stream)
      : r_(r), pixel_stride_(pixel_stride), processors_(processors), stream_(stream) {}

  lf_status run(const Weight& weight) {
    fill();
    const bool shares = plan_.up && r_.taps == kSharedTaps && r_.factor >= 2;
    return r_.dtype == LF_BFLOAT16 ? run<BFloat16>(shares, weight) : run<Half>(shares, weight);
  }

 private:
  void fill() {
    const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
    plan_.y = r_.y.data;
    std::copy_n(r_.y.strides, kAxes, plan_.strides);
    plan_.bias = r_.bias, plan_.bias_stride = r_.bias_stride;
    plan_.pixels = narrow(r_.height * r_.width), plan_.width = narrow(r_.width);
    if (r_.width == 1) plan_.strides[kWidth] = plan_.strides[kHeight];
    if (r_.height == 1 || r_.width == 1 || plan_.strides[kHeight] == r_.width * plan_.strides[kWidth]) {
      plan_.width = plan_.pixels;
    }
    plan_.out = narrow(r_.out), plan_.frames = narrow(r_.frames), plan_.out_frames = narrow(r_.out_frames);
    plan_.up = r_.direction == Direction::kUp;
    plan_.factor = narrow(std::min<int64_t>(r_.factor, INT32_MAX));  // down by more than all frames there is one
    plan_.taps = narrow(r_.taps);
    plan_.pixel_tiles = narrow(divide_up(plan_.pixels, kPixels)), plan_.depth_tiles = narrow(divide_up(r_.in, kDepth));
    plan_.packs = packs_y(r_);
  }

  template <class T> lf_status run(bool shares, const Weight& weight) {
    if (shares) {
      divide_frames();
      return launch<kSharedTaps * kPart, kSharedTaps>(&share_kernel<T>, 1, r_.batch * plan_.pixel_tiles * plan_.runs,
                                                      weight);
    }
    const int64_t works = r_.batch * plan_.pixel_tiles * r_.out_frames;
    return cycles<256>(works) < cycles<128>(works)
               ? launch<256, 1>(&gather_kernel<T, 256>, plan_.taps, works, weight)
               : launch<128, 1>(&gather_kernel<T, 128>, plan_.taps, works, weight);
  }

  // Runs of frames, so many that blocks have about equally much to do: each but the first costs a frame more.
  void divide_frames() {
    const int64_t columns = divide_up(r_.out, kPart), tiles = r_.batch * plan_.pixel_tiles;
    const int64_t groups = std::max<int64_t>(processors_ / columns, 1);
    int64_t least = INT64_MAX;
    for (int64_t runs = 1; runs <= std::min<int64_t>(r_.frames, 4 * groups); ++runs) {
      const int64_t run = divide_up(r_.frames, runs), frames = run + (runs > 1);
      const int64_t cost = divide_up(tiles * divide_up(r_.frames, run), groups) * frames;
      if (cost >= least) continue;
      least = cost;
      plan_.run = static_cast<int32_t>(run), plan_.runs = static_cast<int32_t>(divide_up(r_.frames, run));
    }
  }

  // About how many all takes for 64 channels of x and one tap: those of the tensor cores, 2048 products each, or of the
  // L2 cache, 32 bytes each.
  template <int kColumns> int64_t cycles(int64_t works) {
    place<kColumns>(plan_, plan_.taps);
    const int64_t bytes = kPixelBytes + (plan_.resident ? 0 : Memory<kColumns>::kWeightBytes);
    const int64_t products = int64_t{kPixels} * kDepth * kColumns;
    return divide_up(works * divide_up(r_.out, kColumns), processors_) * std::max(products / 2048, bytes / 32);
  }

  lf_status encode_x() {
    const int64_t sizes[] = {r_.in, r_.height * r_.width, r_.frames, r_.batch};
    const int64_t strides[] = {1, pixel_stride_, r_.x.strides[kTime], r_.x.strides[kBatch]};
    const int box[] = {kDepth, kPixels, 1, 1};
    return encode(plan_.x, r_.dtype, r_.x.data, 4, sizes, strides, box);
  }

  lf_status encode_weight(const Weight& weight, int channels, int taps) {
    const int64_t sizes[] = {r_.in, r_.out, r_.taps}, strides[] = {1, weight.strides[0], weight.strides[2]};
    const int box[] = {kDepth, channels, taps};
    return encode(plan_.weight, r_.dtype, weight.data, 3, sizes, strides, box);
  }

  template <int kColumns, int kTaps, class Kernel>
  lf_status launch(Kernel* kernel, int taps, int64_t works, const Weight& weight) {
    constexpr int kChannels = kColumns / kTaps;
    // Before the driver is asked for descriptions: it wants a context, which a fresh thread lacks even where the device
    // is current. The runtime makes the device's context the thread's in calls like this one.
    lf_status status = status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                      kSharedLimit));
    if (status == LF_OK) status = encode_x();
    if (status == LF_OK) status = encode_weight(weight, kChannels, kTaps);
    if (status != LF_OK) return status;
    place<kColumns>(plan_, taps);
    plan_.works = works;
    plan_.columns = static_cast<int32_t>(divide_up(r_.out, kChannels));
    const int64_t groups = std::min<int64_t>(std::max(processors_ / plan_.columns, 1), works);
    void* parameters[] = {&plan_};
    return status_of(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(groups * plan_.columns)), dim3(kThreads),
                                      parameters, Memory<kColumns>::bytes(plan_, taps), stream_));
  }

  const TemporalResize& r_;
  const int64_t pixel_stride_;  // of x
  const int processors_;
  const cudaStream_t stream_;
  Plan plan_{};
};

// Whether all places can be told from one another as bulk copies count them, in 32 bits.
bool countable(const TemporalResize& r) {
  constexpr int64_t kMost = INT32_MAX - 256;
  return std::max({r.batch, r.in, r.out, r.frames, r.out_frames, r.height * r.width, r.taps}) <= kMost;
}

}  // namespace

lf_status temporal_resize_wgmma(const TemporalResize& r, void* workspace, int device, cudaStream_t stream) {
  if (r.dtype != LF_BFLOAT16 && r.dtype != LF_FLOAT16) return LF_UNSUPPORTED_DTYPE;
  int major = 0, minor = 0, processors = 0;
  for (const auto& [attribute, value] : {std::pair{cudaDevAttrComputeCapabilityMajor, &major},
                                         std::pair{cudaDevAttrComputeCapabilityMinor, &minor},
                                         std::pair{cudaDevAttrMultiProcessorCount, &processors}}) {
    const lf_status status = status_of(cudaDeviceGetAttribute(value, attribute, device));
    if (status != LF_OK) return status;
  }
  if (major != 9 || minor != 0) return LF_UNSUPPORTED_DEVICE;
  if (!countable(r)) return LF_INVALID_SHAPE;
  int64_t pixel_stride = 0;
  if (!bulk_clip(r, pixel_stride)) return LF_INVALID_STRIDES;
  Weight weight;
  const lf_status status = status_of(pack_weight(r, workspace, stream, weight));
  return status == LF_OK ? Launcher(r, pixel_stride, processors, stream).run(weight) : status;
}

#endif  // LF_WITH_SM90A

}  // namespace lf
