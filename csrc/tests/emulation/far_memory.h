// Memory for strides over 2^31 elements: addresses alone, of which a page becomes memory, zeros, where it is touched.
#ifndef LF_EMULATION_FAR_MEMORY_H
#define LF_EMULATION_FAR_MEMORY_H

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace lf::emulation {

constexpr int64_t kFar = (int64_t{1} << 31) + 64;

class FarMemory {
 public:
  FarMemory() {
    data_ = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) std::abort();
  }
  ~FarMemory() { munmap(data_, kBytes); }
  FarMemory(const FarMemory&) = delete;
  FarMemory& operator=(const FarMemory&) = delete;

  void* data() const { return data_; }

 private:
  static constexpr size_t kBytes = size_t{1} << 37;
  void* data_;
};

// What `at` gives are the elements of any array of `kRank` axes: moves them to far memory, next to one another but for
// the places of one axis. The strides become those of there.
template <class T, int kRank>
T* move_apart(const FarMemory& memory, const T* from, const int64_t (&sizes)[kRank], int64_t (&strides)[kRank],
              int axis) {
  // Smallest stride first, so that what was next to one another stays so.
  int64_t apart[kRank] = {}, unit = 1;
  for (int done = 0; done < kRank; ++done) {
    int next = -1;
    for (int i = 0; i < kRank; ++i) {
      if (apart[i] == 0 && (next < 0 || strides[i] < strides[next])) next = i;
    }
    apart[next] = next == axis ? kFar : unit;
    if (next != axis) unit *= sizes[next];
  }
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  T* const to = static_cast<T*>(memory.data());
  for (int64_t number = 0; number < count; ++number) {
    int64_t rest = number, here = 0, there = 0;
    for (int i = 0; i < kRank; ++i) {
      here += rest % sizes[i] * strides[i], there += rest % sizes[i] * apart[i];
      rest /= sizes[i];
    }
    to[there] = from[here];
  }
  for (int i = 0; i < kRank; ++i) strides[i] = apart[i];
  return to;
}

}  // namespace lf::emulation

#endif  // LF_EMULATION_FAR_MEMORY_H
