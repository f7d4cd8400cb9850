// Reads cpuid, asks Linux for AMX.
#include "isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace kv {
namespace {

bool has_amx_bf16() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool has_tiles = (edx >> 22 & 1) && (edx >> 24 & 1);
  const bool has_vnni = ecx >> 11 & 1;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
  const bool has_avx512_bf16 = eax >> 5 & 1;
  if (!has_tiles || !has_vnni || !has_avx512_bf16) return false;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

Isa detect_isa(Isa most) {
  // These also ask whether the system saves the wide registers.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (most >= Isa::kAmx && has_avx512 && has_amx_bf16()) return Isa::kAmx;
  if (most >= Isa::kAvx512 && has_avx512) return Isa::kAvx512;
  if (most >= Isa::kAvx2 && has_avx2) return Isa::kAvx2;
  return Isa::kNone;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAmx: return "amx";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    case Isa::kNone: break;
  }
  return "none";
}

}  // namespace kv
