// The emulation itself: that it finds threads which wait in vain, reads too early and misaligned or foreign addresses,
// and that its matrices lie as the PTX ISA says.
#include "common/ptx.h"

#include "check.h"

namespace {

using lf::emulation::failure;

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared,
                   Parameters... parameters) {
  void* pointers[] = {&parameters..., nullptr};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), pointers, shared, LF_EMULATED_STREAM);
}

void check_fails(cudaError_t error, const char* why) {
  CHECK(error == cudaErrorLaunchFailure);
  CHECK(strstr(failure(), why) != nullptr);
}

void only_some_arrive(int* /*out*/) {
  if (threadIdx.x % 32 != 5) __syncwarp();
}

void some_leave_out(int*) {
  if (threadIdx.x >= 32) __syncthreads();
}

void different_meetings(int*) {
  if (threadIdx.x % 2) __syncwarp();
  else __shfl_sync(~0u, 1, 0);
}

// Each thread's number + 1 comes from its neighbour, through shared memory.
void rotate(int* out) {
  auto* numbers = reinterpret_cast<int*>(lf::shared_memory());
  numbers[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = numbers[(threadIdx.x + 1) % blockDim.x];
}

// As above without the barrier: some thread sees memory that nobody has written.
void rotate_early(int* out) {
  auto* numbers = reinterpret_cast<int*>(lf::shared_memory());
  numbers[threadIdx.x] = threadIdx.x;
  out[blockIdx.x * blockDim.x + threadIdx.x] = numbers[(threadIdx.x + 1) % blockDim.x];
}

void misaligned(int*) { lf::start_copy(lf::shared_address(lf::shared_memory() + 8), lf::shared_memory(), 0); }
void outside(int*) { lf::start_copy(lf::shared_address(lf::shared_memory()) + 4096, lf::shared_memory(), 0); }

template <bool kWait> void copied(const char* from, char* to) {
  char* mine = lf::shared_memory() + 16 * threadIdx.x;
  lf::start_copy(lf::shared_address(mine), from + 16 * threadIdx.x, threadIdx.x % 17);
  lf::close_copies();
  if (kWait) lf::wait_for_copies<0>();
  memcpy(to + (blockIdx.x * blockDim.x + threadIdx.x) * 16, mine, 16);
  lf::wait_for_copies<0>();
}

void never_waits(int* from) {
  lf::start_copy(lf::shared_address(lf::shared_memory()), from, 16);
  lf::close_copies();
}

// c = a b' + c for a of 16 x 16, b of 8 x 16, c of 16 x 8, all dense.
template <class T> void product(const T* a, const T* b, float* c) {
  auto* rows = reinterpret_cast<T*>(lf::shared_memory());
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) rows[i] = a[i];
  for (int i = lane; i < 128; i += 32) rows[256 + i] = b[i];
  __syncwarp();
  uint32_t of_a[4], of_b[4];
  lf::load_matrices(of_a, lf::shared_address(rows + lane % 16 * 16 + lane / 16 * 8));
  lf::load_matrices(of_b, lf::shared_address(rows + 256 + lane % 8 * 16 + lane / 8 % 2 * 8));
  float sum[4];
  float* mine = c + lane / 4 * 8 + lane % 4 * 2;
  for (int i = 0; i < 4; ++i) sum[i] = mine[i / 2 * 64 + i % 2];
  lf::multiply_add<T>(sum, of_a, of_b[0], of_b[1]);
  for (int i = 0; i < 4; ++i) mine[i / 2 * 64 + i % 2] = sum[i];
}

template <class T> void check_product() {
  T a[256], b[128];
  float c[128], expected[128];
  unsigned state = 1;
  const auto number = [&] { return static_cast<float>((state = state * 1664525u + 1013904223u) >> 28) - 8; };
  for (T& x : a) x = lf::narrow<T>(number());
  for (T& x : b) x = lf::narrow<T>(number());
  for (float& x : c) x = number();
  for (int i = 0; i < 128; ++i) {
    expected[i] = c[i];
    for (int k = 0; k < 16; ++k) expected[i] += lf::widen(a[i / 8 * 16 + k]) * lf::widen(b[i % 8 * 16 + k]);
  }
  CHECK((launch<const T*, const T*, float*>(&product<T>, 1, 32, 768, a, b, c)) == cudaSuccess);
  CHECK(memcmp(c, expected, sizeof c) == 0);
}

void check_rotation() {
  int out[4 * 96];
  CHECK(launch<int*>(&rotate, 4, 96, 96 * sizeof(int), out) == cudaSuccess);
  for (int i = 0; i < 4 * 96; ++i) CHECK(out[i] == (i + 1) % 96);
  CHECK(launch<int*>(&rotate_early, 4, 96, 96 * sizeof(int), out) == cudaSuccess);
  int wrong = 0;
  for (int i = 0; i < 4 * 96; ++i) wrong += out[i] != (i + 1) % 96;
  CHECK(wrong > 0);
}

void check_copies() {
  alignas(16) char from[32 * 16], to[2 * 32 * 16];
  for (unsigned i = 0; i < sizeof from; ++i) from[i] = static_cast<char>(i % 100 + 1);
  const auto wrong = [&] {
    int found = 0;
    for (int i = 0; i < 2 * 32 * 16; ++i) found += to[i] != (i % 16 < i / 16 % 32 % 17 ? from[i % (32 * 16)] : 0);
    return found;
  };
  CHECK((launch<const char*, char*>(&copied<true>, 2, 32, 32 * 16, from, to)) == cudaSuccess);
  CHECK(wrong() == 0);
  CHECK((launch<const char*, char*>(&copied<false>, 2, 32, 32 * 16, from, to)) == cudaSuccess);
  CHECK(wrong() > 0);
}

}  // namespace

int main() {
  alignas(16) int some[64] = {};
  check_fails(launch<int*>(&only_some_arrive, 1, 64, 0, some), "every thread waits");
  check_fails(launch<int*>(&some_leave_out, 1, 64, 0, some), "every thread waits");
  check_fails(launch<int*>(&different_meetings, 1, 32, 0, some), "meets");
  check_fails(launch<int*>(&misaligned, 1, 32, 64, some), "misaligned");
  check_fails(launch<int*>(&outside, 1, 32, 64, some), "outside");
  check_fails(launch<int*>(&never_waits, 2, 1, 64, some), "under way");
  CHECK(launch<int*>(&rotate, 1, 32, 64 * 1024, some) == cudaErrorInvalidValue);  // more than it was given
  CHECK(launch<int*>(&rotate, 1, 1025, 8192, some) == cudaErrorInvalidValue);
  check_rotation();
  check_copies();
  check_product<lf::BFloat16>();
  check_product<lf::Half>();
  return failures != 0;
}
