// A loop over independent pieces of work on a number of threads that the caller gives.
#ifndef LF_COMMON_PARALLEL_H
#define LF_COMMON_PARALLEL_H

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace lf {

// What the threads of one loop share.
class Team {
 public:
  Team(int64_t pieces, void (*piece)(const void*, int64_t, int64_t), const void* work)
      : pieces_(pieces), piece_(piece), work_(work) {}

  // Takes pieces until none is left. A thread that enters when all are taken does not touch the work.
  void drain() {
    const int64_t worker = workers_++;
    for (int64_t piece = next_++; piece < pieces_; piece = next_++) {
      piece_(work_, worker, piece);
      if (++done_ < pieces_) continue;
      const std::lock_guard<std::mutex> lock(mutex_);
      finished_.notify_one();
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_ == pieces_; });
  }

 private:
  const int64_t pieces_;
  void (*const piece_)(const void*, int64_t, int64_t);
  const void* const work_;
  std::atomic<int64_t> workers_{0}, next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

// Has `num_threads` threads drain the team, the caller's among them, and returns when its work is done.
void run_team(const std::shared_ptr<Team>& team, int64_t num_threads);

// Calls work(worker, piece) for each piece in [0, pieces), with worker in [0, num_threads): a number to find scratch
// memory by. `work` must not throw. Throws std::bad_alloc before any of the work is done.
template <class Work> void for_each_piece(int64_t pieces, int64_t num_threads, const Work& work) {
  num_threads = std::min(num_threads, pieces);
  if (num_threads <= 1) {
    for (int64_t piece = 0; piece < pieces; ++piece) work(0, piece);
    return;
  }
  const auto piece = [](const void* of, int64_t worker, int64_t index) {
    (*static_cast<const Work*>(of))(worker, index);
  };
  run_team(std::make_shared<Team>(pieces, piece, &work), num_threads);
}

}  // namespace lf

#endif  // LF_COMMON_PARALLEL_H
