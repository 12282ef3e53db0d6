/* The kernels for one instruction set: this file is compiled once for each, with -DVARIANT=its name and the
 * compiler's flags for it (build.py). One unit, so that everything can be inlined. */
#include "matmul.c"
#include "rows.c"
#include "attention.c"

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
