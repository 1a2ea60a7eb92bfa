#include "tiles.h"

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace runner {
namespace {

#if defined(__x86_64__) && defined(__linux__)

// Intel's Software Developer's Manual, volume 1, chapter 18: the leaves 7 (what there is) and 1D (palettes), and XCR0.
bool has_tiles() {
  constexpr unsigned kSaving = 1u << 27, kTiles = 1u << 24, kInt8 = 1u << 25;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaving)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTiles | kInt8)) != (kTiles | kInt8)) return false;
  // Palette 1: bytes of a row and registers, rows.
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) return false;
  return (b & 0xffff) == 64 && b >> 16 == 8 && (c & 0xffff) == 16;
}

bool system_saves_tiles() {
  constexpr unsigned kState = 3u << 17;  // configuration and data
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kState) == kState;
}

// Documentation/arch/x86/xstate.rst of Linux: whoever uses the data without leave is ended. A signal's frame then has 8 KiB
// more, which is why it is refused to a process with a stack for signals that is too small for it.
bool ask() {
  constexpr long kRequest = 0x1023, kHave = 0x1022, kData = 18;
  uint64_t granted = 0;
  if (syscall(SYS_arch_prctl, kRequest, kData) != 0) return false;
  return syscall(SYS_arch_prctl, kHave, &granted) == 0 && (granted >> kData & 1);
}

const char* find_out() {
  if (!has_tiles()) return "this CPU has no AMX with products of bytes";
  if (!system_saves_tiles()) return "the system does not keep the state of AMX";
  if (!ask()) return "the system refuses the state of AMX (arch_prctl, Linux 5.16 and later)";
  return nullptr;
}

#else

const char* find_out() { return "AMX is of Linux on x86-64 here"; }

#endif

}  // namespace

const char* why_no_tiles() {
  static const char* const why = find_out();
  return why;
}

}  // namespace runner
