#include "cpu/isa.h"

namespace tessella {

const char* isa_name(Isa isa) {
  switch (isa) {
#define X(name)   \
  case Isa::name: \
    return #name;
    TSL_FOR_EACH_ISA(X)
#undef X
  }
  return "?";
}

int isa_lanes(Isa isa) {
  switch (isa) {
#if TSL_X86
    case Isa::avx512vnni:
      return 16;
    case Isa::avxvnni:
    case Isa::avx2:
      return 8;
#endif
    case Isa::scalar:
      return 1;
  }
  return 1;
}

std::vector<Isa> all_isas() {
  return {
#define X(name) Isa::name,
      TSL_FOR_EACH_ISA(X)
#undef X
  };
}

bool parse_isa(const std::string& name, Isa* isa) {
  for (Isa i : all_isas())
    if (name == isa_name(i)) {
      *isa = i;
      return true;
    }
  return false;
}

#if TSL_X86
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// AVX-VNNI is not among the names that gcc 11's __builtin_cpu_supports knows: cpuid leaf 7.1, eax
// bit 4. The operating system's part (saving ymm) is what "avx2" already tells.
static bool has_avxvnni() {
  unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return has_avx2() && (eax >> 4 & 1);
}

static bool max_leaf_has_7_1() {
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return eax >= 1;
}

bool isa_supported(Isa isa) {
  __builtin_cpu_init();
  switch (isa) {
    case Isa::avx512vnni:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    case Isa::avxvnni:
      return has_avx2() && max_leaf_has_7_1() && has_avxvnni();
    case Isa::avx2:
      return has_avx2();
    case Isa::scalar:
      return true;
  }
  return false;
}

static bool has_avx512_bf16() {  // cpuid leaf 7.1, eax bit 5
  if (!isa_supported(Isa::avx512vnni) || !max_leaf_has_7_1()) return false;
  unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return eax >> 5 & 1;
}

bool has_bf16(Isa isa) {
  static const bool has = has_avx512_bf16();  // cpuid takes microseconds in a virtual machine
  return isa == Isa::avx512vnni && has;
}
#else
bool isa_supported(Isa) { return true; }
bool has_bf16(Isa) { return false; }
#endif

}  // namespace tessella
