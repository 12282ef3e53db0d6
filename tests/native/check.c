/* Runs the native step over odd shapes, for the sanitizers (run-checks compiles it with them).
 *
 * Each model takes some sequences one by one on one thread, then all at once, in random chunks, on three threads and
 * in small slices; the logits have to be the same to the last bit. Arguments: rounds, seed. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

enum { LAYERS = 3, CONTEXT = 160, SEQUENCES = 5, COLUMNS = CONTEXT / PAGE_TOKENS };

static uint64_t state;

static uint32_t number(uint32_t below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % below;
}

/* Where float16 scales stand in a block, and how large a block is. */
static const struct {
    size_t bytes, scales;
} BLOCKS[NATIVE_FORMATS] = {[NATIVE_Q8_0] = {34, 1}, [NATIVE_Q4_0] = {18, 1}, [NATIVE_Q4_1] = {20, 2},
                            [NATIVE_Q4_K] = {144, 2}};

/* Exactly as large as the content, so that a read past the end is seen. */
static void *random_weight(size_t rows, size_t columns, int32_t format, float size, float middle)
{
    const size_t bytes = rows * native_row_bytes(format, (int32_t)columns);
    char *values = malloc(bytes);
    if (format >= NATIVE_Q8_0) {
        for (size_t i = 0; i < bytes; i++)
            values[i] = (char)number(256);
        for (size_t block = 0; block < bytes; block += BLOCKS[format].bytes)
            for (size_t i = 0; i < BLOCKS[format].scales; i++) {
                const uint32_t size = format == NATIVE_Q4_K ? 0x1000 : 0x1c00;
                const uint16_t scale = (uint16_t)(number(2) << 15 | size | number(0x400));
                memcpy(values + block + 2 * i, &scale, 2);
            }
        return values;
    }
    for (size_t i = 0; i < rows * columns; i++) {
        const float x = middle + size * ((float)number(20001) / 10000.0f - 1.0f);
        if (format == NATIVE_BFLOAT16)
            memcpy(values + 2 * i, (const char *)&x + 2, 2);
        else
            memcpy(values + 4 * i, &x, 4);
    }
    return values;
}

static void set(struct native_model *model, int32_t layer, int32_t weight, size_t count, float size, float middle)
{
    void *values = random_weight(1, count, NATIVE_FLOAT32, size, middle);
    native_model_set(model, layer, weight, values);
    free(values);
}

static void set_matrix(struct native_model *model, int32_t layer, int32_t weight, size_t outputs, size_t inputs,
                       int32_t format, float size)
{
    void *values = random_weight(outputs, inputs, format, size, 0);
    native_model_set(model, layer, weight, values);
    free(values);
}

/* Any that rows of so many inputs can have. */
static int32_t random_format(int32_t inputs)
{
    int32_t format;
    do
        format = (int32_t)number(NATIVE_FORMATS);
    while (!native_row_bytes(format, inputs));
    return format;
}

