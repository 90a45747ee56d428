#include "fibers.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define LF_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LF_ASAN 1
#endif
#endif
#if defined(LF_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 blockIdx, threadIdx, blockDim, gridDim;

namespace lf::emulation {

Counts counts;
unsigned most_blocks = UINT32_MAX;
std::function<void()> after_block;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr std::align_val_t kSharedAlignment{1024};

struct FreeShared {
  void operator()(char* memory) const { operator delete(memory, kSharedAlignment); }
};

// Tells the address sanitizer which stack is in use.
struct StackSwitch {
#if defined(LF_ASAN)
  void* fake = nullptr;
  void leave_for(const void* bottom, size_t size) { __sanitizer_start_switch_fiber(&fake, bottom, size); }
  void arrived(const void** bottom, size_t* size) { __sanitizer_finish_switch_fiber(fake, bottom, size); }
#else
  void leave_for(const void*, size_t) {}
  void arrived(const void**, size_t*) {}
#endif
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  jmp_buf place;
  StackSwitch sanitizer;
  bool started = false, done = true;
  Copies copies;
};

std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch: to make one takes longer than to run it
jmp_buf scheduler;
StackSwitch scheduler_sanitizer;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

const std::function<void()>* body = nullptr;
int current = 0, threads_of_block = 0, live = 0, stalled = 0;
bool failed = false, at_once = false;
char why_failed[256] = "";
unsigned launches = 0;
std::map<int, std::vector<Meeting>> meetings;  // by how many threads meet
std::map<void (*)(), size_t> shared_limits;
char* shared = nullptr;
size_t shared_size = 0;

// Nothing else in these two, since what a jump finds in registers is undefined; what the address sanitizer would add to
// every jump, its own version of the jump does once more.
__attribute__((noinline, no_sanitize("address"))) void jump(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

__attribute__((noinline, no_sanitize("address"))) void enter(jmp_buf& from, const ucontext_t& to) {
  if (_setjmp(from) == 0) setcontext(&to);
}

void to_scheduler() {
  Fiber& fiber = *fibers[current];
  fiber.sanitizer.leave_for(scheduler_stack, scheduler_stack_size);
  jump(fiber.place, scheduler);
  fiber.sanitizer.arrived(nullptr, nullptr);
}

// Runs one thread of a block after another; its stack is never left for good.
void live_on() {
  fibers[current]->sanitizer.arrived(&scheduler_stack, &scheduler_stack_size);
  for (;;) {
    (*body)();
    Fiber& fiber = *fibers[current];
    const bool waited = fiber.copies.open.empty() &&
                        std::all_of(fiber.copies.committed.begin(), fiber.copies.committed.end(),
                                    [](const std::vector<Copy>& group) { return group.empty(); });
    if (!waited) fail("a thread ended with copies under way");
    fiber.done = true;
    --live;
    got_further();
    to_scheduler();
  }
}

void resume(int index) {
  Fiber& fiber = *fibers[index];
  current = index;
  threadIdx = dim3(index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y));
  scheduler_sanitizer.leave_for(fiber.stack.get(), kStack);
  if (fiber.started) {
    jump(scheduler, fiber.place);
  } else {
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, &live_on, 0);
    enter(scheduler, context);
  }
  scheduler_sanitizer.arrived(nullptr, nullptr);
}

unsigned scramble(unsigned x) { return (x * 2654435761u) >> 8; }

void run_block(unsigned number) {
  while (static_cast<int>(fibers.size()) < threads_of_block) fibers.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < threads_of_block; ++i) fibers[i]->done = false, fibers[i]->copies = {};
  meetings.clear();
  live = threads_of_block;
  stalled = 0;
  at_once = (launches + number) % 2 != 0;
  const unsigned order = scramble(launches * 31 + number);
  while (live > 0 && !failed) {
    for (int i = 0; i < threads_of_block && !failed; ++i) {
      const int turned = (i + order) % threads_of_block;
      const int index = order / 64 % 2 ? threads_of_block - 1 - turned : turned;
      if (!fibers[index]->done) resume(index);
    }
  }
  if (!failed) return;
  fibers.clear();  // they hang in the middle of the kernel
}

}  // namespace

void allow_shared(void (*kernel)(), int bytes) { shared_limits[kernel] = bytes; }

size_t allowed_shared(void (*kernel)()) {
  const auto found = shared_limits.find(kernel);
  return found == shared_limits.end() ? 0 : found->second;
}

bool run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  gridDim = grid, blockDim = block;
  threads_of_block = static_cast<int>(block.x * block.y * block.z);
  body = &thread;
  failed = false;
  ++launches;
  const bool backwards = grid.x <= most_blocks && scramble(launches) % 2 != 0;
  unsigned number = 0;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = grid.x - std::min(grid.x, most_blocks); x < grid.x && !failed; ++x) {
        // Of the very size, so that a sanitizer sees what lies outside.
        const std::unique_ptr<char, FreeShared> memory(
            static_cast<char*>(operator new(shared_bytes, kSharedAlignment)));
        shared = memory.get();
        shared_size = shared_bytes;
        std::memset(shared, 0xff, shared_bytes);
        blockIdx = dim3(backwards ? grid.x - 1 - x : x, y, z);
        run_block(number++);
        if (after_block) after_block();
      }
    }
  }
  return !failed;
}

const char* failure() { return why_failed; }

void fail(const char* format, ...) {
  const int length = std::snprintf(why_failed, sizeof why_failed, "block %u, thread %d: ", blockIdx.x, current);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(why_failed + length, sizeof why_failed - length, format, arguments);
  va_end(arguments);
  failed = true;
  to_scheduler();
  std::abort();  // it does not come back
}

int thread_index() { return current; }

uint32_t address_in_shared(const void* pointer) {
  const auto* at = static_cast<const char*>(pointer);
  if (at < shared || at > shared + shared_size) fail("a pointer that is not to shared memory");
  return kSharedBase + static_cast<uint32_t>(at - shared);
}

char* shared_at(uint32_t address, uint32_t size) {
  if (address % size != 0) fail("a misaligned address in shared memory: %u", address);
  if (address < kSharedBase || address - kSharedBase + size > shared_size) {
    fail("outside shared memory: %u", address);
  }
  return shared + (address - kSharedBase);
}

void Copy::run() const {
  std::memcpy(to, from, bytes);
  std::memset(to + bytes, 0, 16 - bytes);
}

bool copies_land_at_once() { return at_once; }

Copies& copies() { return fibers[current]->copies; }

void got_further() { stalled = 0; }

void let_others(const char* what) {
  if (++stalled > 2 * live) fail("every thread waits, this one at %s", what);
  to_scheduler();
}

Meeting& meeting_of(int& threads) {
  if (threads == kWholeBlock) threads = threads_of_block;
  if (threads_of_block % threads != 0) fail("the block has a part of a group of threads that meet");
  std::vector<Meeting>& groups = meetings[threads];
  if (groups.empty()) {
    groups.resize(threads_of_block / threads);
    for (Meeting& group : groups) group.operands.resize(threads);
  }
  return groups[current / threads];
}

}  // namespace lf::emulation
