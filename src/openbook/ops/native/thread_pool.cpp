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

// A worker looks for work this many times before it sleeps: some 100 microseconds, longer than the gap between two
// kernels of a model, far shorter than what a person notices.
constexpr int kSpins = 8000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  __asm__ __volatile__("yield");
#endif
}

thread_local bool is_inside_task = false;

// One job at a time. Its tasks are given out one by one, and the caller waits for tasks, not for workers: on a busy
// machine a worker may come long after the others have done everything.
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
    while (num_tasks > kMostTasks) {  // the last ones first, so that what is left is a job like any other
      Rest rest{function, context, num_tasks - kMostTasks};
      run(kMostTasks, &Rest::call, &rest);
      num_tasks -= kMostTasks;
    }
    const std::uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
    // Closed before the job changes: who still holds a ticket of the last job can claim nothing with it.
    ticket_.store(pack(generation, kMostTasks), std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    function_.store(function, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    num_tasks_.store(num_tasks, std::memory_order_relaxed);
    num_done_.store(0, std::memory_order_relaxed);
    ticket_.store(pack(generation, 0), std::memory_order_release);
    generation_.store(generation, std::memory_order_release);
    generation_.notify_all();
    drain(generation);
    for (int spins = 0; num_done_.load(std::memory_order_acquire) != num_tasks; ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr std::int64_t kMostTasks = 0xffffffff;

  struct Rest {
    detail::TaskFunction function;
    void* context;
    std::int64_t first;

    static void call(void* context, std::int64_t task) {
      const Rest& rest = *static_cast<const Rest*>(context);
      rest.function(rest.context, rest.first + task);
    }
  };

  // A ticket is the job's generation and its next task.
  static std::uint64_t pack(std::uint32_t generation, std::int64_t task) {
    return std::uint64_t{generation} << 32 | static_cast<std::uint64_t>(task);
  }

  void drain(std::uint32_t generation) {
    is_inside_task = true;
    std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const auto task = static_cast<std::int64_t>(ticket & 0xffffffff);
      const detail::TaskFunction function = function_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      if (static_cast<std::uint32_t>(ticket >> 32) != generation || task >= num_tasks_.load(std::memory_order_relaxed)) {
        break;
      }
      // That nobody has touched the ticket says that what was read before belongs to its job.
      if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        function(context, task);
        num_done_.fetch_add(1, std::memory_order_release);
        ticket = ticket_.load(std::memory_order_acquire);
      }
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
      drain(seen);
    }
  }

  std::vector<std::thread> workers_;
  std::atomic<detail::TaskFunction> function_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<std::int64_t> num_tasks_{0};
  std::atomic<bool> is_closing_{false};
  alignas(64) std::atomic<std::uint64_t> ticket_{pack(0, kMostTasks)};
  alignas(64) std::atomic<std::int64_t> num_done_{0};
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
