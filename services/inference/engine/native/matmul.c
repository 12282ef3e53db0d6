/* Matrix products over panels: part of variant.c. */
#include "vec.h"

#include "kernels.h"

/* Accumulators stay in registers: rows * columns * PARTS of them, and at least 8 hide the latency of multiply-add. */
#if WIDTH == 16
enum { MAX_ROWS = 6, MAX_COLUMNS = 4 };
#define COLUMNS(rows) 4
#elif WIDTH == 8
enum { MAX_ROWS = 6, MAX_COLUMNS = 4 };
#define COLUMNS(rows) ((rows) == 1 ? 4 : (rows) <= 3 ? 2 : 1)
#else
enum { MAX_ROWS = 3, MAX_COLUMNS = 2 };
#define COLUMNS(rows) ((rows) == 1 ? 2 : 1)
#endif

enum { PREFETCH_BYTES = 1024 };

/* y[row][column panel] (+)= sum over k of x[row][k] * panel[k], one chain for each number of y. */
INLINE void tile(int rows, int columns, int bf16, int prefetch, const char *const *panels, int32_t inputs,
                 const float *x, int32_t x_stride, float *y, int32_t y_stride)
{
    const long step = bf16 ? 2 * PANEL : 4 * PANEL;
    vec sums[MAX_ROWS][MAX_COLUMNS * PARTS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int c = 0; c < columns * PARTS; c++) sums[r][c] = (vec){0};
    const char *from[MAX_COLUMNS];
    UNROLL for (int c = 0; c < columns; c++) from[c] = panels[c];
    for (int32_t k = 0; k < inputs; k++) {
        vec weights[MAX_COLUMNS * PARTS];
        UNROLL for (int c = 0; c < columns; c++) {
            if (prefetch)
                __builtin_prefetch(from[c] + PREFETCH_BYTES);
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
INLINE int tiles(int rows, int bf16, const char *const *panels, int left, int32_t inputs, const float *x,
                 int32_t x_stride, float *y, int32_t y_stride)
{
#define TILE(R, C)                                                                                                     \
    do {                                                                                                               \
        tile(R, C, bf16, (R) == 1, panels, inputs, x, x_stride, y, y_stride);                                          \
        return C;                                                                                                      \
    } while (0)
#define TILES(R)                                                                                                       \
    case R:                                                                                                            \
        if (COLUMNS(R) > 1 && left >= COLUMNS(R))                                                                      \
            TILE(R, COLUMNS(R));                                                                                       \
        if (COLUMNS(R) > 2 && left >= 2)                                                                               \
            TILE(R, 2);                                                                                                \
        TILE(R, 1);
    switch (rows) {
        TILES(1)
        TILES(2)
        TILES(3)
#if WIDTH > 4
        TILES(4)
        TILES(5)
        TILES(6)
#endif
    default:
        return left;
    }
#undef TILES
#undef TILE
}

INLINE void product(int bf16, const char *const *panels, int count, int32_t inputs, const float *x, int32_t x_stride,
                    float *y, int32_t y_stride, int32_t rows)
{
    const int32_t turns = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int32_t turn = 0, row = 0; turn < turns; turn++) {
        const int32_t some = (rows - row + turns - turn - 1) / (turns - turn);
        for (int c = 0; c < count;)
            c += tiles(some, bf16, panels + c, count - c, inputs, x + row * (long)x_stride, x_stride,
                       y + row * (long)y_stride + c * PANEL, y_stride);
        row += some;
    }
}

/* `count` panels anywhere in memory, at most MAX_COLUMNS. Not inlined: one copy of the tiles for each type. */
static __attribute__((noinline)) void product_float(const char *const *panels, int count, int32_t inputs,
                                                    const float *x, int32_t x_stride, float *y, int32_t y_stride,
                                                    int32_t rows)
{
    product(0, panels, count, inputs, x, x_stride, y, y_stride, rows);
}

static __attribute__((noinline)) void product_bf16(const char *const *panels, int count, int32_t inputs,
                                                   const float *x, int32_t x_stride, float *y, int32_t y_stride,
                                                   int32_t rows)
{
    product(1, panels, count, inputs, x, x_stride, y, y_stride, rows);
}

static void matmul(const struct matrix *matrix, int32_t begin, int32_t end, const float *x, int32_t x_stride, float *y,
                   int32_t y_stride, int32_t rows)
{
    const size_t bytes = panel_bytes(matrix->inputs, matrix->bf16);
    for (int32_t panel = begin; panel < end; panel += MAX_COLUMNS) {
        const int count = end - panel < MAX_COLUMNS ? end - panel : MAX_COLUMNS;
        const char *panels[MAX_COLUMNS];
        for (int c = 0; c < count; c++)
            panels[c] = matrix->panels + (size_t)(panel + c) * bytes;
        (matrix->bf16 ? product_bf16 : product_float)(panels, count, matrix->inputs, x, x_stride,
                                                      y + (long)panel * PANEL, y_stride, rows);
    }
}

static void pack(const struct matrix *matrix, int32_t first_panel, const void *values, int32_t outputs)
{
    const size_t bytes = panel_bytes(matrix->inputs, matrix->bf16);
    const int32_t inputs = matrix->inputs;
    for (int32_t o = 0; o < (outputs + PANEL - 1) / PANEL * PANEL; o++) {
        char *panel = matrix->panels + (size_t)(first_panel + o / PANEL) * bytes;
        if (matrix->bf16) {
            const uint16_t *from = (const uint16_t *)values + (size_t)o * inputs;
            uint16_t *to = (uint16_t *)panel + bf16_slot(o % PANEL);
            for (int32_t k = 0; k < inputs; k++)
                to[k * PANEL] = o < outputs ? from[k] : 0;
        } else {
            const float *from = (const float *)values + (size_t)o * inputs;
            float *to = (float *)panel + o % PANEL;
            for (int32_t k = 0; k < inputs; k++)
                to[k * PANEL] = o < outputs ? from[k] : 0;
        }
    }
}

static void embed(const struct matrix *matrix, int32_t index, float scale, float *x)
{
    const char *panel = matrix->panels + (size_t)(index / PANEL) * panel_bytes(matrix->inputs, matrix->bf16);
    for (int32_t k = 0; k < matrix->inputs; k++) {
        const size_t at = (size_t)k * PANEL;
        const float value = matrix->bf16 ? bf16_to_float(((const uint16_t *)panel)[at + bf16_slot(index % PANEL)])
                                         : ((const float *)panel)[at + index % PANEL];
        x[k] = value * scale;
    }
}
