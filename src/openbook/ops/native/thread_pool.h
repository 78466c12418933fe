// The threads that kernels are split over. Which thread computes what never decides a bit: tasks split outputs only.
#pragma once

#include <cstdint>
#include <utility>

namespace openbook {

// Threads in use, the calling one included; from 1. As many as this process may run on, until `set_num_threads`.
int num_threads();

// Throws std::invalid_argument outside 1 to 256.
void set_num_threads(int count);

// Sets round-to-nearest and kept subnormals for the calling thread while it lives, then restores what was.
class FloatMode {
 public:
  FloatMode();
  ~FloatMode();
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  std::uint64_t before_;
};

// While it lives, parallel_for of the calling thread runs its tasks one after another on that thread: for work so small
// that waking the others costs more than they give.
class OneThread {
 public:
  explicit OneThread(bool is_wanted = true);
  ~OneThread();
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  bool before_;
};

namespace detail {
using TaskFunction = void (*)(void* context, std::int64_t task);
void run_tasks(std::int64_t num_tasks, TaskFunction function, void* context);
}  // namespace detail

// Calls body(0), ..., body(num_tasks - 1), each once, in any order and on any of the threads; returns when all have.
// One caller at a time: a second one waits for the first. A call inside a task runs its tasks one after another.
// Task bodies must not throw.
template <typename Body>
void parallel_for(std::int64_t num_tasks, Body&& body) {
  detail::run_tasks(
      num_tasks, [](void* context, std::int64_t task) { (*static_cast<std::remove_reference_t<Body>*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// parallel_for over [0, count) in ranges of at least `grain`: body(begin, end). More ranges for a thread even out what
// disturbs it, fewer read longer stretches.
template <typename Body>
void parallel_ranges(std::int64_t count, std::int64_t grain, Body&& body, int ranges_per_thread = 4) {
  if (count <= 0) return;
  const std::int64_t most = (count + grain - 1) / grain;
  const std::int64_t wanted = ranges_per_thread * static_cast<std::int64_t>(num_threads());
  const std::int64_t num_tasks = num_threads() == 1 ? 1 : (most < wanted ? most : wanted);
  parallel_for(num_tasks, [&](std::int64_t task) {
    body(count * task / num_tasks, count * (task + 1) / num_tasks);
  });
}

}  // namespace openbook
