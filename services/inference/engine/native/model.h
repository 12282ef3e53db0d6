/* A loaded model: packed weights, the pool of pages, scratch memory and threads. */
#ifndef NATIVE_MODEL_H
#define NATIVE_MODEL_H

#include "kernels.h"
#include "native.h"
#include "pool.h"

struct layer {
    struct matrix matrices[NATIVE_LAYER_MATRICES]; /* by enum native_weight; queries, keys and values follow each other,
                                                      as do gate and up */
    float *vectors[NATIVE_VECTORS]; /* by enum native_weight; NULL where the family has none */
    int32_t window, rope;
};

struct span {
    int32_t row, rows; /* consecutive positions of one sequence */
};

struct native_model {
    struct native_config config;
    const struct kernels *kernels;
    struct pool *threads;
    struct layer *layers; /* one more than there are: it holds the final norm */
    struct matrix embedding, head; /* the same where they are tied */
    float *vectors; /* [layers + 1][NATIVE_VECTORS][vector_stride] */
    float **cosines, **sines; /* [ropes], each [context][head_dim / 2] */

    char *pages; /* [page][layer][kv_head][page_head_bytes] */
    size_t page_bytes, page_head_bytes;

    /* Scratch for max_rows rows; strides in floats. */
    int32_t vector_stride, ffn_width, hidden_stride, qkv_stride, attended_stride, ffn_stride;
    float *x, *normed, *qkv, *attended, *gate_up, *y;
    struct span *spans;
    float *attention_scratch; /* for each thread */
    size_t attention_scratch_stride;

    char *memory; /* all of the above */
    size_t memory_bytes, pages_bytes;
};

#endif
