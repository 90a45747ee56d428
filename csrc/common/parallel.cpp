#include "common/parallel.h"

#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "lumiere_fast.h"

namespace lf {
namespace {

std::atomic<lf_parallel> borrowed{nullptr};

// Threads that live for this call. They are waited for even where one got a core only when nothing was left to do: one
// that is still to come would find the library gone if the caller unloads it.
void run_own(Team& team, int64_t num_threads) {
  std::vector<std::thread> threads;
  try {
    threads.reserve(num_threads - 1);
    for (int64_t i = 1; i < num_threads; ++i) threads.emplace_back([&team] { team.drain(); });
  } catch (const std::system_error&) {
    // Fewer threads than wished for: those there are do all the work.
  } catch (const std::bad_alloc&) {
  }
  team.drain();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int64_t elements_worth_a_thread() noexcept { return borrowed == nullptr ? 1 << 18 : 1 << 16; }

void run_team(Team& team, int64_t num_threads) {
  const lf_parallel parallel = borrowed;
  if (parallel == nullptr) return run_own(team, num_threads);
  const auto drain = [](void* member) { static_cast<Team*>(member)->drain(); };
  parallel(drain, &team, static_cast<uint32_t>(num_threads), 0);
  team.drain();  // of a runtime that ran no thread at all
}

}  // namespace lf

void lf_borrow_threads(lf_parallel parallel) noexcept { lf::borrowed = parallel; }
