// Where a strided tensor lies in memory, and memory to work in.
#ifndef LF_COMMON_MEMORY_H
#define LF_COMMON_MEMORY_H

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>

#include "lumiere_fast.h"

namespace lf {

enum Axis { kBatch, kChannel, kTime, kHeight, kWidth, kAxes };  // of a video

// Also of INT64_MIN.
inline uint64_t magnitude(int64_t stride) { return stride < 0 ? -static_cast<uint64_t>(stride) : stride; }

// Whether no two elements of a tensor of sizes >= 1 meet, nor are too far apart to be addressed: each stride steps over
// all that the smaller ones reach.
bool elements_apart(const int64_t* shape, const int64_t* strides, int axes);

// The addresses from the first byte of a tensor to the one after its last: numbers, as strides may lead anywhere.
struct Span {
  uint64_t first, end;
};

// None where it leaves the address space, or has more bytes between its ends than int64 counts. Sizes are >= 1.
std::optional<Span> span_of(const void* data, const int64_t* shape, const int64_t* strides, int axes,
                            int64_t element_size);

// Whether both lie in memory (LF_INVALID_STRIDES), and neither in the other's (LF_SHARED_MEMORY).
lf_status check_apart(const std::optional<Span>& a, const std::optional<Span>& b);

constexpr int64_t kLine = 64;  // bytes of the cache's

// Memory that starts with a line of the cache; not filled.
template <class T> class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(operator new(std::max<int64_t>(size, 1) * sizeof(T), std::align_val_t{kLine}))) {}
  T* get() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(T* data) const { operator delete(data, std::align_val_t{kLine}); }
  };
  std::unique_ptr<T, Delete> data_;
};

// What work() returns. No exception leaves the library.
template <class Work> lf_status guarded(const Work& work) noexcept {
  try {
    return work();
  } catch (...) {  // std::bad_alloc, or std::length_error for an absurd count
    return LF_OUT_OF_MEMORY;
  }
}

}  // namespace lf

#endif  // LF_COMMON_MEMORY_H
