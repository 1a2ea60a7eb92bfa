// Weights in pages of 2 MiB. A decode step reads all weights once: in pages of 4 KiB the cores wait for page tables, and
// what is asked for ahead is lost at each page's end (LFM2-1.2B, 4 bits: a seventh of a step).
#include "huge_pages.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "checks.h"
#include "mlx/allocator.h"
#include "pool.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace runner {

namespace mx = mlx::core;

void expect_huge_pages(void* memory, int64_t size) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t from = ((uintptr_t)memory + kPage - 1) / kPage * kPage, to = ((uintptr_t)memory + size) / kPage * kPage;
  if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);  // a wish: nothing depends on it
#else
  (void)memory, (void)size;
#endif
}

mx::array pages_op(int64_t size) {
  if (size <= 0 || size % 64) refuse("pages", ": size is ", size, "; expected a positive multiple of 64");
  // MLX's memory begins behind a note of its size; ours begins at the next line of the caches.
  const mx::Shape shape{(int)(size / 64), 64};
  const mx::array whole(mx::allocator::malloc(size + 64), {(int)(size / 64) + 1, 64}, mx::uint8);
  expect_huge_pages(const_cast<char*>(whole.data<char>()), size + 64);
  mx::array found(shape, mx::uint8, nullptr, {});
  found.copy_shared_buffer(whole, whole.strides(), whole.flags(), size, 64 - (uintptr_t)whole.data<char>() % 64);
  found.set_status(mx::array::Status::available);
  return found;
}

bool move_into(mx::array array, const mx::array& pages, int64_t at) {
  if (!array.is_available() || !array.flags().row_contiguous || array.data_shared_ptr().use_count() != 1) return false;
  const int64_t bytes = array.nbytes(), item = array.itemsize();
  if (pages.dtype() != mx::uint8 || at < 0 || at % item || at + bytes > (int64_t)pages.nbytes()) {
    refuse("move_into", ": ", bytes, " bytes do not fit ", pages.dtype(), pages.shape(), " at ", at);
  }
  constexpr int64_t kPiece = 1 << 20;
  const char* from = array.data<char>();
  char* to = const_cast<char*>(pages.data<char>()) + at;
  Pool::get().parallel_for((int)((bytes + kPiece - 1) / kPiece), [&](int i) {
    std::memcpy(to + i * kPiece, from + i * kPiece, std::min(kPiece, bytes - i * kPiece));
  });
  array.copy_shared_buffer(pages, array.strides(), array.flags(), array.data_size(), at / item);
  return true;
}

}  // namespace runner
