/* A step: for each layer
 *
 *   normed   = norm(x)                        by row
 *   qkv      = normed Wqkv^T                  by panel of outputs
 *   rotate queries and keys, keep keys and values in their pages              by row
 *   attended = attention(queries, pages)      by span of rows and KV head
 *   y        = attended Wo^T                  by panel
 *   x       += y; normed = norm(x)            by row
 *   gate, up = normed Wgu^T                   by panel
 *   gate     = activation(gate) * up          by row
 *   y        = gate Wd^T                      by panel
 *   x       += y                              by row, with the next layer's norm
 *
 * Each line is a loop that the threads share. A step with more rows than scratch memory has goes in slices. */
#include "model.h"

struct pass {
    struct native_model *m;
    const struct native_batch *batch;
    const struct layer *layer; /* layer[1] is the next */
    size_t layer_offset;       /* in bytes, of the layer in a page */
    int32_t first;             /* of the slice's rows in the batch */
    int32_t rows, spans;
    const int32_t *wanted; /* of the slice */
    int32_t wanted_rows;

    /* The matrix product at hand: matrices of the same inputs, their outputs side by side. */
    const struct matrix *matrices;
    const float *from;
    float *to;
    int32_t from_stride, to_stride, product_rows;
};

static void norm_row(const struct pass *p, const struct layer *layer, int32_t weight, const float *from, float *to)
{
    const struct native_config *c = &p->m->config;
    p->m->kernels->norm(from, layer->vectors[weight], to, c->hidden, c->norm_eps);
}

static void by_panel(void *argument, int32_t begin, int32_t end, int32_t worker)
{
    const struct pass *p = argument;
    float *to = p->to;
    (void)worker;
    for (const struct matrix *matrix = p->matrices; begin < end; matrix++) {
        const int32_t stop = end < matrix->panel_count ? end : matrix->panel_count;
        if (begin < stop) {
            p->m->kernels->matmul(matrix, begin, stop, p->from, p->from_stride, to, p->to_stride, p->product_rows);
            begin = stop;
        }
        begin -= matrix->panel_count;
        end -= matrix->panel_count;
        to += matrix->panel_count * 16;
    }
}

static void multiply(struct pass *p, const struct matrix *matrices, int count, const float *from, int32_t from_stride,
                     float *to, int32_t to_stride, int32_t rows)
{
    int32_t panels = 0;
    for (int i = 0; i < count; i++)
        panels += matrices[i].panel_count;
    p->matrices = matrices;
    p->from = from;
    p->from_stride = from_stride;
    p->to = to;
    p->to_stride = to_stride;
    p->product_rows = rows;
    pool_run(p->m->threads, by_panel, p, panels, 2);
}

static void embed_rows(void *argument, int32_t begin, int32_t end, int32_t worker)
{
    const struct pass *p = argument;
    struct native_model *m = p->m;
    (void)worker;
    for (int32_t row = begin; row < end; row++) {
        float *x = m->x + (long)row * m->hidden_stride;
        m->kernels->embed(&m->embedding, p->batch->tokens[p->first + row], m->config.embedding_scale, x);
        norm_row(p, p->layer, NATIVE_ATTENTION_NORM, x, m->normed + (long)row * m->hidden_stride);
    }
}

/* Biases, norms of heads, rotation; then keys and values go to their page. */
static void place_rows(void *argument, int32_t begin, int32_t end, int32_t worker)
{
    const struct pass *p = argument;
    struct native_model *m = p->m;
    const struct native_config *c = &m->config;
    const struct kernels *k = m->kernels;
    const struct layer *layer = p->layer;
    const int32_t dim = c->head_dim;
    (void)worker;
    for (int32_t row = begin; row < end; row++) {
        const int32_t at = p->first + row, position = p->batch->positions[at];
        float *queries = m->qkv + (long)row * m->qkv_stride, *keys = queries + c->heads * dim;
        float *values = keys + c->kv_heads * dim;
        if (layer->vectors[NATIVE_QKV_BIAS])
            k->add(queries, layer->vectors[NATIVE_QKV_BIAS], (c->heads + 2 * c->kv_heads) * dim);
        for (int32_t h = 0; h < c->heads + c->kv_heads; h++) {
            const float *weight = layer->vectors[h < c->heads ? NATIVE_Q_NORM : NATIVE_K_NORM];
            float *head = queries + h * dim;
            if (weight)
                k->norm(head, weight, head, dim, c->norm_eps);
            if (layer->rope >= 0) {
                const long angle = (long)position * (dim / 2);
                k->rotate(head, m->cosines[layer->rope] + angle, m->sines[layer->rope] + angle, dim);
            }
        }
        k->scale(queries, c->query_scale, c->heads * dim);
        const int32_t *table = p->batch->page_table + (long)p->batch->sequences[at] * p->batch->page_columns;
        char *page = m->pages + (size_t)table[position / PAGE_TOKENS] * m->page_bytes + p->layer_offset;
        for (int32_t h = 0; h < c->kv_heads; h++)
            k->keep(page + (size_t)h * m->page_head_bytes, position % PAGE_TOKENS, keys + h * dim, values + h * dim,
                    dim, c->bf16);
    }
}

