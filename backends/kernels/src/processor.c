#include "processor.h"

#include <cpuid.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Linux lets a process use AMX, which makes its threads' saved state larger, only if it asks. */
static bool may_use_amx(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILE_DATA = 18 };
  return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA);
#else
  return false;
#endif
}

static bool has_amx(void) {
  enum { AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25 };
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & AMX_TILE && d & AMX_INT8 && may_use_amx();
}

static bool has_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static bool has_avx512_vnni(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

static const char *const NAMES[] = {NULL, "avx2", "avx512_vnni", "amx_int8"};

const char *processor_name(processor_isa isa) { return NAMES[isa]; }

/* ISA_AMX_INT8 if the variable is not set, or names none of them, which others report. */
static processor_isa most_allowed(void) {
  const char *const name = getenv("HEADRACE_KERNELS_MAX_ISA");
  for (processor_isa isa = ISA_AVX2; name && isa < ISA_AMX_INT8; isa++) {
    if (!strcmp(name, NAMES[isa])) return isa;
  }
  return ISA_AMX_INT8;
}

static processor_isa best = ISA_NONE;

static void find_best(void) {
  __builtin_cpu_init();
  const processor_isa most = most_allowed();
  if (has_avx2()) best = ISA_AVX2;
  if (best == ISA_AVX2 && most > ISA_AVX2 && has_avx512_vnni()) best = ISA_AVX512_VNNI;
  if (best == ISA_AVX512_VNNI && most > ISA_AVX512_VNNI && has_amx()) best = ISA_AMX_INT8;
}

processor_isa processor_best(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, find_best);
  return best;
}
