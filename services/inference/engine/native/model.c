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

static struct matrix take_matrix(struct arena *arena, int32_t panels, int32_t inputs, int32_t bf16)
{
    struct matrix matrix = {.inputs = inputs, .panel_count = panels, .bf16 = bf16};
    matrix.panels = take(arena, panel_bytes(inputs, bf16) * (size_t)panels);
    return matrix;
}

static int32_t panels_of(int32_t outputs)
{
    return (outputs + 15) / 16;
}

static void lay_out(struct native_model *m, struct arena *arena, const int32_t *windows, const int32_t *ropes)
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
        struct layer layer = {
            .qkv = take_matrix(arena, panels_of(qkv), c->hidden, c->bf16),
            .output = take_matrix(arena, panels_of(c->hidden), heads_dim, c->bf16),
            .gate_up = take_matrix(arena, 2 * panels_of(c->ffn), c->hidden, c->bf16),
            .down = take_matrix(arena, panels_of(c->hidden), c->ffn, c->bf16),
            .window = windows[i],
            .rope = ropes[i],
        };
        if (arena->base)
            layers[i] = layer;
    }
    m->layers = layers;
    m->head = take_matrix(arena, panels_of(c->vocab), c->hidden, c->bf16);
    m->embedding = c->tied ? m->head : take_matrix(arena, panels_of(c->vocab), c->hidden, c->bf16);

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
                                      const int32_t *windows, const int32_t *ropes)
{
    struct native_model *m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    m->config = *config;
    for (size_t v = 0; v < sizeof VARIANTS / sizeof *VARIANTS; v++)
        if (!strcmp(VARIANTS[v]->name, instruction_set) && runs_here(instruction_set))
            m->kernels = VARIANTS[v];
    struct arena arena = {0};
    lay_out(m, &arena, windows, ropes);
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
    lay_out(m, &arena, windows, ropes);
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
    switch (weight) {
    case NATIVE_QKV:
        m->kernels->pack(&to->qkv, 0, values, (c->heads + 2 * c->kv_heads) * c->head_dim);
        break;
    case NATIVE_OUTPUT:
        m->kernels->pack(&to->output, 0, values, c->hidden);
        break;
    case NATIVE_GATE_UP: { /* each in panels of its own, so that gate and up are aligned alike */
        const size_t gate_bytes = (size_t)c->ffn * c->hidden * (c->bf16 ? 2 : 4);
        m->kernels->pack(&to->gate_up, 0, values, c->ffn);
        m->kernels->pack(&to->gate_up, panels_of(c->ffn), (const char *)values + gate_bytes, c->ffn);
        break;
    }
    case NATIVE_DOWN:
        m->kernels->pack(&to->down, 0, values, c->hidden);
        break;
    case NATIVE_EMBEDDING:
        m->kernels->pack(&m->embedding, 0, values, c->vocab);
        break;
    case NATIVE_HEAD:
        m->kernels->pack(&m->head, 0, values, c->vocab);
        break;
    }
}

void native_model_set_rope(struct native_model *m, int32_t rope, const float *cosines, const float *sines)
{
    const size_t bytes = (size_t)m->config.context * m->config.head_dim / 2 * sizeof(float);
    memcpy(m->cosines[rope], cosines, bytes);
    memcpy(m->sines[rope], sines, bytes);
}
