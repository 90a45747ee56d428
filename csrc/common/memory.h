// Where a strided tensor lies in memory.
#ifndef LF_COMMON_MEMORY_H
#define LF_COMMON_MEMORY_H

#include <cstdint>

namespace lf {

// Also of INT64_MIN.
inline uint64_t magnitude(int64_t stride) { return stride < 0 ? -static_cast<uint64_t>(stride) : stride; }

// Whether no two elements of a tensor of sizes >= 1 meet, nor are too far apart to be addressed: each stride steps over
// all that the smaller ones reach.
bool elements_apart(const int64_t* shape, const int64_t* strides, int axes);

// From the first byte of a tensor to the one after its last. Sizes are >= 1.
struct Span {
  const char* first;
  const char* end;
};
Span span_of(const void* data, const int64_t* shape, const int64_t* strides, int axes, int64_t element_size);

bool meet(const Span& a, const Span& b);

}  // namespace lf

#endif  // LF_COMMON_MEMORY_H