/* Iterations are spans of rows times KV heads. */
static void attend_spans(void *argument, int32_t begin, int32_t end, int32_t worker)
{
    const struct pass *p = argument;
    struct native_model *m = p->m;
    const struct native_config *c = &m->config;
    for (int32_t i = begin; i < end; i++) {
        const struct span span = m->spans[i / c->kv_heads];
        const int32_t head = i % c->kv_heads, group = c->heads / c->kv_heads, at = p->first + span.row;
        const struct attention a = {
            .rows = span.rows,
            .group = group,
            .head_dim = c->head_dim,
            .bf16 = c->bf16,
            .position = p->batch->positions[at],
            .window = p->layer->window,
            .softcap = c->attention_softcap,
            .queries = m->qkv + (long)span.row * m->qkv_stride + head * group * c->head_dim,
            .query_stride = m->qkv_stride,
            .pool = m->pages + p->layer_offset + (size_t)head * m->page_head_bytes,
            .page_stride = m->page_bytes,
            .page_table = p->batch->page_table + (long)p->batch->sequences[at] * p->batch->page_columns,
            .outputs = m->attended + (long)span.row * m->attended_stride + head * group * c->head_dim,
            .output_stride = m->attended_stride,
            .scratch = m->attention_scratch + (size_t)worker * m->attention_scratch_stride,
        };
        m->kernels->attend(&a);
    }
}

/* x += y, with what comes between; `next` is the norm that the following product reads. */
static void add_row(const struct pass *p, int32_t row, int32_t bias, int32_t post_norm, const struct layer *next_layer,
                    int32_t next)
{
    struct native_model *m = p->m;
    const struct layer *layer = p->layer;
    float *x = m->x + (long)row * m->hidden_stride, *y = m->y + (long)row * m->hidden_stride;
    if (bias >= 0 && layer->vectors[bias])
        m->kernels->add(y, layer->vectors[bias], m->config.hidden);
    if (layer->vectors[post_norm])
        norm_row(p, layer, post_norm, y, y);
    m->kernels->add(x, y, m->config.hidden);
    if (next_layer->vectors[next])
        norm_row(p, next_layer, next, x, m->normed + (long)row * m->hidden_stride);
}

static void add_attended(void *argument, int32_t begin, int32_t end, int32_t worker)
{
    const struct pass *p = argument;
    (void)worker;
    for (int32_t row = begin; row < end; row++)
        add_row(p, row, NATIVE_OUTPUT_BIAS, NATIVE_POST_ATTENTION_NORM, p->layer, NATIVE_FFN_NORM);
}

static void add_ffn(void *argument, int32_t begin, int32_t end, int32_t worker)
{
    const struct pass *p = argument;
    (void)worker;
    /* After the last layer there is no norm for all rows: only those whose logits are wanted need it. */
    for (int32_t row = begin; row < end; row++)
        add_row(p, row, -1, NATIVE_POST_FFN_NORM, p->layer + 1, NATIVE_ATTENTION_NORM);
}

static void gate_rows(void *argument, int32_t begin, int32_t end, int32_t worker)
{
    const struct pass *p = argument;
    struct native_model *m = p->m;
    const int32_t width = m->ffn_width;
    (void)worker;
    for (int32_t row = begin; row < end; row++) {
        float *gate = m->gate_up + (long)row * m->ffn_stride;
        m->kernels->gate(gate, gate + width, width, m->config.gelu_tanh);
    }
}

