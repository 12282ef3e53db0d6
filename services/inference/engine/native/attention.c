/* Attention straight over pages: part of variant.c.
 *
 * A page holds, for each KV head, its keys as [head_dim][16 tokens] and then its values as [head_dim / 16][16 tokens]
 * [16]. Both are panels as those of weights, so that scores and sums of values are matrix products by the same tiles:
 * queries are the rows, tokens or values' dimensions the outputs. */
#include "vec.h"

#include "kernels.h"

static void keep(char *page, int32_t slot, const float *key, const float *value, int32_t head_dim, int32_t bf16)
{
    if (bf16) {
        uint16_t *keys = (uint16_t *)page, *values = keys + head_dim * PANEL;
        for (int32_t d = 0; d < head_dim; d++)
            keys[d * PANEL + bf16_slot(slot)] = bf16_from_float(key[d]);
        for (int32_t d = 0; d < head_dim; d++)
            values[(d / PANEL * PANEL + slot) * PANEL + bf16_slot(d % PANEL)] = bf16_from_float(value[d]);
    } else {
        float *keys = (float *)page, *values = keys + head_dim * PANEL;
        for (int32_t d = 0; d < head_dim; d++)
            keys[d * PANEL + slot] = key[d];
        for (int32_t d = 0; d < head_dim; d++)
            values[(d / PANEL * PANEL + slot) * PANEL + d % PANEL] = value[d];
    }
}

static const char *page_at(const struct attention *a, int32_t page)
{
    return a->pool + (size_t)a->page_table[page] * a->page_stride;
}

/* scores[0, end - begin) for tokens [begin, end): e^(score - largest), 0 where a token is not seen; their sum. Lanes
 * are counted from position 0, so that the sum does not depend on where `scores` begins. */
static float soften(float *scores, int32_t first, int32_t begin, int32_t end, float cap)
{
    vec_int lane[PARTS];
    for (int p = 0; p < PARTS; p++)
        for (int i = 0; i < WIDTH; i++)
            lane[p][i] = p * WIDTH + i;
    if (cap > 0)
        for (int32_t t = first; t < end; t += WIDTH)
            store(scores + t - first, vec_tanh(load(scores + t - first) / splat(cap)) * splat(cap));
    const vec lowest = splat(-3.402823466e38f);
    vec high[PARTS], sums[PARTS];
    for (int p = 0; p < PARTS; p++) {
        high[p] = lowest;
        sums[p] = (vec){0};
    }
    for (int32_t t = first; t < end; t += PANEL)
        UNROLL for (int p = 0; p < PARTS; p++) {
            float *at = scores + t - first + p * WIDTH;
            const vec_int seen = (lane[p] + t >= begin) & (lane[p] + t < end);
            const vec score = choose(seen, load(at), lowest);
            store(at, score);
            high[p] = vec_max(score, high[p]);
        }
    float lanes[PANEL], largest;
    for (int p = 0; p < PARTS; p++)
        store(lanes + p * WIDTH, high[p]);
    largest = lanes[0];
    for (int i = 1; i < PANEL; i++)
        largest = lanes[i] > largest ? lanes[i] : largest;
    for (int32_t t = first; t < end; t += PANEL)
        UNROLL for (int p = 0; p < PARTS; p++) {
            float *at = scores + t - first + p * WIDTH;
            const vec_int seen = (lane[p] + t >= begin) & (lane[p] + t < end);
            const vec part = choose(seen, vec_exp(load(at) - splat(largest)), (vec){0});
            store(at, part);
            sums[p] += part;
        }
    return panel_sum(sums);
}

/* outputs[query][16 dimensions] += the values of tokens [begin, end) by their weights, in order of the tokens. `panel`
 * is the offset in bytes of the 16 dimensions in a page; weights are those of token `first` and on. */
