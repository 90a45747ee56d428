// csrc/common/ptx_sm90.h for a processor of the host, after the PTX ISA: how bulk copies and descriptors of matrices
// count addresses, and which thread holds what, is its.
//
// In half of the blocks bulk copies are done at once and products not before they are waited for, in the others it is
// the other way round: whoever reads or overwrites too early is found out.
#ifndef LF_COMMON_PTX_SM90_H
#define LF_COMMON_PTX_SM90_H

#include <cuda.h>

#include <algorithm>
#include <array>
#include <map>

#include "common/ptx.h"

namespace lf {
namespace emulation {

constexpr int kWarpgroup = 128;

struct BulkCopy {
  uint32_t to;
  const CUtensorMap* map;
  std::array<int64_t, 5> place;
  uint32_t barrier, bytes;
};

// A barrier in shared memory. What lies there is a mark, by which one that was written over is known.
struct Barrier {
  static constexpr uint64_t kMark = 0xba991e9ba991e9;
  uint32_t count = 0, missing = 0, parity = 0;
  int64_t bytes = 0;     // expected that are not in yet
  bool fenced = false;   // bulk copies know of it
  std::vector<BulkCopy> copies;  // under way
};

// sums of the warpgroup's threads (+)= a b^T, by the descriptors of both.
struct Product {
  std::array<float*, kWarpgroup> sums;
  uint64_t a, b;
  bool accumulate;
  int columns;
  float (*widened)(uint16_t bits);
};

struct Warpgroup {
  bool fenced = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;
};

struct Asynchronous {
  std::map<uint32_t, Barrier> barriers;  // of the block that runs, by address
  std::map<int, Warpgroup> warpgroups;
  int64_t copies = 0, products = 0;      // done since the start
};
inline Asynchronous asynchronous;

// Whether nothing was left under way by blocks that ended; forgets it.
inline bool nothing_left() {
  bool nothing = true;
  for (const auto& [address, barrier] : asynchronous.barriers) nothing = nothing && barrier.copies.empty();
  for (const auto& [number, group] : asynchronous.warpgroups) {
    nothing = nothing && group.open.empty() && group.committed.empty();
  }
  asynchronous.barriers.clear();
  asynchronous.warpgroups.clear();
  return nothing;
}

inline Barrier& barrier_at(uint32_t address) {
  uint64_t mark;
  std::memcpy(&mark, shared_at(address, 8), 8);
  if (mark != Barrier::kMark) fail("no barrier at %u, or no longer", address);
  return asynchronous.barriers[address];
}

inline void end_phase_if_over(Barrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.count;
  barrier.parity ^= 1;
  got_further();
}

// Rows of 128 bytes begin at multiples of it, and each has its 16-byte units swapped about: to the number of the unit
// are added, without carry, the last three bits of the number of the row.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void run(const BulkCopy& copy) {
  constexpr uint32_t kElement = 2;
  const CUtensorMap& map = *copy.map;
  uint32_t to = copy.to;
  for (uint32_t i = 0; i < copy.bytes / kElement; ++i, to += kElement) {
    const char* from = map.data;
    bool inside = true;
    uint32_t rest = i;
    for (int axis = 0; axis < map.rank; ++axis) {
      const int64_t at = copy.place[axis] + rest % map.box[axis];
      rest /= map.box[axis];
      inside = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[axis]);
      from += at * static_cast<int64_t>(map.strides[axis]);
    }
    char* element = shared_at(map.swizzled ? swizzled(to) : to, kElement);
    if (inside) std::memcpy(element, from, kElement);
    else std::memset(element, 0, kElement);
  }
  Barrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= copy.bytes;
  if (barrier.bytes < 0) fail("bytes that the barrier at %u did not expect", copy.barrier);
  ++asynchronous.copies;
  end_phase_if_over(barrier);
}

inline void start(BulkCopy copy) {
  copy.bytes = 2;
  for (int axis = 0; axis < copy.map->rank; ++axis) copy.bytes *= copy.map->box[axis];
  if (copy.to % (copy.map->swizzled ? 1024 : 128) != 0) fail("a bulk copy to %u", copy.to);
  Barrier& barrier = barrier_at(copy.barrier);
  if (!barrier.fenced) fail("bulk copies do not know of the barrier at %u yet", copy.barrier);
  if (copies_land_at_once()) return run(copy);
  for (uint32_t i = 0; i < copy.bytes; i += 2) std::memset(shared_at(copy.to + i, 2), 0xff, 2);
  barrier.copies.push_back(copy);
}

// Reads a matrix of 2-byte elements whose rows are along K, 16 of it, by its descriptor.
template <int kRows> void read_matrix(uint64_t descriptor, float (*widened)(uint16_t), float (&to)[kRows][16],
                                      int rows) {
  const auto field = [&](int first, int bits) {
    return static_cast<uint32_t>(descriptor >> first & ((uint64_t{1} << bits) - 1));
  };
  const uint32_t start = field(0, 14) << 4, stride = field(32, 14) << 4;
  if (field(62, 2) != 1 || field(49, 3) != 0) fail("a descriptor that is not emulated");
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t address = start + row / 8 * stride + row % 8 * 128 + k * 2;
      uint16_t bits;
      std::memcpy(&bits, shared_at(swizzled(address), 2), 2);
      to[row][k] = widened(bits);
    }
  }
}

