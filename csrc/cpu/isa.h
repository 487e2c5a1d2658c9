// Which instruction sets this build has bodies for, and which of them this CPU can run.
//
// Every body is the same source (<family>/cpu.inl), compiled once per set inside a
// `#pragma GCC target` region: the rest of the build keeps baseline flags, so no AVX instruction
// can leak into code that any CPU may run.
#pragma once
#include <string>
#include <vector>

namespace tessella {

// In order of preference, best first. Those with bodies that multiply bf16, where the CPU can.
#if defined(__x86_64__)
#define TSL_FOR_EACH_ISA(X) X(avx512vnni) X(avxvnni) X(avx2) X(scalar)
#define TSL_FOR_EACH_BF16_ISA(X) X(avx512vnni)
#define TSL_X86 1
#else
#define TSL_FOR_EACH_ISA(X) X(scalar)
#define TSL_FOR_EACH_BF16_ISA(X)
#define TSL_X86 0
#endif

enum class Isa {
#define X(isa) isa,
  TSL_FOR_EACH_ISA(X)
#undef X
};

const char* isa_name(Isa isa);
int isa_lanes(Isa isa);       // 32-bit lanes of its vectors
bool isa_supported(Isa isa);  // by this CPU
bool has_bf16(Isa isa);       // this CPU has bf16 dot products for that set's vectors
std::vector<Isa> all_isas();  // compiled, best first
bool parse_isa(const std::string& name, Isa* isa);

}  // namespace tessella