static void softcap_rows(void *argument, int32_t begin, int32_t end, int32_t worker)
{
    const struct pass *p = argument;
    (void)worker;
    for (int32_t row = begin; row < end; row++)
        p->m->kernels->softcap(p->to + (long)row * p->to_stride, p->to_stride, p->m->config.logit_softcap);
}

/* Rows that can be computed together in attention: consecutive tokens of one sequence. */
static void find_spans(struct pass *p)
{
    const struct native_config *c = &p->m->config;
    const int32_t most = attention_rows(c->heads / c->kv_heads);
    p->spans = 0;
    for (int32_t row = 0; row < p->rows; row++) {
        const int32_t at = p->first + row;
        struct span *last = p->spans ? &p->m->spans[p->spans - 1] : NULL;
        if (last && last->rows < most && p->batch->sequences[at] == p->batch->sequences[at - 1])
            last->rows++;
        else
            p->m->spans[p->spans++] = (struct span){row, 1};
    }
}

static const struct matrix *layer_matrix(const struct pass *p, int32_t weight)
{
    return &p->layer->matrices[weight - NATIVE_VECTORS];
}

static void run_layer(struct pass *p)
{
    struct native_model *m = p->m;
    struct pool *threads = m->threads;
    multiply(p, layer_matrix(p, NATIVE_QUERY), 3, m->normed, m->hidden_stride, m->qkv, m->qkv_stride, p->rows);
    pool_run(threads, place_rows, p, p->rows, 2);
    pool_run(threads, attend_spans, p, p->spans * m->config.kv_heads, 1);
    multiply(p, layer_matrix(p, NATIVE_OUTPUT), 1, m->attended, m->attended_stride, m->y, m->hidden_stride, p->rows);
    pool_run(threads, add_attended, p, p->rows, 4);
    multiply(p, layer_matrix(p, NATIVE_GATE), 2, m->normed, m->hidden_stride, m->gate_up, m->ffn_stride, p->rows);
    pool_run(threads, gate_rows, p, p->rows, 2);
    multiply(p, layer_matrix(p, NATIVE_DOWN), 1, m->gate_up, m->ffn_stride, m->y, m->hidden_stride, p->rows);
    pool_run(threads, add_ffn, p, p->rows, 4);
}

/* Logits of the slice's wanted rows. */
static void run_head(struct pass *p, float *logits)
{
    struct native_model *m = p->m;
    for (int32_t i = 0; i < p->wanted_rows; i++)
        norm_row(p, &m->layers[m->config.layers], NATIVE_FINAL_NORM,
                 m->x + (long)(p->wanted[i] - p->first) * m->hidden_stride, m->normed + (long)i * m->hidden_stride);
    multiply(p, &m->head, 1, m->normed, m->hidden_stride, logits, p->batch->logit_stride, p->wanted_rows);
    if (m->config.logit_softcap > 0)
        pool_run(m->threads, softcap_rows, p, p->wanted_rows, 1);
}

void native_step(struct native_model *m, const struct native_batch *batch)
{
    const struct native_config *c = &m->config;
    int32_t done = 0; /* of the wanted rows */
    for (int32_t first = 0; first < batch->rows; first += c->max_rows) {
        struct pass pass = {.m = m, .batch = batch, .layer = m->layers, .first = first};
        pass.rows = batch->rows - first < c->max_rows ? batch->rows - first : c->max_rows;
        pass.wanted = batch->wanted + done;
        while (done + pass.wanted_rows < batch->logit_rows && pass.wanted[pass.wanted_rows] < first + pass.rows)
            pass.wanted_rows++;
        find_spans(&pass);
        pool_run(m->threads, embed_rows, &pass, pass.rows, 4);
        for (int32_t i = 0; i < c->layers; i++) {
            pass.layer = &m->layers[i];
            pass.layer_offset = (size_t)i * c->kv_heads * m->page_head_bytes;
            run_layer(&pass);
        }
        if (pass.wanted_rows)
            run_head(&pass, batch->logits + (long)done * batch->logit_stride);
        done += pass.wanted_rows;
    }
}
