// Functions for an instruction set that the compiler is not told of for the whole program. With TP_EMULATED, for tests on processors that
// lack it, instructions are functions of SIMDe (simd-everywhere) instead.
#pragma once

#define TP_PRAGMA(text) _Pragma(#text)
#if defined(TP_EMULATED)
#define TP_TARGET_BEGIN(names)
#define TP_TARGET_END
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32

// What the SIMDe of Debian 12 lacks, by halves.
template <typename Whole, typename Half> static inline Whole tp_join(const Half (&half)[2]) {
    Whole whole;
    __builtin_memcpy(&whole, half, sizeof whole);
    return whole;
}
template <typename Half, typename Whole> static inline Half tp_half(const Whole &whole, int which) {
    Half half;
    __builtin_memcpy(&half, (const char *)&whole + which * sizeof half, sizeof half);
    return half;
}
#undef _mm512_cvtepi16_epi32
#define _mm512_cvtepi16_epi32 tp_cvtepi16_epi32
static inline simde__m512i tp_cvtepi16_epi32(simde__m256i a) {
    return tp_join<simde__m512i, simde__m256i>({simde_mm256_cvtepi16_epi32(tp_half<simde__m128i>(a, 0)), simde_mm256_cvtepi16_epi32(tp_half<simde__m128i>(a, 1))});
}
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps tp_cvtepi32_ps
static inline simde__m512 tp_cvtepi32_ps(simde__m512i a) {
    return tp_join<simde__m512, simde__m256>({simde_mm256_cvtepi32_ps(tp_half<simde__m256i>(a, 0)), simde_mm256_cvtepi32_ps(tp_half<simde__m256i>(a, 1))});
}
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps tp_cvtph_ps
static inline simde__m512 tp_cvtph_ps(simde__m256i a) {
    return tp_join<simde__m512, simde__m256>({simde_mm256_cvtph_ps(tp_half<simde__m128i>(a, 0)), simde_mm256_cvtph_ps(tp_half<simde__m128i>(a, 1))});
}
#elif defined(__clang__)
#define TP_TARGET_BEGIN(names) TP_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define TP_TARGET_END TP_PRAGMA(clang attribute pop)
#include <immintrin.h>
#else
#define TP_TARGET_BEGIN(names) TP_PRAGMA(GCC push_options) TP_PRAGMA(GCC target(names))
#define TP_TARGET_END TP_PRAGMA(GCC pop_options)
#include <immintrin.h>
#endif