static struct native_model *make(const struct native_config *c, const char *instruction_set, int features,
                                 uint64_t seed)
{
    const int32_t windows[] = {0, 19, 5}, ropes[] = {0, -1, 1};
    const size_t hidden = c->hidden, heads = c->heads * c->head_dim, keys = c->kv_heads * c->head_dim;
    const size_t ffn = c->ffn, qkv = heads + 2 * keys;
    const float small = 1.5f / sqrtf((float)hidden);
    const struct {
        size_t outputs, inputs;
    } sizes[NATIVE_LAYER_MATRICES] = {{heads, hidden}, {keys, hidden}, {keys, hidden}, {hidden, heads},
                                      {ffn, hidden},   {ffn, hidden},  {hidden, ffn}};
    int32_t formats[LAYERS * NATIVE_LAYER_MATRICES + 2];
    state = seed;
    for (int32_t i = 0; i < LAYERS * NATIVE_LAYER_MATRICES; i++)
        formats[i] = random_format((int32_t)sizes[i % NATIVE_LAYER_MATRICES].inputs);
    int32_t *whole = formats + LAYERS * NATIVE_LAYER_MATRICES;
    whole[0] = random_format(c->hidden);
    whole[1] = c->tied ? whole[0] : random_format(c->hidden);
    struct native_model *m = native_model_new(c, instruction_set, windows, ropes, formats);
    if (!m) {
        fprintf(stderr, "no model\n");
        exit(1);
    }
    for (int32_t i = 0; i < c->layers; i++) {
        set(m, i, NATIVE_ATTENTION_NORM, hidden, 0.5f, 1);
        set(m, i, NATIVE_FFN_NORM, hidden, 0.5f, 1);
        for (int32_t w = 0; w < NATIVE_LAYER_MATRICES; w++)
            set_matrix(m, i, NATIVE_VECTORS + w, sizes[w].outputs, sizes[w].inputs,
                       formats[i * NATIVE_LAYER_MATRICES + w], small);
        if (features) {
            set(m, i, NATIVE_QKV_BIAS, qkv, 0.5f, 0);
            set(m, i, NATIVE_OUTPUT_BIAS, hidden, 0.5f, 0);
            set(m, i, NATIVE_Q_NORM, c->head_dim, 0.5f, 1);
            set(m, i, NATIVE_K_NORM, c->head_dim, 0.5f, 1);
            set(m, i, NATIVE_POST_ATTENTION_NORM, hidden, 0.5f, 1);
            set(m, i, NATIVE_POST_FFN_NORM, hidden, 0.5f, 1);
        }
    }
    set(m, -1, NATIVE_FINAL_NORM, hidden, 0.5f, 1);
    set_matrix(m, -1, NATIVE_HEAD, c->vocab, hidden, whole[1], small);
    if (!c->tied)
        set_matrix(m, -1, NATIVE_EMBEDDING, c->vocab, hidden, whole[0], 1);
    const size_t turns = (size_t)CONTEXT * c->head_dim / 2;
    float *cosines = malloc(turns * sizeof(float)), *sines = malloc(turns * sizeof(float));
    for (int32_t rope = 0; rope < c->ropes; rope++) {
        for (size_t i = 0; i < turns; i++) {
            cosines[i] = cosf((float)i * 0.1f * (float)(rope + 1));
            sines[i] = sinf((float)i * 0.1f * (float)(rope + 1));
        }
        native_model_set_rope(m, rope, cosines, sines);
    }
    free(cosines);
    free(sines);
    return m;
}

struct sequence {
    int32_t length, done;
    int32_t tokens[CONTEXT], pages[COLUMNS];
    float *logits; /* [length][stride] */
};

/* The next `counts[i]` tokens of each sequence in one step. */
static void advance(struct native_model *m, struct sequence *sequences, const int32_t *counts, int32_t stride)
{
    int32_t rows = 0, used = 0;
    for (int32_t s = 0; s < SEQUENCES; s++)
        rows += counts[s];
    int32_t *tokens = malloc(rows * 4), *positions = malloc(rows * 4), *owners = malloc(rows * 4);
    int32_t *wanted = malloc(rows * 4), *table = malloc(SEQUENCES * COLUMNS * 4);
    float *logits = malloc((size_t)rows * stride * 4);
    for (int32_t s = 0; s < SEQUENCES; s++) {
        memcpy(table + s * COLUMNS, sequences[s].pages, sizeof sequences[s].pages);
        for (int32_t i = 0; i < counts[s]; i++, used++) {
            tokens[used] = sequences[s].tokens[sequences[s].done + i];
            positions[used] = sequences[s].done + i;
            owners[used] = s;
            wanted[used] = used;
        }
    }
    const struct native_batch batch = {rows, COLUMNS, rows, stride, tokens, positions, owners, table, wanted, logits};
    native_step(m, &batch);
    for (int32_t s = 0, row = 0; s < SEQUENCES; row += counts[s], s++) {
        memcpy(sequences[s].logits + (size_t)sequences[s].done * stride, logits + (size_t)row * stride,
               (size_t)counts[s] * stride * 4);
        sequences[s].done += counts[s];
    }
    free(tokens);
    free(positions);
    free(owners);
    free(wanted);
    free(table);
    free(logits);
}

