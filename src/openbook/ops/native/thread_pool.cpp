#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace openbook {
namespace {

// A worker looks for work this many times before it sleeps: some 50 microseconds, longer than the gap between two
// kernels of a model, far shorter than what a person notices.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  __asm__ __volatile__("yield");
#endif
}

thread_local bool is_inside_task = false;

class Pool {
 public:
  explicit Pool(int num_threads) {
    for (int index = 1; index < num_threads; ++index) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    is_closing_.store(true, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(std::int64_t num_tasks, detail::TaskFunction function, void* context) {
    function_ = function;
    context_ = context;
    num_tasks_ = num_tasks;
    next_.store(0, std::memory_order_relaxed);
    num_busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    drain();
    for (int spins = 0; num_busy_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        sched_yield();
      }
    }
  }

 private:
  void drain() {
    is_inside_task = true;
    for (;;) {
      const std::int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks_) break;
      function_(context_, task);
    }
    is_inside_task = false;
  }

  void work() {
    const FloatMode mode;
    std::uint32_t seen = 0;
    for (;;) {
      for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) relax();
      generation_.wait(seen, std::memory_order_acquire);
      seen = generation_.load(std::memory_order_acquire);
      if (is_closing_.load(std::memory_order_relaxed)) return;
      drain();
      num_busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  detail::TaskFunction function_ = nullptr;
  void* context_ = nullptr;
  std::int64_t num_tasks_ = 0;
  std::atomic<bool> is_closing_{false};
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<int> num_busy_{0};
  alignas(64) std::atomic<std::uint32_t> generation_{0};
};

int default_num_threads() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  const int count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
#else
  const int count = static_cast<int>(std::thread::hardware_concurrency());
#endif
  return count < 1 ? 1 : (count > 256 ? 256 : count);
}

std::mutex pool_mutex;
std::unique_ptr<Pool> pool;  // made at the first use, so that an import starts no thread
std::atomic<int> wanted_threads{0};  // 0: not asked for yet

// A child of fork has none of the parent's threads: forget the pool (joining would wait forever) and make a new one.
void forget_pool_in_child() {
  [[maybe_unused]] Pool* lost = pool.release();
  new (&pool_mutex) std::mutex;
}
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, forget_pool_in_child);

}  // namespace

int num_threads() {
  // No lock: a task may ask, while its caller holds the pool.
  int count = wanted_threads.load(std::memory_order_relaxed);
  if (count == 0) {
    count = default_num_threads();
    wanted_threads.store(count, std::memory_order_relaxed);
  }
  return count;
}

void set_num_threads(int count) {
  if (count < 1 || count > 256) {
    throw std::invalid_argument("the number of threads is " + std::to_string(count) + ", expected 1 to 256; correct it");
  }
  const std::lock_guard lock(pool_mutex);
  wanted_threads.store(count, std::memory_order_relaxed);
  if (pool && pool->num_threads() != count) pool.reset();
}

OneThread::OneThread(bool is_wanted) : before_(is_inside_task) { is_inside_task = before_ || is_wanted; }
OneThread::~OneThread() { is_inside_task = before_; }

#if defined(__x86_64__)
// Round to nearest, no flushing of subnormals (FTZ, DAZ), all exceptions masked.
FloatMode::FloatMode() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
FloatMode::~FloatMode() { _mm_setcsr(static_cast<unsigned>(before_)); }
#else
FloatMode::FloatMode() {
  __asm__ __volatile__("mrs %0, fpcr" : "=r"(before_));
  __asm__ __volatile__("msr fpcr, %0" : : "r"(std::uint64_t{0}));
}
FloatMode::~FloatMode() { __asm__ __volatile__("msr fpcr, %0" : : "r"(before_)); }
#endif

namespace detail {

void run_tasks(std::int64_t num_tasks, TaskFunction function, void* context) {
  if (num_tasks <= 0) return;
  const FloatMode mode;
  if (is_inside_task) {
    for (std::int64_t task = 0; task < num_tasks; ++task) function(context, task);
    return;
  }
  const std::lock_guard lock(pool_mutex);
  if (num_tasks == 1 || num_threads() == 1) {
    is_inside_task = true;
    for (std::int64_t task = 0; task < num_tasks; ++task) function(context, task);
    is_inside_task = false;
    return;
  }
  if (!pool) pool = std::make_unique<Pool>(num_threads());
  pool->run(num_tasks, function, context);
}

}  // namespace detail
}  // namespace openbook
