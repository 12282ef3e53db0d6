/* The inner loops, compiled once for each instruction set (variant.c), and what they work on.
 *
 * All of them keep one promise: what is computed for a row depends on that row alone. Each sum is one chain (or 16,
 * reduced in one order), whatever the tile it is computed in. So a row is bit-equal alone, in any batch, at any
 * chunking and on any number of threads. */
#ifndef NATIVE_KERNELS_H
#define NATIVE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "native.h"

/* y = x W^T. W is stored in panels of 16 outputs, so that 16 outputs advance by one input with a few loads: floats as
 * panel[input][16], blocks as blocks.c has them. The last panel is filled up with zeros. */
struct matrix {
    char *panels;
    size_t panel_bytes;
    int32_t inputs, panel_count, format; /* enum native_format */
};

/* Floats in a row of activations: a multiple of 16, the end always zero, and no multiple of 1 KiB, since rows that are
 * a power of two apart fight for the same lines of cache. */
static inline int32_t row_stride(int32_t values)
{
    const int32_t stride = (values + 15) / 16 * 16;
    return stride % 256 ? stride : stride + 16;
}

enum {
    BLOCK = 32,        /* inputs that share a scale */
    SUPER_BLOCK = 256, /* of NATIVE_Q4_K: inputs whose scales share a scale */
};

/* A group is what a panel holds of a block of each of its 16 outputs: what scales them, then their quants. */
static inline size_t group_header_bytes(int32_t format)
{
    return format == NATIVE_Q4_1 ? 64 : 32;
}

static inline size_t group_bytes(int32_t format)
{
    return group_header_bytes(format) + (format == NATIVE_Q8_0 ? 16 * BLOCK : 16 * BLOCK / 2);
}

enum { SUPER_HEADER_BYTES = 64 };

static inline size_t panel_bytes(int32_t format, int32_t inputs)
{
    switch (format) {
    case NATIVE_FLOAT32:
        return (size_t)inputs * 16 * 4;
    case NATIVE_BFLOAT16:
        return (size_t)inputs * 16 * 2;
    case NATIVE_Q4_K:
        return (size_t)(inputs / SUPER_BLOCK) * (SUPER_HEADER_BYTES + SUPER_BLOCK / BLOCK * group_bytes(format));
    default:
        return (size_t)(inputs / BLOCK) * group_bytes(format);
    }
}

/* Attention of consecutive rows of one sequence, `queries` heads that share one KV head. */
struct attention {
    int32_t rows, group, head_dim, bf16;
    int32_t position; /* of the first row */
    int32_t window;   /* 0: all */
    float softcap;
    const float *queries; /* head `g` of row `r` at r * query_stride + g * head_dim */
    int32_t query_stride;
    const char *pool;          /* the KV head's part of page 0 */
    size_t page_stride;        /* bytes from a page to the next */
    const int32_t *page_table; /* of the sequence */
    float *outputs;            /* as queries */
    int32_t output_stride;
    float *scratch; /* attention_scratch() floats */
};

static inline int32_t attention_rows(int32_t group)
{
    return group >= 6 ? 1 : 6 / group;
}

static inline size_t attention_scratch(int32_t group, int32_t head_dim, int32_t context)
{
    const size_t queries = (size_t)group * attention_rows(group);
    return queries * ((size_t)row_stride(context + 16) + 2 * (size_t)head_dim) + 64;
}

struct kernels {
    const char *name;

    /* Packs rows [outputs][inputs] of the matrix' format into its panels. */
    void (*pack)(const struct matrix *matrix, const void *values, int32_t outputs);
    /* Panels [begin, end) of y for all rows. */
    void (*matmul)(const struct matrix *matrix, int32_t begin, int32_t end, const float *x, int32_t x_stride, float *y,
                   int32_t y_stride, int32_t rows);
    /* Row `index` of a packed matrix, times `scale`. */
    void (*embed)(const struct matrix *matrix, int32_t index, float scale, float *x);

    /* y = x / sqrt(mean(x^2) + eps) * weight; y may be x. Weight is padded with zeros as rows are. */
    void (*norm)(const float *x, const float *weight, float *y, int32_t values, float eps);
    void (*add)(float *x, const float *y, int32_t values);
    void (*scale)(float *x, float factor, int32_t values);
    void (*rotate)(float *head, const float *cosines, const float *sines, int32_t head_dim);
    /* gate = activation(gate) * up */
    void (*gate)(float *gate, const float *up, int32_t values, int32_t gelu_tanh);
    void (*softcap)(float *x, int32_t values, float cap);

    /* Stores a token's key and value of one KV head into its page. */
    void (*keep)(char *page, int32_t slot, const float *key, const float *value, int32_t head_dim, int32_t bf16);
    void (*attend)(const struct attention *attention);
};

extern const struct kernels kernels_portable, kernels_avx2, kernels_avx512;

#endif
