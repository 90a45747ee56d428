// How a learned resize in time cuts memory into packs of 16 bytes. No CUDA is needed to know it.
#ifndef LF_COMMON_TEMPORAL_RESIZE_PACKS_H
#define LF_COMMON_TEMPORAL_RESIZE_PACKS_H

#include "common/space_time.h"

namespace lf {

constexpr int kPack = 8;  // elements of 16 bytes

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

}  // namespace lf

#endif  // LF_COMMON_TEMPORAL_RESIZE_PACKS_H
