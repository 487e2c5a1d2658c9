// Memory that is streamed wants huge pages: a virtual machine walks two page tables for every
// 4 KB page, and the cores' prefetchers stop at each page's end.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tessella {

// Ask for huge pages behind bytes p..p+n-1, before they are first written. Only a hint: where the
// system has none to give, or is set to never give any, ordinary pages it is.
inline void advise_huge_pages(void* p, size_t n) {
#if defined(MADV_HUGEPAGE)
  // outwards to whole small pages: the allocator maps large blocks with a header of its own in
  // front, and advising all of a mapping keeps it in one piece
  constexpr uintptr_t kPage = 4096, kHuge = uintptr_t{2} << 20;
  if (n < kHuge) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + n + kPage - 1) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p;
  (void)n;
#endif
}

}  // namespace tessella
