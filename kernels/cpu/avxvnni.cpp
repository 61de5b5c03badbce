// AVX2 with VNNI (Alder Lake and later without AVX-512).
#include "linear.h"
#if defined(__x86_64__) && defined(TP_KNOWS_AVXVNNI)
#define TP_VNNI _mm256_dpbusd_avx_epi32
#include "target.h"
TP_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
#include "avx2.inc"

extern "C" const struct tp_kernels tp_avxvnni = {"avxvnni", sizeof(Set::Pair), Set::most_rows, false, Set::digits, prepare, work, &vector};
TP_TARGET_END
#endif
