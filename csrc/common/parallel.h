// A loop over independent pieces of work on a number of threads that the caller gives.
#ifndef LF_COMMON_PARALLEL_H
#define LF_COMMON_PARALLEL_H

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lf {

// What the threads of one loop share.
class Team {
 public:
  Team(int64_t pieces, void (*piece)(const void*, int64_t, int64_t), const void* work)
      : pieces_(pieces), piece_(piece), work_(work) {}

  // Takes pieces until none is left.
  void drain() {
    const int64_t worker = workers_++;
    for (int64_t piece = next_++; piece < pieces_; piece = next_++) piece_(work_, worker, piece);
  }

 private:
  const int64_t pieces_;
  void (*const piece_)(const void*, int64_t, int64_t);
  const void* const work_;
  std::atomic<int64_t> workers_{0}, next_{0};
};

// For how many elements another thread is worth what it costs: few where threads are borrowed and wait already, more
// where they are started.
int64_t elements_worth_a_thread() noexcept;

// Has up to `num_threads` threads drain the team, the caller's among them, and returns when all have left it.
void run_team(Team& team, int64_t num_threads);

// Calls work(worker, piece) for each piece in [0, pieces), with worker in [0, num_threads): a number to find scratch
// memory by. `work` must not throw.
template <class Work> void for_each_piece(int64_t pieces, int64_t num_threads, const Work& work) {
  num_threads = std::min(num_threads, pieces);
  if (num_threads <= 1) {
    for (int64_t piece = 0; piece < pieces; ++piece) work(0, piece);
    return;
  }
  const auto piece = [](const void* of, int64_t worker, int64_t index) {
    (*static_cast<const Work*>(of))(worker, index);
  };
  Team team(pieces, piece, &work);
  run_team(team, num_threads);
}

}  // namespace lf

#endif  // LF_COMMON_PARALLEL_H
