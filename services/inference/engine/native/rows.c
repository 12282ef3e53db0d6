/* What is done to each row by itself: part of variant.c. Rows are padded to whole panels (kernels.h). */
#include <math.h>

#include "vec.h"

#include "kernels.h"

static void norm(const float *x, const float *weight, float *y, int32_t values, float eps)
{
    vec sums[PARTS] = {{0}};
    for (int32_t i = 0; i < values; i += PANEL)
        UNROLL for (int p = 0; p < PARTS; p++) {
            const vec part = load(x + i + p * WIDTH);
            sums[p] = multiply_add(part, part, sums[p]);
        }
    const float factor = 1.0f / sqrtf(panel_sum(sums) / (float)values + eps);
    for (int32_t i = 0; i < values; i += PANEL)
        UNROLL for (int p = 0; p < PARTS; p++) {
            const int32_t at = i + p * WIDTH;
            store(y + at, load(x + at) * splat(factor) * load(weight + at));
        }
}

static void add(float *x, const float *y, int32_t values)
{
    for (int32_t i = 0; i < values; i += WIDTH)
        store(x + i, load(x + i) + load(y + i));
}

static void scale(float *x, float factor, int32_t values)
{
    for (int32_t i = 0; i < values; i += WIDTH)
        store(x + i, load(x + i) * splat(factor));
}

static void rotate(float *head, const float *cosines, const float *sines, int32_t head_dim)
{
    const int32_t half = head_dim / 2;
    for (int32_t i = 0; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cosines[i] - b * sines[i];
        head[half + i] = b * cosines[i] + a * sines[i];
    }
}

static void gate(float *gate, const float *up, int32_t values, int32_t gelu_tanh)
{
    const vec one = splat(1.0f);
    for (int32_t i = 0; i < values; i += WIDTH) {
        const vec x = load(gate + i);
        vec y;
        if (gelu_tanh) {
            const vec inner = multiply_add(x * x * x, splat(0.044715f), x) * splat(0.7978845608028654f);
            y = splat(0.5f) * x * (one + vec_tanh(inner));
        } else {
            y = x / (one + vec_exp(-x));
        }
        store(gate + i, y * load(up + i));
    }
}

static void softcap(float *x, int32_t values, float cap)
{
    for (int32_t i = 0; i < values; i += WIDTH)
        store(x + i, vec_tanh(load(x + i) / splat(cap)) * splat(cap));
}
