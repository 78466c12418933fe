#include "scratch.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace openbook {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
// What matrices share.
constexpr std::int64_t kChunkBytes = std::int64_t{16} << 20;

struct Block {
  void* memory = nullptr;
  std::size_t bytes = 0;

  ~Block() { free_pages(memory); }
};

}  // namespace

void* allocate_pages(std::size_t bytes) {
  const std::size_t alignment = bytes >= kHugePage / 2 ? kHugePage : 64;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return memory;
}

void free_pages(void* memory) { std::free(memory); }

std::shared_ptr<void> allocate_matrix(std::int64_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<void> latest;
  static std::int64_t used = 0;
  const std::lock_guard lock(mutex);
  std::shared_ptr<void> chunk = latest.lock();
  if (!chunk || used + bytes > kChunkBytes) {
    const bool is_shared = bytes < kChunkBytes / 2;
    chunk.reset(allocate_pages(static_cast<std::size_t>(is_shared ? kChunkBytes : bytes)), free_pages);
    if (!is_shared) return chunk;
    latest = chunk;
    used = 0;
  }
  char* data = static_cast<char*>(chunk.get()) + used;
  used += (bytes + 63) / 64 * 64;
  return std::shared_ptr<void>(chunk, data);
}

void* scratch(Scratch use, std::size_t bytes) {
  thread_local Block blocks[kNumScratches];
  Block& block = blocks[static_cast<int>(use)];
  if (block.bytes < bytes) {
    free_pages(block.memory);
    block.memory = nullptr;
    block.bytes = 0;
    const std::size_t larger = bytes + bytes / 4;
    block.memory = allocate_pages(larger);
    block.bytes = larger;
  }
  return block.memory;
}

}  // namespace openbook
