/* Makes a model: one mapping for weights and scratch, one for the pool. */
#include "model.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h> /* the gaps between pieces of one mapping: see take() */
#endif

enum { HUGE_PAGE = 2 << 20 };

static const struct kernels *const VARIANTS[] = {
#if defined(__x86_64__)
    &kernels_avx512,
    &kernels_avx2,
#endif
    &kernels_portable,
};

static int runs_here(const char *name)
{
#if defined(__x86_64__)
    if (!strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !strcmp(name, "portable");
}

const char *native_instruction_set(int32_t i)
{
    for (size_t v = 0; v < sizeof VARIANTS / sizeof *VARIANTS; v++)
        if (runs_here(VARIANTS[v]->name) && i-- == 0)
            return VARIANTS[v]->name;
    return NULL;
}

int32_t native_interface(void)
{
    return NATIVE_INTERFACE;
}

static size_t page_head_bytes(const struct native_config *c)
{
    return 2 * (size_t)c->head_dim * PAGE_TOKENS * (c->bf16 ? 2 : 4);
}

size_t native_page_bytes(const struct native_config *c)
{
    return page_head_bytes(c) * (size_t)c->kv_heads * (size_t)c->layers;
}

/* Hands out pieces of one block of memory. It is gone through twice: to measure with no block, then with it. */
struct arena {
    char *base;
    size_t used;
};

static void *take(struct arena *arena, size_t bytes)
{
    char *at = arena->base ? arena->base + arena->used : NULL;
    arena->used += (bytes + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    if (at)
        __asan_poison_memory_region(at + bytes, arena->base + arena->used + 64 - (at + bytes));
    arena->used += 64;
#endif
    return at;
}

static float *take_floats(struct arena *arena, size_t count)
{
    return take(arena, count * sizeof(float));
}

static int32_t panels_of(int32_t outputs)
{
    return (outputs + 15) / 16;
}

struct sizes {
    int32_t outputs, inputs;
};

static struct sizes matrix_sizes(const struct native_config *c, int32_t weight)
{
    switch (weight) {
    case NATIVE_QUERY:
        return (struct sizes){c->heads * c->head_dim, c->hidden};
    case NATIVE_KEY:
    case NATIVE_VALUE:
        return (struct sizes){c->kv_heads * c->head_dim, c->hidden};
    case NATIVE_OUTPUT:
        return (struct sizes){c->hidden, c->heads * c->head_dim};
    case NATIVE_GATE:
    case NATIVE_UP:
        return (struct sizes){c->ffn, c->hidden};
    case NATIVE_DOWN:
        return (struct sizes){c->hidden, c->ffn};
    default: /* embedding and head */
        return (struct sizes){c->vocab, c->hidden};
    }
}

size_t native_row_bytes(int32_t format, int32_t inputs)
{
    switch (format) {
    case NATIVE_FLOAT32:
        return (size_t)inputs * 4;
    case NATIVE_BFLOAT16:
        return (size_t)inputs * 2;
    case NATIVE_Q8_0:
        return inputs % BLOCK ? 0 : (size_t)(inputs / BLOCK) * 34;
    case NATIVE_Q4_0:
        return inputs % BLOCK ? 0 : (size_t)(inputs / BLOCK) * 18;
    case NATIVE_Q4_1:
        return inputs % BLOCK ? 0 : (size_t)(inputs / BLOCK) * 20;
    case NATIVE_Q4_K:
        return inputs % SUPER_BLOCK ? 0 : (size_t)(inputs / SUPER_BLOCK) * 144;
    default:
        return 0;
    }
}

static struct matrix take_matrix(struct arena *arena, const struct native_config *c, int32_t weight, int32_t format)
{
    const struct sizes sizes = matrix_sizes(c, weight);
    struct matrix matrix = {.inputs = sizes.inputs, .panel_count = panels_of(sizes.outputs), .format = format};
    matrix.panel_bytes = panel_bytes(format, sizes.inputs);
    matrix.panels = take(arena, matrix.panel_bytes * (size_t)matrix.panel_count);
    return matrix;
}

static void lay_out(struct native_model *m, struct arena *arena, const int32_t *windows, const int32_t *ropes,
                    const int32_t *formats)
{
    const struct native_config *c = &m->config;
    const int32_t heads_dim = c->heads * c->head_dim, qkv = heads_dim + 2 * c->kv_heads * c->head_dim;
    struct layer *layers = take(arena, ((size_t)c->layers + 1) * sizeof *layers);
    m->cosines = take(arena, ((size_t)c->ropes + 1) * sizeof *m->cosines);
    m->sines = take(arena, ((size_t)c->ropes + 1) * sizeof *m->sines);
    for (int32_t i = 0; i < c->ropes; i++) {
        float *cosines = take_floats(arena, (size_t)c->context * c->head_dim / 2);
        float *sines = take_floats(arena, (size_t)c->context * c->head_dim / 2);
        if (arena->base) {
            m->cosines[i] = cosines;
            m->sines[i] = sines;
        }
    }
    for (int32_t i = 0; i < c->layers; i++) {
        struct layer layer = {.window = windows[i], .rope = ropes[i]};
        for (int32_t w = 0; w < NATIVE_LAYER_MATRICES; w++)
            layer.matrices[w] = take_matrix(arena, c, NATIVE_VECTORS + w, *formats++);
        if (arena->base)
            layers[i] = layer;
    }
    m->layers = layers;
    m->head = take_matrix(arena, c, NATIVE_HEAD, formats[1]);
    m->embedding = c->tied ? m->head : take_matrix(arena, c, NATIVE_EMBEDDING, formats[0]);

    m->hidden_stride = row_stride(c->hidden);
    m->qkv_stride = row_stride(qkv);
    m->vector_stride = m->hidden_stride > m->qkv_stride ? m->hidden_stride : m->qkv_stride;
    m->vectors = take_floats(arena, ((size_t)c->layers + 1) * NATIVE_VECTORS * m->vector_stride);
    m->attended_stride = row_stride(heads_dim);
    m->ffn_width = panels_of(c->ffn) * 16;
    m->ffn_stride = row_stride(2 * m->ffn_width);
    const size_t rows = (size_t)c->max_rows;
    m->x = take_floats(arena, rows * m->hidden_stride);
    m->normed = take_floats(arena, rows * m->hidden_stride);
    m->y = take_floats(arena, rows * m->hidden_stride);
    m->qkv = take_floats(arena, rows * m->qkv_stride);
    m->attended = take_floats(arena, rows * m->attended_stride);
    m->gate_up = take_floats(arena, rows * m->ffn_stride);
    m->spans = take(arena, rows * sizeof *m->spans);
    m->attention_scratch_stride = attention_scratch(c->heads / c->kv_heads, c->head_dim, c->context);
    m->attention_scratch = take_floats(arena, m->attention_scratch_stride * (size_t)c->threads);
}

static size_t whole_pages(size_t bytes)
{
    return (bytes + 65535) / 65536 * 65536; /* no system has larger ones */
}

/* Zeros that cost nothing until they are touched. Huge pages spare most of the translation of addresses, which weights
 * that stream by and pages of keys that lie anywhere would need. */
static char *map(size_t bytes)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *memory = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    const size_t before = -(uintptr_t)memory % HUGE_PAGE;
    if (before)
        munmap(memory, before);
    munmap(memory + before + bytes, HUGE_PAGE - before);
#if defined(MADV_HUGEPAGE)
    madvise(memory + before, bytes, MADV_HUGEPAGE);
#endif
    return memory + before;
}

struct native_model *native_model_new(const struct native_config *config, const char *instruction_set,
                                      const int32_t *windows, const int32_t *ropes, const int32_t *formats)
{
    struct native_model *m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    m->config = *config;
    for (size_t v = 0; v < sizeof VARIANTS / sizeof *VARIANTS; v++)
        if (!strcmp(VARIANTS[v]->name, instruction_set) && runs_here(instruction_set))
            m->kernels = VARIANTS[v];
    struct arena arena = {0};
    lay_out(m, &arena, windows, ropes, formats);
    m->memory_bytes = whole_pages(arena.used);
    m->memory = map(m->memory_bytes);
    m->page_head_bytes = page_head_bytes(config);
    m->page_bytes = native_page_bytes(config);
    m->pages_bytes = whole_pages(m->page_bytes * (size_t)config->pages);
    m->pages = map(m->pages_bytes);
    m->threads = pool_new(config->threads);
    if (!m->kernels || !m->memory || !m->pages || !m->threads) {
        native_model_free(m);
        return NULL;
    }
    arena = (struct arena){.base = m->memory};
    lay_out(m, &arena, windows, ropes, formats);
    return m;
}

void native_model_free(struct native_model *m)
{
    if (m->threads)
        pool_free(m->threads);
    if (m->pages)
        munmap(m->pages, m->pages_bytes);
#if defined(__SANITIZE_ADDRESS__)
    if (m->memory)
        __asan_unpoison_memory_region(m->memory, m->memory_bytes);
#endif
    if (m->memory)
        munmap(m->memory, m->memory_bytes);
    free(m);
}

static int32_t vector_length(const struct native_config *c, int32_t weight)
{
    switch (weight) {
    case NATIVE_QKV_BIAS:
        return (c->heads + 2 * c->kv_heads) * c->head_dim;
    case NATIVE_Q_NORM:
    case NATIVE_K_NORM:
        return c->head_dim;
    default:
        return c->hidden;
    }
}

void native_model_set(struct native_model *m, int32_t layer, int32_t weight, const void *values)
{
    const struct native_config *c = &m->config;
    const int32_t index = layer < 0 ? c->layers : layer;
    struct layer *to = &m->layers[index];
    if (weight < NATIVE_VECTORS) {
        to->vectors[weight] = m->vectors + ((size_t)index * NATIVE_VECTORS + weight) * m->vector_stride;
        memcpy(to->vectors[weight], values, (size_t)vector_length(c, weight) * sizeof(float));
        return;
    }
    const struct matrix *matrix = weight == NATIVE_HEAD        ? &m->head
                                  : weight == NATIVE_EMBEDDING ? &m->embedding
                                                               : &to->matrices[weight - NATIVE_VECTORS];
    m->kernels->pack(matrix, values, matrix_sizes(c, weight).outputs);
}

void native_model_set_rope(struct native_model *m, int32_t rope, const float *cosines, const float *sines)
{
    const size_t bytes = (size_t)m->config.context * m->config.head_dim / 2 * sizeof(float);
    memcpy(m->cosines[rope], cosines, bytes);
    memcpy(m->sines[rope], sines, bytes);
}
