// Memory that a thread keeps for packed panels, so that a product allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace openbook {

// Uses of one thread that may be needed at the same time.
enum class Scratch { rows, columns, shared, attention, inputs };
constexpr int kNumScratches = 5;

// At least `bytes` of the calling thread's memory for `use`, aligned to 64 bytes; its content is lost when a later call for
// the same use asks for more. Throws std::bad_alloc.
void* scratch(Scratch use, std::size_t bytes);

// Memory in huge pages where the system has them; release with `free_pages`. Throws std::bad_alloc.
void* allocate_pages(std::size_t bytes);
void free_pages(void* memory);

// Memory for one matrix, 64-byte aligned. Matrices share chunks on huge pages, as most are smaller than such a page: on
// small ones, at whose end the processor stops to fetch ahead, reading is half as fast. A chunk goes with its last one.
std::shared_ptr<void> allocate_matrix(std::int64_t bytes);

}  // namespace openbook
