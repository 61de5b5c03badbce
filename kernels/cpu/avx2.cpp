// AVX2 with FMA. Its four-input dot product is of 16-bit sums, which 8-bit weights could overflow: those are multiplied as 16-bit numbers.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "linear.h"
#define TP_UNROLL 

namespace {
#include "lanes.inc"

struct Set : Lanes {
    struct Int { __m256i half[2]; };
    struct Bytes { __m256i half[2]; bool wide; };

    template <int bits> struct Planes : Lanes::Planes<bits> {
        explicit Planes(const uint8_t *data) : Lanes::Planes<bits>(data) {}
        static __m256i load(const uint8_t *data) { return _mm256_load_si256((const __m256i *)data); }
        Bytes bytes(int step) const {
            Bytes out;
            out.wide = bits == 8;
            for (int h = 0; h < 2; ++h) {
                const uint8_t *at = this->data + 32 * h;
                if (bits == 8) out.half[h] = load(at);
                else if (bits == 3) {
                    const __m256i low = _mm256_and_si256(_mm256_srli_epi16(load(at + 64 * (step >> 2)), 2 * (step & 3)), _mm256_set1_epi8(3));
                    const __m256i high = load(at + 128);
                    const __m256i moved = step < 2 ? _mm256_slli_epi16(high, 2 - step) : _mm256_srli_epi16(high, step - 2);
                    out.half[h] = _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi8(4)));
                } else out.half[h] = _mm256_and_si256(_mm256_srli_epi16(load(at), bits * step), _mm256_set1_epi8((1 << bits) - 1));
            }
            return out;
        }
    };

    static Int int_all(int32_t value) { return {{_mm256_set1_epi32(value), _mm256_set1_epi32(value)}}; }
    using Lanes::dot;
    static void dot(Int &sum, const Bytes &w, int32_t x) {
        const __m256i input = _mm256_set1_epi32(x);
        for (int h = 0; h < 2; ++h) {
            __m256i product;
            if (w.wide) {
                const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(input, 8), 8), odd = _mm256_srai_epi16(input, 8);
                product = _mm256_add_epi32(
                    _mm256_madd_epi16(_mm256_and_si256(w.half[h], _mm256_set1_epi16(255)), even),
                    _mm256_madd_epi16(_mm256_srli_epi16(w.half[h], 8), odd));
            } else product = _mm256_madd_epi16(_mm256_maddubs_epi16(w.half[h], input), _mm256_set1_epi16(1));
            sum.half[h] = _mm256_add_epi32(sum.half[h], product);
        }
    }
    using Lanes::add;
    static Int add(const Int &a, const Int &b) {
        return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
    }
    using Lanes::less;
    static Int less(const Int &total, int32_t value) {
        const __m256i all = _mm256_set1_epi32(value);
        return {{_mm256_sub_epi32(total.half[0], all), _mm256_sub_epi32(total.half[1], all)}};
    }
    static Int less(const Int &total, const int16_t *zero, int32_t value) {
        Int out;
        for (int h = 0; h < 2; ++h) {
            const __m256i z = _mm256_cvtepi16_epi32(_mm_load_si128((const __m128i *)(zero + 8 * h)));
            out.half[h] = _mm256_sub_epi32(total.half[h], _mm256_mullo_epi32(z, _mm256_set1_epi32(value)));
        }
        return out;
    }
    static Float add_scaled(const Float &result, const Int &total, const Float &own, float x) {
        Lanes::Int plain;
        _mm256_storeu_si256((__m256i *)plain.lane, total.half[0]);
        _mm256_storeu_si256((__m256i *)(plain.lane + 8), total.half[1]);
        return Lanes::add_scaled(result, plain, own, x);
    }
};

template <> struct Set::Planes<16> : Lanes::Dense { using Dense::Dense; };

#include "linear.inc"

Lanes::Float Lanes::halves_to_float(const uint16_t *half) {
    Float out;
    for (int h = 0; h < 2; ++h) _mm256_storeu_ps(out.lane + 8 * h, _mm256_cvtph_ps(_mm_load_si128((const __m128i *)(half + 8 * h))));
    return out;
}
} // namespace

extern "C" const struct tp_kernels tp_avx2 = {"avx2", sizeof(Set::Pair), Set::most_rows, false, prepare, work, &vector};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
