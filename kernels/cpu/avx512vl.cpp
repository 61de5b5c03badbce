// AVX-512 with VNNI and without BF16 (Cascade Lake, Ice Lake), 256 bits at a time.
#if defined(__x86_64__)
#define TP_VNNI _mm256_dpbusd_epi32
#include "target.h"
TP_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "avx2.inc"

extern "C" const struct tp_kernels tp_avx512vl = {"avx512vl", sizeof(Set::Pair), Set::most_rows, false, Set::digits, prepare, work, &vector};
TP_TARGET_END
#endif
