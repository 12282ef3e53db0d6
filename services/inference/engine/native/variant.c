/* The kernels for one instruction set: this file is compiled once for each, with -DVARIANT=its name and the
 * compiler's flags for it (build.py). One unit, so that everything can be inlined. */
#include "matmul.c"
#include "blocks.c"
#include "rows.c"
#include "attention.c"

static int in_blocks(const struct matrix *matrix)
{
    return matrix->format >= NATIVE_Q8_0;
}

static void matmul(const struct matrix *matrix, int32_t begin, int32_t end, const float *x, int32_t x_stride, float *y,
                   int32_t y_stride, int32_t rows)
{
    (in_blocks(matrix) ? matmul_blocks : matmul_floats)(matrix, begin, end, x, x_stride, y, y_stride, rows);
}

static void pack(const struct matrix *matrix, const void *values, int32_t outputs)
{
    (in_blocks(matrix) ? pack_blocks : pack_floats)(matrix, values, outputs);
}

static void embed(const struct matrix *matrix, int32_t index, float scale, float *x)
{
    (in_blocks(matrix) ? embed_blocks : embed_floats)(matrix, index, scale, x);
}

#define NAME_(variant) kernels_##variant
#define NAME(variant) NAME_(variant)
#define TEXT_(variant) #variant
#define TEXT(variant) TEXT_(variant)

const struct kernels NAME(VARIANT) = {
    .name = TEXT(VARIANT),
    .pack = pack,
    .matmul = matmul,
    .embed = embed,
    .norm = norm,
    .add = add,
    .scale = scale,
    .rotate = rotate,
    .gate = gate,
    .softcap = softcap,
    .keep = keep,
    .attend = attend,
};