// Sums in fp64 and rounds once: what a device does between is its own affair.
inline void run(const Product& product) {
  static float a[64][16], b[256][16];
  read_matrix(product.a, product.widened, a, 64);
  read_matrix(product.b, product.widened, b, product.columns);
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const int warp = thread / 32, lane = thread % 32;
    for (int i = 0; i < product.columns / 2; ++i) {
      const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double total = product.accumulate ? product.sums[thread][i] : 0;
      for (int k = 0; k < 16; ++k) total += static_cast<double>(a[row][k]) * b[column][k];
      product.sums[thread][i] = static_cast<float>(total);
    }
  }
  ++asynchronous.products;
}

inline Warpgroup& warpgroup() { return asynchronous.warpgroups[thread_index() / kWarpgroup]; }

// What all threads of the warpgroup do together.
template <class Work> void meet_warpgroup(const char* name, const Work& work) {
  int nothing = 0;
  meet(name, kWarpgroup, nothing, [&](auto&&) { work(warpgroup()); });
}

}  // namespace emulation

inline void barrier_init(uint32_t barrier, uint32_t count) {
  std::memcpy(emulation::shared_at(barrier, 8), &emulation::Barrier::kMark, 8);
  emulation::Barrier& made = emulation::asynchronous.barriers[barrier];
  if (!made.copies.empty()) emulation::fail("a block ended with bulk copies under way");
  made = {};
  made.count = made.missing = count;
}

inline void fence_async_proxy() {
  for (auto& [address, barrier] : emulation::asynchronous.barriers) barrier.fenced = true;
}

inline void barrier_arrive(uint32_t barrier) {
  emulation::Barrier& at = emulation::barrier_at(barrier);
  if (at.missing == 0) emulation::fail("more arrivals at %u than its phase has", barrier);
  --at.missing;
  emulation::end_phase_if_over(at);
}

inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  if (bytes >= 1 << 20) emulation::fail("more bytes than a barrier counts");
  emulation::barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}

inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulation::wait_until("barrier_wait", [=] {
    emulation::Barrier& at = emulation::barrier_at(barrier);
    const std::vector<emulation::BulkCopy> copies = std::move(at.copies);
    at.copies.clear();
    for (const emulation::BulkCopy& copy : copies) run(copy);
    return at.parity != parity;
  });
}

inline void prefetch_tensor_map(const CUtensorMap&) {}

inline void bulk_load(uint32_t to, const CUtensorMap& map, int c0, int c1, int c2, uint32_t barrier) {
  if (map.rank != 3) emulation::fail("a bulk copy of another rank");
  emulation::start({to, &map, {c0, c1, c2}, barrier, 0});
}
inline void bulk_load(uint32_t to, const CUtensorMap& map, int c0, int c1, int c2, int c3, uint32_t barrier) {
  if (map.rank != 4) emulation::fail("a bulk copy of another rank");
  emulation::start({to, &map, {c0, c1, c2, c3}, barrier, 0});
}

template <int kRegisters> void give_up_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulation::meet_warpgroup("setmaxnreg.dec", [](auto&&) {});
}
template <int kRegisters> void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulation::meet_warpgroup("setmaxnreg.inc", [](auto&&) {});
}

inline void wgmma_fence() {
  emulation::meet_warpgroup("wgmma_fence", [](emulation::Warpgroup& group) { group.fenced = true; });
}

inline void wgmma_commit() {
  emulation::meet_warpgroup("wgmma_commit", [](emulation::Warpgroup& group) {
    group.committed.push_back(std::move(group.open));
    group.open.clear();
  });
}

template <int kOpen> void wgmma_wait() {
  emulation::meet_warpgroup("wgmma_wait", [](emulation::Warpgroup& group) {
    for (; group.committed.size() > kOpen; group.committed.pop_front()) {
      if (emulation::copies_land_at_once()) {
        for (const emulation::Product& product : group.committed.front()) run(product);
      }
    }
    if (kOpen == 0) group.fenced = false;  // the sums may be touched now
  });
}

template <int kSize> void wgmma_wait_for(float (&)[kSize]) { wgmma_wait<0>(); }

template <class T, int kColumns> void wgmma(float (&sums)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  struct Operand {
    float* sums;
    uint64_t a, b;
    bool accumulate;
  } mine{sums, a, b, accumulate};
  emulation::meet("wgmma", emulation::kWarpgroup, mine, [](const auto& of) {
    emulation::Warpgroup& group = emulation::warpgroup();
    if (!group.fenced) emulation::fail("a product before wgmma_fence");
    emulation::Product product{{}, of(0).a, of(0).b, of(0).accumulate, kColumns,
                               [](uint16_t bits) { return static_cast<float>(widen(T{bits})); }};
    for (int i = 0; i < emulation::kWarpgroup; ++i) {
      product.sums[i] = of(i).sums;
      if (of(i).a != product.a || of(i).b != product.b || of(i).accumulate != product.accumulate) {
        emulation::fail("threads of a warpgroup want different products");
      }
    }
    if (emulation::copies_land_at_once()) group.open.push_back(product);
    else run(product);
  });
}

}  // namespace lf

#endif  // LF_COMMON_PTX_SM90_H
