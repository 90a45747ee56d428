#include "common/parallel.h"

#include <new>
#include <system_error>
#include <thread>

#include "lumiere_fast.h"

namespace lf {
namespace {

std::atomic<lf_parallel> borrowed{nullptr};

// Threads that live for this call. The caller waits for the work and not for them: on a busy machine a thread may get a
// core only when nothing is left to do. It then finds that out from the team, which it holds, and ends.
void run_own(const std::shared_ptr<Team>& team, int64_t num_threads) {
  try {
    for (int64_t i = 1; i < num_threads; ++i) std::thread([team] { team->drain(); }).detach();
  } catch (const std::system_error&) {
    // Fewer threads than wished for: those there are do all the work.
  } catch (const std::bad_alloc&) {
  }
  team->drain();
  team->wait();
}

}  // namespace

void run_team(const std::shared_ptr<Team>& team, int64_t num_threads) {
  const lf_parallel parallel = borrowed;
  if (parallel == nullptr) return run_own(team, num_threads);
  const auto drain = [](void* member) { static_cast<Team*>(member)->drain(); };
  parallel(drain, team.get(), static_cast<uint32_t>(num_threads), 0);
  team->drain();  // of a runtime that ran no thread at all
}

}  // namespace lf

void lf_borrow_threads(lf_parallel parallel) noexcept { lf::borrowed = parallel; }
