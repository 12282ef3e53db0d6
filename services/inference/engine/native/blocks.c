/* Matrices in quantised blocks: part of variant.c.
 *
 * A panel is a run of groups, one for every 32 inputs. A group holds what its 16 outputs have of them:
 *
 *   Q8_0, Q4_0   scales[16] in float16
 *   Q4_1         scales[16] and offsets[16] in float16
 *   Q4_K         scales[16] and minima[16] of a byte; in front of every 8 groups stands what they are multiples of,
 *                float16 [16] and [16]
 *   then quants  words of 32 bits, [word][16 outputs]: each has the next 4 (of 8 bits) or 8 (of 4 bits) inputs of an
 *                output, the first in its lowest bits
 *
 * A weight is quant * scale + offset, rounded once: exactly what the definition of the block gives in float32. So a
 * product is, bit by bit, the product over the dequantised matrix. */
#include "vec.h"

#include "kernels.h"

/* With so many rows at most, weights are made in registers while they are used; with more, a part of a panel is
 * dequantised for all of them. */
enum { FUSED_ROWS = 2, AHEAD_BYTES = 2048 };
enum { CHUNK = 256, CHUNK_GROUPS = CHUNK / BLOCK, GROUPS_OF_SUPER = SUPER_BLOCK / BLOCK };

typedef uint16_t vec_halves __attribute__((vector_size(2 * WIDTH)));
typedef uint8_t vec_bytes __attribute__((vector_size(WIDTH)));

/* float16 to float, exactly. No scale is infinite or not a number: whoever loads a matrix has seen to that. */
INLINE vec load_halves(const char *from)
{
    vec_halves halves;
    memcpy(&halves, from, sizeof halves);
    const vec_bits bits = __builtin_convertvector(halves, vec_bits);
    const vec size = (vec)((bits & 0x7fff) << 13) * splat(0x1p112f); /* the exponent's bias: 127 instead of 15 */
    return (vec)((vec_bits)size | (bits & 0x8000) << 16);
}

INLINE vec load_bytes(const char *from)
{
    vec_bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, vec_int), vec);
}

INLINE int quant_bits(int format)
{
    return format == NATIVE_Q8_0 ? 8 : 4;
}

/* Quants are stored without a sign; this is what lies at their zero. */
INLINE float quant_zero(int format)
{
    return format == NATIVE_Q8_0 ? 128.0f : 8.0f;
}

INLINE size_t super_at(int32_t group)
{
    return (size_t)(group / GROUPS_OF_SUPER) *
           (SUPER_HEADER_BYTES + GROUPS_OF_SUPER * group_bytes(NATIVE_Q4_K));
}

INLINE size_t group_at(int format, int32_t group)
{
    if (format == NATIVE_Q4_K)
        return super_at(group) + SUPER_HEADER_BYTES + (size_t)(group % GROUPS_OF_SUPER) * group_bytes(format);
    return (size_t)group * group_bytes(format);
}

INLINE void load_scales(int format, const char *panel, int32_t group, vec *scales, vec *offsets)
{
    const char *header = panel + group_at(format, group), *super = panel + super_at(group);
    UNROLL for (int p = 0; p < PARTS; p++) {
        const int lane = p * WIDTH;
        if (format == NATIVE_Q4_K) {
            scales[p] = load_halves(super + 2 * lane) * load_bytes(header + lane);
            offsets[p] = -(load_halves(super + 32 + 2 * lane) * load_bytes(header + 16 + lane));
        } else {
            scales[p] = load_halves(header + 2 * lane);
            offsets[p] = format == NATIVE_Q4_1 ? load_halves(header + 32 + 2 * lane)
                                               : scales[p] * splat(-quant_zero(format));
        }
    }
}

/* The i-th quant of each word, as a weight. */
INLINE vec unpack(int bits, vec_bits word, int i, vec scale, vec offset)
{
    vec_bits quant = word >> (bits * i);
    if (i < 32 / bits - 1)
        quant &= (1u << bits) - 1;
    return multiply_add(__builtin_convertvector((vec_int)quant, vec), scale, offset);
}

INLINE vec_bits load_words(const char *from)
{
    return *(const vec_bits_any *)from;
}

/* Weights [32][16] of a group. */
INLINE void dequantise(int format, const char *panel, int32_t group, float *to)
{
    const int bits = quant_bits(format), in_word = 32 / bits;
    vec scales[PARTS], offsets[PARTS];
    load_scales(format, panel, group, scales, offsets);
    const char *words = panel + group_at(format, group) + group_header_bytes(format);
    for (int w = 0; w < BLOCK / in_word; w++)
        UNROLL for (int p = 0; p < PARTS; p++) {
            const vec_bits word = load_words(words + w * 64 + p * 4 * WIDTH);
            UNROLL for (int i = 0; i < in_word; i++)
                store(to + (w * in_word + i) * PANEL + p * WIDTH, unpack(bits, word, i, scales[p], offsets[p]));
        }
}