static int check(uint64_t seed, const char *instruction_set)
{
    state = seed;
    const int features = (int)number(2);
    struct native_config c = {.hidden = 1 + (int32_t)number(90), .kv_heads = 1 + (int32_t)number(3),
                              .head_dim = 16 * (1 + (int32_t)number(5)), .ffn = 1 + (int32_t)number(90),
                              .vocab = 2 + (int32_t)number(60), .context = CONTEXT, .layers = LAYERS, .ropes = 2,
                              .bf16 = (int32_t)number(2), .gelu_tanh = features, .tied = (int32_t)number(2),
                              .pages = SEQUENCES * COLUMNS, .threads = 1, .max_rows = CONTEXT, .norm_eps = 1e-5f,
                              .embedding_scale = 1.5f, .query_scale = 0.2f,
                              .attention_softcap = features ? 5.0f : 0.0f, .logit_softcap = features ? 9.0f : 0.0f};
    c.heads = c.kv_heads * (1 + (int32_t)number(9));
    if (number(3)) { /* blocks need rows that they fill */
        c.hidden = number(2) ? 256 : 32 * (1 + c.hidden / 32);
        c.ffn = number(2) ? 256 : 32 * (1 + c.ffn / 32);
    }
    const int32_t stride = (c.vocab + 15) / 16 * 16;
    struct sequence alone[SEQUENCES], mixed[SEQUENCES];
    for (int32_t s = 0; s < SEQUENCES; s++) {
        alone[s] = (struct sequence){.length = 1 + (int32_t)number(CONTEXT)};
        for (int32_t i = 0; i < CONTEXT; i++)
            alone[s].tokens[i] = (int32_t)number((uint32_t)c.vocab);
        for (int32_t i = 0; i < COLUMNS; i++)
            alone[s].pages[i] = i * SEQUENCES + s;
        mixed[s] = alone[s];
        alone[s].logits = malloc((size_t)alone[s].length * stride * 4);
        mixed[s].logits = malloc((size_t)alone[s].length * stride * 4);
    }
    struct native_model *m = make(&c, instruction_set, features, seed);
    for (int32_t s = 0; s < SEQUENCES; s++) {
        int32_t counts[SEQUENCES] = {0};
        counts[s] = alone[s].length;
        advance(m, alone, counts, stride);
    }
    native_model_free(m);

    c.threads = 3;
    c.max_rows = 1 + (int32_t)(seed % 40);
    m = make(&c, instruction_set, features, seed);
    for (int left = 1; left;) {
        int32_t counts[SEQUENCES];
        left = 0;
        for (int32_t s = 0; s < SEQUENCES; s++) {
            const int32_t rest = mixed[s].length - mixed[s].done;
            counts[s] = rest ? (int32_t)number((uint32_t)rest) % 40 + (rest == 1 || number(2)) : 0;
            left |= rest > counts[s];
        }
        advance(m, mixed, counts, stride);
    }
    native_model_free(m);

    int same = 1;
    for (int32_t s = 0; s < SEQUENCES; s++) {
        same &= !memcmp(alone[s].logits, mixed[s].logits, (size_t)alone[s].length * stride * 4);
        free(alone[s].logits);
        free(mixed[s].logits);
    }
    return same;
}

int main(int argc, char **argv)
{
    const uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 10) : 10;
    const uint64_t first = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    const char *instruction_set;
    for (int32_t i = 0; (instruction_set = native_instruction_set(i)); i++)
        for (uint64_t seed = first; seed < first + rounds; seed++)
            if (!check(seed, instruction_set)) {
                fprintf(stderr, "%s: seed %llu: a batch computed something else\n", instruction_set,
                        (unsigned long long)seed);
                return 1;
            }
    puts("the same alone and in any batch");
    return 0;
}
