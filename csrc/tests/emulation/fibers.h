// The threads of a block as fibers of one thread of the host: each runs until it has to wait for others. Launches take
// their blocks, and blocks their threads, in different orders, so that a result that hangs on one shows.
#ifndef LF_EMULATION_FIBERS_H
#define LF_EMULATION_FIBERS_H

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern dim3 blockIdx, threadIdx, blockDim, gridDim;

namespace lf::emulation {

void allow_shared(void (*kernel)(), int bytes);
size_t allowed_shared(void (*kernel)());

// Of a grid with more in a row than this, only the last run: blocks do not know of one another.
extern unsigned most_blocks;

extern std::function<void()> after_block;  // to be called when a block is done, if there is one

// Runs every thread of every block. False where one could not go on: failure() says why.
bool run_grid(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);
const char* failure();

// What the launches did since the last reset.
struct Counts {
  int64_t mma = 0;             // warp matrix products
  int64_t bank_conflicts = 0;  // of ldmatrix: rows that have to wait for another
};
extern Counts counts;

// The rest is for the thread that runs.

[[noreturn]] void fail(const char* format, ...);  // as printf's: on what is left behind nothing is destroyed
int thread_index();

// Shared memory as the device addresses it: 32 bits. It is all NaN when a block starts.
constexpr uint32_t kSharedBase = 1024;
uint32_t address_in_shared(const void* pointer);
char* shared_at(uint32_t address, uint32_t size);  // `size` bytes there are the block's, and the address is a multiple

// An asynchronous copy of 16 bytes. Half of the blocks see it done at once, the others not before they have waited:
// whoever reads too early or overwrites too early is found out.
struct Copy {
  char* to;
  const void* from;
  uint32_t bytes;  // the rest of 16 is zeros

  void run() const;
};
bool copies_land_at_once();

struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};
Copies& copies();

void got_further();             // tells that not all threads wait in vain
void let_others(const char* what);  // they run; fails where none of them gets further

template <class Ready> void wait_until(const char* what, const Ready& ready) {
  while (!ready()) let_others(what);
  got_further();
}

// Where a number of adjacent threads meet: a warp, four of them, or all.
struct Meeting {
  const char* name = nullptr;
  int arrived = 0;
  uint64_t round = 0;
  std::vector<void*> operands;
};
constexpr int kWholeBlock = 0;
Meeting& meeting_of(int& threads);  // kWholeBlock becomes their number

// The last to come does the work for all: work(operand), where operand(i) is that of the i-th of them.
template <class Operand, class Work> void meet(const char* name, int threads, Operand& mine, const Work& work) {
  Meeting& meeting = meeting_of(threads);
  if (meeting.arrived == 0) meeting.name = name;
  if (meeting.name != name && std::strcmp(meeting.name, name) != 0) fail("%s meets %s", name, meeting.name);
  meeting.operands[thread_index() % threads] = &mine;
  got_further();
  if (++meeting.arrived < threads) {
    wait_until(name, [&, round = meeting.round] { return meeting.round != round; });
    return;
  }
  meeting.arrived = 0;
  ++meeting.round;
  work([&](int i) -> Operand& { return *static_cast<Operand*>(meeting.operands[i]); });
}

}  // namespace lf::emulation

#endif  // LF_EMULATION_FIBERS_H
