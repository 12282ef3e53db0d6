/* Matrix products over panels of floats: part of variant.c. */
#include "vec.h"

#include "kernels.h"

/* Accumulators stay in registers: rows * columns * PARTS of them; at least 8 hide the latency of multiply-add. With few
 * rows memory is the limit, and several panels side by side keep more of its lines under way. `alone`: there are no
 * more rows than these. */
#if WIDTH == 16
enum { MAX_ROWS = 6, MAX_COLUMNS = 4 };
#define COLUMNS(rows, bf16, alone) 4
#elif WIDTH == 8
enum { MAX_ROWS = 6, MAX_COLUMNS = 4 };
#define COLUMNS(rows, bf16, alone)                                                                                     \
    ((rows) == 1   ? 4                                                                                                 \
     : (rows) == 2 ? ((bf16) ? 2 : 4)                                                                                  \
     : (rows) == 3 ? ((bf16) ? 1 : 2)                                                                                  \
     : (rows) == 4 ? (!(bf16) && (alone) ? 2 : 1)                                                                      \
                   : 1)
#else
enum { MAX_ROWS = 3, MAX_COLUMNS = 2 };
#define COLUMNS(rows, bf16, alone) ((rows) == 1 ? 2 : 1)
#endif

/* What to fetch from memory meanwhile: the panels that come next, a part of them in each turn of rows, so that reading
 * and arithmetic go on at once. */
struct ahead {
    const char *const *panels; /* one for each column */
    long offset, step;         /* in bytes: where to begin, and how far to go with each input */
};

/* y[row][column panel] = sum over k of x[row][k] * panel[k], one chain for each number of y; `goes_on`: the chain goes
 * on from what y holds. */
