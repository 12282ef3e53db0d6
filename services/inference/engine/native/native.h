/* The native step: what Python calls, by ctypes. See step.c for how a step goes.
 *
 * native_model_new, then each weight and rope once, then native_step as often as wanted, native_model_free.
 * Nothing here is called by two threads at once; a step uses threads of its own. */
#ifndef NATIVE_H
#define NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define NATIVE_INTERFACE 2
#define PAGE_TOKENS 16

/* How the numbers of a matrix are stored. Blocks are those of GGUF files: 32 inputs of an output (Q4_K: 256) with a
 * scale of their own. They are kept as they are; no value changes. */
enum native_format {
    NATIVE_FLOAT32,
    NATIVE_BFLOAT16,
    NATIVE_Q8_0,
    NATIVE_Q4_0,
    NATIVE_Q4_1,
    NATIVE_Q4_K,
    NATIVE_FORMATS,
};

/* Mirrored field by field in library.py. */
struct native_config {
    int32_t hidden, heads, kv_heads, head_dim, ffn, vocab, context, layers, ropes;
    int32_t bf16;      /* keys and values: bfloat16, else float32 */
    int32_t gelu_tanh; /* the activation, else silu */
    int32_t tied;      /* the head is the embedding */
    int32_t pages, threads;
    int32_t max_rows; /* computed at once; a step with more goes in slices */
    float norm_eps, embedding_scale, query_scale, attention_softcap, logit_softcap;
};

/* The weights of a layer: vectors, then matrices; those of the whole model are set with layer -1. */
enum native_weight {
    NATIVE_ATTENTION_NORM,
    NATIVE_QKV_BIAS,
    NATIVE_Q_NORM,
    NATIVE_K_NORM,
    NATIVE_OUTPUT_BIAS,
    NATIVE_POST_ATTENTION_NORM,
    NATIVE_FFN_NORM,
    NATIVE_POST_FFN_NORM,
    NATIVE_FINAL_NORM,
    NATIVE_VECTORS,
    NATIVE_QUERY = NATIVE_VECTORS,
    NATIVE_KEY,
    NATIVE_VALUE,
    NATIVE_OUTPUT,
    NATIVE_GATE,
    NATIVE_UP,
    NATIVE_DOWN,
    NATIVE_LAYER_END,
    NATIVE_EMBEDDING = NATIVE_LAYER_END,
    NATIVE_HEAD,
    NATIVE_WEIGHTS,
};

enum { NATIVE_LAYER_MATRICES = NATIVE_LAYER_END - NATIVE_VECTORS };

/* A step's rows, one for each token. The caller has checked every index. */
struct native_batch {
    int32_t rows;
    int32_t page_columns;        /* of page_table */
    int32_t logit_rows;          /* how many rows' logits are wanted */
    int32_t logit_stride;        /* floats from one row of logits to the next, a multiple of 16 */
    const int32_t *tokens;       /* [rows] */
    const int32_t *positions;    /* [rows] */
    const int32_t *sequences;    /* [rows]: row of page_table; a sequence's tokens follow each other */
    const int32_t *page_table;   /* [sequences][page_columns] */
    const int32_t *wanted;       /* [logit_rows]: rows, ascending */
    float *logits;               /* [logit_rows][logit_stride] */
};

struct native_model;

#pragma GCC visibility push(default)

int32_t native_interface(void);

/* Bytes that one page takes over all layers. */
size_t native_page_bytes(const struct native_config *config);

/* The i-th instruction set that this machine can run, best first; NULL after the last. */
const char *native_instruction_set(int32_t i);

/* Bytes of a row of so many inputs as native_model_set takes it; 0 where rows of that length cannot be. */
size_t native_row_bytes(int32_t format, int32_t inputs);

/* NULL where memory or threads are not to be had. windows and ropes: one for each layer. formats: one for each matrix,
 * [layers][NATIVE_LAYER_MATRICES], then embedding and head (the same where they are tied). Of the optional weights
 * (biases, norms of heads and outputs) a layer has those that are set. */
struct native_model *native_model_new(const struct native_config *config, const char *instruction_set,
                                      const int32_t *windows, const int32_t *ropes, const int32_t *formats);

/* Copies a weight in, packed. Matrices are [outputs][inputs] in their format, vectors float32. */
void native_model_set(struct native_model *model, int32_t layer, int32_t weight, const void *values);

/* Both [context][head_dim / 2]; copied. */
void native_model_set_rope(struct native_model *model, int32_t rope, const float *cosines, const float *sines);

void native_step(struct native_model *model, const struct native_batch *batch);

void native_model_free(struct native_model *model);

#pragma GCC visibility pop

#endif
