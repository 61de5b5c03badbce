// AVX2 with VNNI (Alder Lake and later without AVX-512, Zen 5).
#if defined(__x86_64__)
#define TP_VNNI _mm256_dpbusd_avx_epi32
#include "target.h"
TP_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
#include "avx2.inc"

extern "C" const struct tp_kernels tp_avxvnni = {"avxvnni", sizeof(Set::Pair), Set::most_rows, false, prepare, work, &vector};
TP_TARGET_END
#endif