INLINE void tile(int rows, int columns, int bf16, const char *const *panels, const struct ahead *ahead,
                 int32_t inputs, const float *x, int32_t x_stride, float *y, int32_t y_stride, int goes_on)
{
    const long step = bf16 ? 2 * PANEL : 4 * PANEL;
    vec sums[MAX_ROWS][MAX_COLUMNS * PARTS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns * PARTS; c++)
        sums[r][c] = goes_on ? load(y + r * (long)y_stride + c * WIDTH) : (vec){0};
    const char *from[MAX_COLUMNS];
    UNROLL for (int c = 0; c < columns; c++) from[c] = panels[c];
    const char *next[MAX_COLUMNS];
    UNROLL for (int c = 0; c < columns; c++) next[c] = ahead->panels[c] + ahead->offset;
    const long next_step = ahead->step;
    for (int32_t k = 0; k < inputs; k++) {
        vec weights[MAX_COLUMNS * PARTS];
        UNROLL for (int c = 0; c < columns; c++) {
            __builtin_prefetch(next[c]);
            next[c] += next_step;
            load_panel(bf16, from[c], weights + c * PARTS);
            from[c] += step;
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const vec value = splat(x[r * (long)x_stride + k]);
            UNROLL for (int c = 0; c < columns * PARTS; c++) sums[r][c] = multiply_add(weights[c], value, sums[r][c]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns * PARTS; c++)
        store(y + r * (long)y_stride + c * WIDTH, sums[r][c]);
}

/* The tile of `rows` over the next panels, as many as suit and at most `left`; how many. */
INLINE int tiles(int rows, int bf16, int alone, const char *const *panels, int left, const struct ahead *ahead,
                 int32_t inputs, const float *x, int32_t x_stride, float *y, int32_t y_stride)
{
#define TILE(R, C)                                                                                                     \
    if (COLUMNS(R, bf16, alone) >= C && left >= C) {                                                                   \
        tile(R, C, bf16, panels, ahead, inputs, x, x_stride, y, y_stride, 0);                                          \
        return C;                                                                                                      \
    }
#define TILES(R)                                                                                                       \
    case R:                                                                                                            \
        TILE(R, 4)                                                                                                     \
        TILE(R, 2)                                                                                                     \
        TILE(R, 1)                                                                                                     \
        break;
    switch (rows) {
        TILES(1)
        TILES(2)
        TILES(3)
#if WIDTH > 4
        TILES(4)
        TILES(5)
        TILES(6)
#endif
    }
#undef TILES
#undef TILE
    return left;
}

/* At most MAX_COLUMNS panels, anywhere in memory; `next`: as many that will be needed soon, or NULL. */
INLINE void product(int bf16, const char *const *panels, int count, const char *const *next, int32_t inputs,
                    const float *x, int32_t x_stride, float *y, int32_t y_stride, int32_t rows)
{
    const int32_t turns = (rows + MAX_ROWS - 1) / MAX_ROWS;
    const long bytes = (long)panel_bytes(bf16 ? NATIVE_BFLOAT16 : NATIVE_FLOAT32, inputs);
    for (int32_t turn = 0, row = 0; turn < turns; turn++) {
        const int32_t some = (rows - row + turns - turn - 1) / (turns - turn);
        for (int c = 0; c < count;) {
            struct ahead ahead = {panels + c, 0, 0};
            if (next)
                ahead = (struct ahead){next + c, turn * (bytes / turns), (bf16 ? 32 : 64) / turns};
            c += tiles(some, bf16, turns == 1, panels + c, count - c, &ahead, inputs, x + row * (long)x_stride,
                       x_stride, y + row * (long)y_stride + c * PANEL, y_stride);
        }
        row += some;
    }
}

/* Not inlined: one copy of the tiles for each type. */
static __attribute__((noinline)) void product_float(const char *const *panels, int count,
                                                    const char *const *next,
                                                    int32_t inputs, const float *x, int32_t x_stride, float *y,
                                                    int32_t y_stride, int32_t rows)
{
    product(0, panels, count, next, inputs, x, x_stride, y, y_stride, rows);
}

static __attribute__((noinline)) void product_bf16(const char *const *panels, int count,
                                                    const char *const *next,
                                                   int32_t inputs, const float *x, int32_t x_stride, float *y,
                                                   int32_t y_stride, int32_t rows)
{
    product(1, panels, count, next, inputs, x, x_stride, y, y_stride, rows);
}

static void matmul_floats(const struct matrix *matrix, int32_t begin, int32_t end, const float *x, int32_t x_stride,
                          float *y, int32_t y_stride, int32_t rows)
{
    const size_t bytes = matrix->panel_bytes;
    for (int32_t panel = begin; panel < end; panel += MAX_COLUMNS) {
        const int count = end - panel < MAX_COLUMNS ? end - panel : MAX_COLUMNS;
        const char *panels[MAX_COLUMNS], *next[MAX_COLUMNS];
        for (int c = 0; c < count; c++) {
            const int32_t later = panel + MAX_COLUMNS + c < matrix->panel_count ? panel + MAX_COLUMNS + c : panel + c;
            panels[c] = matrix->panels + (size_t)(panel + c) * bytes;
            next[c] = matrix->panels + (size_t)later * bytes;
        }
        (matrix->format == NATIVE_BFLOAT16 ? product_bf16 : product_float)(
            panels, count, next, matrix->inputs, x, x_stride, y + (long)panel * PANEL, y_stride, rows);
    }
}

/* What lies beyond the last output stays zero, as the memory was. */
static void pack_floats(const struct matrix *matrix, const void *values, int32_t outputs)
{
    const int32_t inputs = matrix->inputs;
    for (int32_t o = 0; o < outputs; o++) {
        char *panel = matrix->panels + (size_t)(o / PANEL) * matrix->panel_bytes;
        if (matrix->format == NATIVE_BFLOAT16) {
            const uint16_t *from = (const uint16_t *)values + (size_t)o * inputs;
            uint16_t *to = (uint16_t *)panel + bf16_slot(o % PANEL);
            for (int32_t k = 0; k < inputs; k++)
                to[k * PANEL] = from[k];
        } else {
            const float *from = (const float *)values + (size_t)o * inputs;
            float *to = (float *)panel + o % PANEL;
            for (int32_t k = 0; k < inputs; k++)
                to[k * PANEL] = from[k];
        }
    }
}

static void embed_floats(const struct matrix *matrix, int32_t index, float scale, float *x)
{
    const char *panel = matrix->panels + (size_t)(index / PANEL) * matrix->panel_bytes;
    const int bf16 = matrix->format == NATIVE_BFLOAT16;
    for (int32_t k = 0; k < matrix->inputs; k++) {
        const size_t at = (size_t)k * PANEL;
        const float value = bf16 ? bf16_to_float(((const uint16_t *)panel)[at + bf16_slot(index % PANEL)])
                                 : ((const float *)panel)[at + index % PANEL];
        x[k] = value * scale;
    }
}
