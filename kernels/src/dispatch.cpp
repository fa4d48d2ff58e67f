#include "dispatch.h"

#include <atomic>

#include "instruction_sets.h"

#if defined(BDK_X86)
#include <cpuid.h>
#if defined(BDK_AMX_BUILT) && !defined(BDK_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(BDK_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace bdk {
namespace {

using Probe = bool (*)();

#if defined(BDK_X86)
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_vbmi() { return has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi"); }

#if defined(BDK_EMULATE_AMX)
bool has_amx_int8() { return has_avx512_vbmi(); }
#elif defined(BDK_AMX_BUILT)
// Linux saves the registers of processes that have asked for it; others end with SIGILL at the first use.
bool may_use_amx() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

bool has_amx_int8() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kTileAndInt8Bits = 1u << 24 | 1u << 25;
  return has_avx512_vbmi() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
         (edx & kTileAndInt8Bits) == kTileAndInt8Bits && may_use_amx();
}
#endif

bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAvxVnniBit = 1u << 4;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kAvxVnniBit) != 0;
}
#endif

#if defined(BDK_NEON)
#if defined(__linux__)
bool has_neon_dotprod() { return (getauxval(AT_HWCAP) & (1ul << 20)) != 0; }                      // HWCAP_ASIMDDP
bool has_neon_i8mm() { return has_neon_dotprod() && (getauxval(AT_HWCAP2) & (1ul << 13)) != 0; }  // HWCAP2_I8MM
#else
bool has_neon_dotprod() { return true; }  // every Apple processor that runs 64-bit macOS
bool has_neon_i8mm() { return false; }
#endif
#endif

bool always() { return true; }

struct Entry {
  const InstructionSet* set;
  Probe available;
};

const Entry kEntries[] = {
#if defined(BDK_X86)
#if defined(BDK_AMX_BUILT)
    {&kAmxInt8, has_amx_int8},
#endif
#if !defined(BDK_EMULATE_AMX)  // which is the same but for many tokens: one of both is enough to test
    {&kAvx512Vbmi, has_avx512_vbmi},
#endif
    {&kAvx512Vnni, has_avx512_vnni},
    {&kAvxVnni, has_avx_vnni},
    {&kAvx2, has_avx2},
#elif defined(BDK_NEON)
    {&kNeonI8mm, has_neon_i8mm},
    {&kNeonDotprod, has_neon_dotprod},
#endif
    {&kScalar, always},
};
constexpr int kCount = sizeof kEntries / sizeof kEntries[0];

int best() {
  for (int index = 0; index < kCount; ++index)
    if (kEntries[index].available()) return index;
  return kCount - 1;
}

std::atomic<int>& chosen() {
  static std::atomic<int> index{best()};
  return index;
}

}  // namespace

int instruction_set_count() { return kCount; }

const InstructionSet* instruction_set(int index) {
  return index >= 0 && index < kCount ? kEntries[index].set : nullptr;
}

bool instruction_set_available(int index) { return index >= 0 && index < kCount && kEntries[index].available(); }

int chosen_instruction_set() { return chosen().load(); }

bool choose_instruction_set(int index) {
  if (!instruction_set_available(index)) return false;
  chosen().store(index);
  return true;
}

}  // namespace bdk
