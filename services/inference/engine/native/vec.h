/* Vectors of floats, as wide as the instruction set that this is compiled for, and the functions over them.
 *
 * Everything is counted in panels of 16 floats (PANEL), whatever the width: a sum over a row has 16 lanes, reduced in
 * one order. No expression here is contracted or reordered by the compiler; where a multiply-add is wanted it is
 * written as multiply_add(). */
#ifndef NATIVE_VEC_H
#define NATIVE_VEC_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define PANEL 16
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define PARTS (PANEL / WIDTH) /* vectors in a panel */

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vec_int __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vec_bits __attribute__((vector_size(4 * WIDTH)));
typedef float vec_any __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t vec_bits_any __attribute__((vector_size(4 * WIDTH), aligned(2), may_alias));

INLINE vec load(const float *from)
{
    return *(const vec_any *)from;
}

INLINE void store(float *to, vec value)
{
    *(vec_any *)to = value;
}

INLINE vec splat(float x)
{
    return x - (vec){0};
}

INLINE vec multiply_add(vec a, vec b, vec c)
{
#if WIDTH == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif WIDTH == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FMA__)
    return (vec)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vec choose(vec_int where, vec yes, vec no)
{
    return (vec)((where & (vec_int)yes) | (~where & (vec_int)no));
}

INLINE vec vec_max(vec a, vec b)
{
    return choose(a > b, a, b);
}

/* The sum of a panel's 16 lanes, in an order that does not depend on WIDTH. */
INLINE float panel_sum(const vec *parts)
{
    float lanes[PANEL];
    UNROLL for (int i = 0; i < PARTS; i++) store(lanes + i * WIDTH, parts[i]);
    UNROLL for (int half = PANEL / 2; half; half /= 2)
        UNROLL for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* e^x, at most 1.1 units in the last place off (measured over every third float); clamped to where it is normal. */
INLINE vec vec_exp(vec x)
{
    x = choose(x < splat(-87.3f), splat(-87.3f), x);
    x = choose(x > splat(88.3f), splat(88.3f), x);
    const vec round = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const vec n = multiply_add(x, splat(1.44269504088896341f), round) - round;
    vec r = multiply_add(n, splat(-0.693359375f), x); /* ln 2 in two parts, the first short enough to be exact */
    r = multiply_add(n, splat(2.12194440e-4f), r);
    vec p = splat(1.9875691500e-4f);
    p = multiply_add(p, r, splat(1.3981999507e-3f));
    p = multiply_add(p, r, splat(8.3334519073e-3f));
    p = multiply_add(p, r, splat(4.1665795894e-2f));
    p = multiply_add(p, r, splat(1.6666665459e-1f));
    p = multiply_add(p, r, splat(5.0000001201e-1f));
    p = multiply_add(p, r * r, r) + splat(1.0f);
    return p * (vec)((vec_bits)(__builtin_convertvector(n, vec_int) + 127) << 23);
}

/* At most 1.4 units in the last place off, measured likewise. */
INLINE vec vec_tanh(vec x)
{
    const vec_int sign = (vec_int)x & (int32_t)0x80000000;
    const vec size = (vec)((vec_int)x & 0x7fffffff);
    const vec far = splat(1.0f) - splat(2.0f) / (vec_exp(size + size) + splat(1.0f));
    const vec square = x * x;
    vec p = splat(-5.70498872745e-3f);
    p = multiply_add(p, square, splat(2.06390887954e-2f));
    p = multiply_add(p, square, splat(-5.37397155531e-2f));
    p = multiply_add(p, square, splat(1.33314422036e-1f));
    p = multiply_add(p, square, splat(-3.33332819422e-1f));
    const vec near = multiply_add(p * square, x, x);
    return choose(size < splat(0.625f), near, (vec)((vec_int)far | sign));
}

/* bfloat16: a panel is stored so that a shift and a mask make vectors of it. Lane i of the lower halves is output i of
 * a vector, lane i of the upper halves output i of the next one. */
INLINE int bf16_slot(int i)
{
#if WIDTH == PANEL
    return i;
#else
    return i / (2 * WIDTH) * (2 * WIDTH) + 2 * (i % WIDTH) + i / WIDTH % 2;
#endif
}

INLINE float bf16_to_float(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Rounds to nearest, ties to even; a NaN stays one. */
INLINE uint16_t bf16_from_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Reads 16 values of a panel. */
INLINE void load_panel(int bf16, const char *from, vec *parts)
{
    if (!bf16) {
        UNROLL for (int i = 0; i < PARTS; i++) parts[i] = load((const float *)from + i * WIDTH);
        return;
    }
#if WIDTH == PANEL
    parts[0] = (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#else
    UNROLL for (int i = 0; i < PARTS / 2; i++) {
        const vec_bits pair = *(const vec_bits_any *)(from + i * 4 * WIDTH);
        parts[2 * i] = (vec)(pair << 16);
        parts[2 * i + 1] = (vec)(pair & 0xffff0000u);
    }
#endif
}

#endif