INLINE void sum_values(int rows, int bf16, const struct attention *a, size_t panel, int32_t first, int32_t begin,
                       int32_t end, const float *weights, int32_t stride, float *outputs, int32_t output_stride)
{
    const long step = bf16 ? 2 * PANEL : 4 * PANEL;
    vec sums[MAX_ROWS][PARTS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < PARTS; p++)
        sums[r][p] = load(outputs + r * (long)output_stride + p * WIDTH);
    for (int32_t t = begin; t < end;) {
        const char *from = page_at(a, t / PANEL) + panel + t % PANEL * step;
        const int32_t stop = end < (t / PANEL + 1) * PANEL ? end : (t / PANEL + 1) * PANEL;
        for (; t < stop; t++, from += step) {
            vec values[PARTS];
            load_panel(bf16, from, values);
            UNROLL for (int r = 0; r < rows; r++) {
                const vec weight = splat(weights[r * (long)stride + t - first]);
                UNROLL for (int p = 0; p < PARTS; p++) sums[r][p] = multiply_add(values[p], weight, sums[r][p]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < PARTS; p++)
        store(outputs + r * (long)output_stride + p * WIDTH, sums[r][p]);
}

INLINE void sum_values_by_rows(int bf16, const struct attention *a, int32_t queries, int32_t first, int32_t begin,
                               int32_t end, const float *weights, int32_t stride, float *outputs)
{
    const int32_t turns = (queries + MAX_ROWS - 1) / MAX_ROWS;
    for (int32_t turn = 0, row = 0; turn < turns; turn++) {
        const int32_t some = (queries - row + turns - turn - 1) / (turns - turn);
        for (int32_t d = 0; d < a->head_dim; d += PANEL) {
            const size_t panel = ((size_t)a->head_dim + d) * PANEL * (bf16 ? 2 : 4);
            const float *from = weights + row * (long)stride;
            float *to = outputs + row * (long)a->head_dim + d;
            switch (some) {
#define CASE(R)                                                                                                        \
    case R:                                                                                                            \
        sum_values(R, bf16, a, panel, first, begin, end, from, stride, to, a->head_dim);                               \
        break;
                CASE(1)
                CASE(2)
                CASE(3)
#if WIDTH > 4
                CASE(4)
                CASE(5)
                CASE(6)
#endif
#undef CASE
            }
        }
        row += some;
    }
}

static void add_values(const struct attention *a, int32_t queries, int32_t first, int32_t begin, int32_t end,
                       const float *weights, int32_t stride, float *outputs)
{
    if (begin >= end)
        return;
    if (a->bf16)
        sum_values_by_rows(1, a, queries, first, begin, end, weights, stride, outputs);
    else
        sum_values_by_rows(0, a, queries, first, begin, end, weights, stride, outputs);
}

static void attend(const struct attention *a)
{
    const int32_t dim = a->head_dim, queries = a->rows * a->group;
    const int32_t last = a->position + a->rows - 1; /* the last row's own token */
    const int32_t begin = a->window && a->position >= a->window ? a->position - a->window + 1 : 0;
    const int32_t first = begin / PANEL * PANEL;
    const int32_t stride = row_stride(last + 1 - first);
    float *packed = a->scratch, *sums = packed + queries * (long)dim, *scores = sums + queries * (long)dim;

    for (int32_t r = 0; r < a->rows; r++)
        memcpy(packed + r * (long)a->group * dim, a->queries + r * (long)a->query_stride,
               (size_t)a->group * dim * sizeof(float));
    for (int32_t t = first; t <= last; t += MAX_COLUMNS * PANEL) {
        const char *pages[MAX_COLUMNS];
        int count = 0;
        for (; count < MAX_COLUMNS && t + count * PANEL <= last; count++)
            pages[count] = page_at(a, t / PANEL + count);
        (a->bf16 ? product_bf16 : product_float)(pages, count, NULL, dim, packed, dim, scores + t - first, stride,
                                                 queries);
    }

    float totals[queries];
    for (int32_t r = 0; r < a->rows; r++) {
        const int32_t position = a->position + r;
        const int32_t from = a->window && position >= a->window ? position - a->window + 1 : 0;
        for (int32_t g = 0; g < a->group; g++) {
            const int32_t q = r * a->group + g;
            totals[q] = soften(scores + q * (long)stride + (from / PANEL * PANEL - first), from / PANEL * PANEL, from,
                               position + 1, a->softcap);
        }
    }

    /* Tokens that all rows see go together; before and after them each row sees its own. What a row does not see is
     * not even multiplied by zero: it may be another's, and not a number. */
    memset(sums, 0, (size_t)queries * dim * sizeof *sums);
    int32_t all_begin = 0, all_end = a->position + 1;
    if (a->window && last >= a->window)
        all_begin = last - a->window + 1;
    if (all_begin > all_end)
        all_begin = all_end;
    for (int32_t r = 0; r < a->rows; r++) {
        const int32_t position = a->position + r;
        const int32_t from = a->window && position >= a->window ? position - a->window + 1 : 0;
        const long at = r * (long)a->group;
        add_values(a, a->group, first, from, from > all_begin ? from : all_begin, scores + at * stride, stride,
                   sums + at * dim);
    }
    add_values(a, queries, first, all_begin, all_end, scores, stride, sums);
    for (int32_t r = 0; r < a->rows; r++) {
        const int32_t position = a->position + r;
        const int32_t from = a->window && position >= a->window ? position - a->window + 1 : 0;
        const long at = r * (long)a->group;
        add_values(a, a->group, first, from > all_end ? from : all_end, position + 1, scores + at * stride, stride,
                   sums + at * dim);
    }

    for (int32_t q = 0; q < queries; q++) {
        const vec factor = splat(1.0f / totals[q]);
        float *to = a->outputs + q / a->group * (long)a->output_stride + q % a->group * (long)dim;
        for (int32_t d = 0; d < dim; d += WIDTH)
            store(to + d, load(sums + q * (long)dim + d) * factor);
    }
}
