// AVX2 with FMA (Haswell, Zen and later).
#if defined(__x86_64__)
#include "target.h"
TP_TARGET_BEGIN("avx2,fma,f16c")
#include "avx2.inc"

extern "C" const struct tp_kernels tp_avx2 = {"avx2", sizeof(Set::Pair), Set::most_rows, false, Set::digits, prepare, work, &vector};
TP_TARGET_END
#endif