/* As `tile`, over blocks. */
INLINE void block_tile(int rows, int columns, int format, const char *const *panels, int32_t groups, const float *x,
                       int32_t x_stride, float *y, int32_t y_stride)
{
    const int bits = quant_bits(format), in_word = 32 / bits;
    vec sums[FUSED_ROWS][MAX_COLUMNS * PARTS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns * PARTS; c++) sums[r][c] = (vec){0};
    for (int32_t group = 0; group < groups; group++, x += BLOCK) {
        vec scales[MAX_COLUMNS * PARTS], offsets[MAX_COLUMNS * PARTS];
        const char *words[MAX_COLUMNS];
        UNROLL for (int c = 0; c < columns; c++) {
            load_scales(format, panels[c], group, scales + c * PARTS, offsets + c * PARTS);
            words[c] = panels[c] + group_at(format, group) + group_header_bytes(format);
        }
        for (int w = 0; w < BLOCK / in_word; w++) {
            vec_bits word[MAX_COLUMNS * PARTS];
            UNROLL for (int c = 0; c < columns; c++) {
                __builtin_prefetch(words[c] + w * 64 + AHEAD_BYTES);
                UNROLL for (int p = 0; p < PARTS; p++)
                    word[c * PARTS + p] = load_words(words[c] + w * 64 + p * 4 * WIDTH);
            }
            UNROLL for (int i = 0; i < in_word; i++) {
                vec weights[MAX_COLUMNS * PARTS];
                UNROLL for (int c = 0; c < columns * PARTS; c++)
                    weights[c] = unpack(bits, word[c], i, scales[c], offsets[c]);
                UNROLL for (int r = 0; r < rows; r++) {
                    const vec value = splat(x[r * (long)x_stride + w * in_word + i]);
                    UNROLL for (int c = 0; c < columns * PARTS; c++)
                        sums[r][c] = multiply_add(weights[c], value, sums[r][c]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns * PARTS; c++)
        store(y + r * (long)y_stride + c * WIDTH, sums[r][c]);
}

/* y += x times a part of a panel in float32, `inputs` of it; `first`: y = that. `later` is fetched meanwhile. */
static __attribute__((noinline)) void add_chunk(const float *weights, int32_t inputs, int first, const char *later,
                                                const float *x, int32_t x_stride, float *y, int32_t y_stride,
                                                int32_t rows)
{
    const int32_t turns = (rows + MAX_ROWS - 1) / MAX_ROWS;
    const char *panel = (const char *)weights;
    for (int32_t turn = 0, row = 0; turn < turns; turn++) {
        const int32_t some = (rows - row + turns - turn - 1) / (turns - turn);
        const struct ahead ahead = {&later, 0, turn ? 0 : 32};
        const float *from = x + row * (long)x_stride;
        float *to = y + row * (long)y_stride;
        switch (some) {
#define CASE(R)                                                                                                        \
    case R:                                                                                                            \
        tile(R, 1, 0, &panel, &ahead, inputs, from, x_stride, to, y_stride, !first);                                   \
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
        row += some;
    }
}

/* Panels [begin, end) of y for all rows. */
INLINE void block_product(int format, const struct matrix *matrix, int32_t begin, int32_t end, const float *x,
                          int32_t x_stride, float *y, int32_t y_stride, int32_t rows)
{
    const int32_t groups = matrix->inputs / BLOCK;
    if (rows <= FUSED_ROWS) {
        for (int32_t panel = begin; panel < end;) {
            const char *panels[MAX_COLUMNS];
            const int32_t left = end - panel;
            for (int c = 0; c < MAX_COLUMNS && c < left; c++)
                panels[c] = matrix->panels + (size_t)(panel + c) * matrix->panel_bytes;
            float *to = y + (long)panel * PANEL;
#define TILE(R, C)                                                                                                     \
    if (rows == R && left >= C) {                                                                                      \
        block_tile(R, C, format, panels, groups, x, x_stride, to, y_stride);                                           \
        panel += C;                                                                                                    \
        continue;                                                                                                      \
    }
            TILE(1, 2)
            TILE(1, 1)
            TILE(2, 2)
            TILE(2, 1)
#undef TILE
        }
        return;
    }
    float weights[CHUNK * PANEL];
    for (int32_t panel = begin; panel < end; panel++) {
        const char *from = matrix->panels + (size_t)panel * matrix->panel_bytes;
        for (int32_t group = 0; group < groups; group += CHUNK_GROUPS) {
            const int32_t some = groups - group < CHUNK_GROUPS ? groups - group : CHUNK_GROUPS;
            for (int32_t g = 0; g < some; g++)
                dequantise(format, from, group + g, weights + g * BLOCK * PANEL);
            add_chunk(weights, some * BLOCK, group == 0, from + group_at(format, group + some), x + group * BLOCK,
                      x_stride, y + (long)panel * PANEL, y_stride, rows);
        }
    }
}

/* Not inlined: one copy of the tiles for each format. */
#define PRODUCT(name, format)                                                                                          \
    static __attribute__((noinline)) void name(const struct matrix *matrix, int32_t begin, int32_t end,                \
                                               const float *x, int32_t x_stride, float *y, int32_t y_stride,           \
                                               int32_t rows)                                                           \
    {                                                                                                                  \
        block_product(format, matrix, begin, end, x, x_stride, y, y_stride, rows);                                     \
    }
PRODUCT(product_q8_0, NATIVE_Q8_0)
PRODUCT(product_q4_0, NATIVE_Q4_0)
PRODUCT(product_q4_1, NATIVE_Q4_1)
PRODUCT(product_q4_k, NATIVE_Q4_K)
#undef PRODUCT

static void matmul_blocks(const struct matrix *matrix, int32_t begin, int32_t end, const float *x, int32_t x_stride,
                          float *y, int32_t y_stride, int32_t rows)
{
    switch (matrix->format) {
    case NATIVE_Q8_0:
        product_q8_0(matrix, begin, end, x, x_stride, y, y_stride, rows);
        break;
    case NATIVE_Q4_0:
        product_q4_0(matrix, begin, end, x, x_stride, y, y_stride, rows);
        break;
    case NATIVE_Q4_1:
        product_q4_1(matrix, begin, end, x, x_stride, y, y_stride, rows);
        break;
    case NATIVE_Q4_K:
        product_q4_k(matrix, begin, end, x, x_stride, y, y_stride, rows);
        break;
    }
}

/* One row of a matrix, times `factor`. */
static void embed_blocks(const struct matrix *matrix, int32_t index, float factor, float *x)
{
    const char *panel = matrix->panels + (size_t)(index / PANEL) * matrix->panel_bytes;
    float weights[BLOCK * PANEL];
    for (int32_t group = 0; group < matrix->inputs / BLOCK; group++) {
        dequantise(matrix->format, panel, group, weights);
        for (int k = 0; k < BLOCK; k++)
            x[group * BLOCK + k] = weights[k * PANEL + index % PANEL] * factor;
    }
}

/* The k-th quant of a block as the file has it, without its sign. */
static uint32_t file_quant(int format, const uint8_t *block, int32_t k)
{
    switch (format) {
    case NATIVE_Q8_0:
        return block[2 + k] ^ 0x80;
    case NATIVE_Q4_0:
        return block[2 + k % 16] >> (k < 16 ? 0 : 4) & 15;
    case NATIVE_Q4_1:
        return block[4 + k % 16] >> (k < 16 ? 0 : 4) & 15;
    default:
        return block[16 + k / 64 * 32 + k % 32] >> (k % 64 < 32 ? 0 : 4) & 15;
    }
}

/* The scale (6 bits) and the minimum of the i-th 32 inputs of a block of Q4_K: 12 bytes have them for 8. */
static void file_scales(const uint8_t *packed, int i, char *scale, char *minimum)
{
    if (i < 4) {
        *scale = (char)(packed[i] & 63);
        *minimum = (char)(packed[i + 4] & 63);
    } else {
        *scale = (char)((packed[i + 4] & 15) | packed[i - 4] >> 6 << 4);
        *minimum = (char)(packed[i + 4] >> 4 | packed[i] >> 6 << 4);
    }
}

/* What output `lane` has in a group. `block` holds the group's inputs from `k` on. */
static void pack_group(int format, char *panel, int32_t group, int lane, const uint8_t *block, int32_t k)
{
    char *header = panel + group_at(format, group);
    if (format == NATIVE_Q4_K) {
        char *super = panel + super_at(group);
        memcpy(super + 2 * lane, block, 2);
        memcpy(super + 32 + 2 * lane, block + 2, 2);
        file_scales(block + 4, k / BLOCK, header + lane, header + 16 + lane);
    } else {
        memcpy(header + 2 * lane, block, 2);
        if (format == NATIVE_Q4_1)
            memcpy(header + 32 + 2 * lane, block + 2, 2);
    }
    const int bits = quant_bits(format), in_word = 32 / bits;
    char *words = header + group_header_bytes(format);
    for (int w = 0; w < BLOCK / in_word; w++) {
        uint32_t word = 0;
        for (int i = 0; i < in_word; i++)
            word |= file_quant(format, block, k + w * in_word + i) << (bits * i);
        memcpy(words + (w * PANEL + lane) * 4, &word, 4);
    }
}

/* What lies beyond the last output stays zero, as the memory was. */
static void pack_blocks(const struct matrix *matrix, const void *values, int32_t outputs)
{
    const int32_t inputs = matrix->inputs, length = matrix->format == NATIVE_Q4_K ? SUPER_BLOCK : BLOCK;
    const size_t row_bytes = native_row_bytes(matrix->format, inputs);
    const size_t block_bytes = row_bytes / (size_t)(inputs / length);
    for (int32_t o = 0; o < outputs; o++) {
        const uint8_t *row = (const uint8_t *)values + (size_t)o * row_bytes;
        char *panel = matrix->panels + (size_t)(o / PANEL) * matrix->panel_bytes;
        for (int32_t k = 0; k < inputs; k += BLOCK)
            pack_group(matrix->format, panel, k / BLOCK, o % PANEL, row + (size_t)(k / length) * block_bytes,
                       k % length);
    }
}
