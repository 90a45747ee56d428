// csrc/common/ptx.h for a processor of the host, after the PTX ISA: which lane holds what is its.
#ifndef LF_COMMON_PTX_H
#define LF_COMMON_PTX_H

#include <cuda_runtime_api.h>

#include "common/scalar.h"

namespace lf {

inline char* shared_memory() { return emulation::shared_at(emulation::kSharedBase, 1); }

inline uint32_t shared_address(const void* pointer) { return emulation::address_in_shared(pointer); }

inline void start_copy(uint32_t to, const void* from, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes > 16) emulation::fail("a misaligned copy");
  const emulation::Copy copy{emulation::shared_at(to, 16), from, bytes};
  if (emulation::copies_land_at_once()) copy.run();
  else emulation::copies().open.push_back(copy);
}

inline void store_16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t values[] = {a, b, c, d};
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulation::fail("a misaligned store");
  std::memcpy(to, values, 16);
}

inline void close_copies() {
  emulation::Copies& copies = emulation::copies();
  copies.committed.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int kOpen> void wait_for_copies() {
  auto& committed = emulation::copies().committed;
  for (; committed.size() > kOpen; committed.pop_front()) {
    for (const emulation::Copy& copy : committed.front()) copy.run();
  }
}

inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  struct Operand {
    uint32_t (&to)[4];
    const char* row;
  } mine{to, emulation::shared_at(row, 16)};
  emulation::meet("load_matrices", 32, mine, [](const auto& lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) {
        const unsigned bank = 1u << (reinterpret_cast<uintptr_t>(lane(8 * matrix + i).row) / 16 % 8);
        emulation::counts.bank_conflicts += (banks & bank) != 0;
        banks |= bank;
      }
      for (int i = 0; i < 32; ++i) std::memcpy(&lane(i).to[matrix], lane(8 * matrix + i / 4).row + i % 4 * 4, 4);
    }
  });
}

// Sums in fp64 and rounds once: what a device does between is its own affair.
template <class T> void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b_upper, uint32_t b_lower) {
  struct Operand {
    float (&sum)[4];
    const uint32_t (&a)[4];
    uint32_t b[2];
  } mine{sum, a, {b_upper, b_lower}};
  emulation::meet("multiply_add", 32, mine, [](const auto& lane) {
    ++emulation::counts.mma;
    const auto half_of = [](uint32_t pair, int which) {
      return widen(T{static_cast<uint16_t>(pair >> (16 * which))});
    };
    float a_rows[16][16], b_columns[8][16];
    for (int i = 0; i < 32; ++i) {
      for (int j = 0; j < 8; ++j) {  // register j / 2
        a_rows[i / 4 + j / 2 % 2 * 8][i % 4 * 2 + j / 4 * 8 + j % 2] = half_of(lane(i).a[j / 2], j % 2);
      }
      for (int j = 0; j < 4; ++j) b_columns[i / 4][i % 4 * 2 + j / 2 * 8 + j % 2] = half_of(lane(i).b[j / 2], j % 2);
    }
    for (int i = 0; i < 32; ++i) {
      for (int j = 0; j < 4; ++j) {
        const float *row = a_rows[i / 4 + j / 2 * 8], *column = b_columns[i % 4 * 2 + j % 2];
        double total = lane(i).sum[j];
        for (int k = 0; k < 16; ++k) total += static_cast<double>(row[k]) * column[k];
        lane(i).sum[j] = static_cast<float>(total);
      }
    }
  });
}

template <class T> uint32_t narrow_pair(float low, float high) {
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}

}  // namespace lf

#endif  // LF_COMMON_PTX_H
