// AVX-512 with VNNI and BF16 (Zen 4, Cooper Lake, Sapphire Rapids and later).
#include "linear.h"
#if defined(__x86_64__) && defined(TP_KNOWS_BF16)
#include "target.h"
TP_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#include "linear.h"
#define TP_WIDE // instructions of AVX2 are there, too
#if defined(TP_EMULATED)
#define TP_UNROLL
#else
#define TP_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

#include "floats.inc"

struct Set {
    static constexpr int most_rows = 16;
    static constexpr int digits = 0;
    using Int = __m512i;
    using Float = __m512;
    using Bytes = __m512i;
    using Halves = __m512i;
    using Pair = uint32_t;

    // bf16 of 0, 1, ... less the middle, twice over: vpermw looks at five bits of an index, of which the upper ones may be anything.
    template <int bits> static __m512i table() {
        alignas(64) uint16_t words[32];
        for (int i = 0; i < 32; ++i) {
            union { float value; uint32_t bits_; } u = {(float)((i & ((1 << bits) - 1)) - (1 << (bits - 1)))};
            words[i] = (uint16_t)(u.bits_ >> 16);
        }
        return _mm512_load_si512(words);
    }

    template <int bits> struct Planes {
        __m512i value;
        explicit Planes(const uint8_t *data) : value(_mm512_load_si512(data)) {}
        Bytes bytes(int step) const {
            if (bits == 8) return value;
            const __m512i mask = _mm512_set1_epi8((1 << bits) - 1);
            return _mm512_and_si512(step ? _mm512_srli_epi16(value, step * bits) : value, mask);
        }
        Halves halves(int step) const {
            constexpr int steps = bits == 4 ? 2 : 4;
            const int shift = step < steps ? bits * step : 8 + bits * (step - steps);
            return _mm512_permutexvar_epi16(shift ? _mm512_srli_epi16(value, shift) : value, table<bits>());
        }
    };

    static Int int_all(int32_t value) { return _mm512_set1_epi32(value); }
    static Float float_zero() { return _mm512_setzero_ps(); }
    static void prefetch(const uint8_t *data) { _mm_prefetch((const char *)data, _MM_HINT_T0); }
    static void dot(Int &sum, Bytes w, int32_t x) { sum = _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x)); }
    static void dot(Float &sum, Halves w, Pair x) {
        sum = _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
    }
    static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static __m512i zeros(const int16_t *zero) { return _mm512_cvtepi16_epi32(_mm256_load_si256((const __m256i *)zero)); }
    static Int less(Int total, int32_t value) { return _mm512_sub_epi32(total, _mm512_set1_epi32(value)); }
    static Int less(Int total, const int16_t *zero, int32_t value) {
        return _mm512_sub_epi32(total, _mm512_mullo_epi32(zeros(zero), _mm512_set1_epi32(value)));
    }
    static Float less(Float total, const int16_t *zero, int middle, float value) {
        const __m512 shift = _mm512_cvtepi32_ps(_mm512_sub_epi32(zeros(zero), _mm512_set1_epi32(middle)));
        return _mm512_fnmadd_ps(shift, _mm512_set1_ps(value), total);
    }
    static Float halves_to_float(const uint16_t *half) { return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)half)); }
    static Float add_scaled(Float result, Int total, Float own, float x) {
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(own, _mm512_set1_ps(x)), result);
    }
    static Float add_product(Float result, Float total, Float own) { return _mm512_fmadd_ps(total, own, result); }
    static void store(float *to, Float value) { _mm512_storeu_ps(to, value); }

    template <int bits> static Pair pair(float first, float second, int) { return float_to_bf16(first) | (uint32_t)float_to_bf16(second) << 16; }
    static float rounded(float value) { return bf16_to_float(float_to_bf16(value)); }
};

template <> struct Set::Planes<3> {
    __m512i plane[3];
    explicit Planes(const uint8_t *data) : plane{_mm512_load_si512(data), _mm512_load_si512(data + 64), _mm512_load_si512(data + 128)} {}
    // Steps 2 p and 2 p + 1 in the halves of each byte, of which the fourth bits may be anything.
    __m512i fours(int p) const {
        if (p < 3) return plane[p];
        const __m512i two = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x22), _mm512_srli_epi16(plane[1], 2), _mm512_srli_epi16(plane[2], 1), 0xCA);
        return _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x11), _mm512_srli_epi16(plane[0], 3), two, 0xCA); // mask ? a : b
    }
    Bytes bytes(int step) const {
        const __m512i both = fours(step / 2);
        return _mm512_and_si512(step & 1 ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(7));
    }
    Halves halves(int t) const {
        const int step = t & 7, shift = (t < 8 ? 0 : 8) + 4 * (step & 1);
        const __m512i both = fours(step / 2);
        return _mm512_permutexvar_epi16(shift ? _mm512_srli_epi16(both, shift) : both, table<3>());
    }
};

template <> struct Set::Planes<8> {
    __m512i value;
    explicit Planes(const uint8_t *data) : value(_mm512_load_si512(data)) {}
    Bytes bytes(int) const { return value; }
    // whole numbers of up to 8 bits are exact in bf16: the upper half of their float
    Halves halves(int step) const {
        const __m512i first = step ? _mm512_srli_epi32(value, 8) : value;
        const __m512i byte = _mm512_set1_epi32(255), middle = _mm512_set1_epi32(128);
        const __m512i a = _mm512_sub_epi32(_mm512_and_si512(first, byte), middle);
        const __m512i b = _mm512_sub_epi32(_mm512_and_si512(_mm512_srli_epi32(first, 16), byte), middle);
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(a)), 16);
        return _mm512_or_si512(low, _mm512_and_si512(_mm512_castps_si512(_mm512_cvtepi32_ps(b)), _mm512_set1_epi32((int)0xffff0000u)));
    }
};

template <> struct Set::Planes<16> {
    const uint8_t *data;
    explicit Planes(const uint8_t *data) : data(data) {}
    Halves halves(int plane) const { return _mm512_load_si512(data + 64 * plane); }
};

#include "inputs.inc"
#include "loops.inc"
#include "dispatch.inc"

} // namespace

extern "C" const struct tp_kernels tp_avx512 = {"avx512", sizeof(Set::Pair), Set::most_rows, true, Set::digits, prepare, work, &vector};
TP_TARGET_END
#endif
