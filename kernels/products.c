/* Products by tiles (AMX) or by vectors (avx512_bf16), and a decode step's whole layer in one call.
 *
 * A row's result depends on that row alone: its sums go in one order whatever rows there are.
 */

#include "native.h"

#ifdef HAS_PRODUCTS

#define WIDE 32 /* columns a piece of work: two tiles, or vectors */
#define APART 32 /* more than a row's values from row to row of a left operand: rows of 2 or 4 KiB share a cache set */

/* out[row] = x[row] W^T + bias. `x` has rows up to a multiple of 16, whatever they hold. `packed`: for every 16 columns,
 * their weights in tiles of 16 pairs of inputs by 16 columns. Returns before the other threads are done. */
#ifdef HAS_TILES

/* Ask for what is 8 KiB further on. Weights pass by: what they are multiplied with should stay in the first cache. */
static inline void ahead(const bf16 *tile) {
    for (int line = 0; line < 16; line++) __builtin_prefetch(tile + 4096 + 32 * line, 0, 2);
}

static void product_part(const bf16 *x, int64_t x_stride, const bf16 *packed, const float *bias, bf16 *out,
                         int64_t out_stride, int64_t rows, int64_t n, int64_t k) {
    float sums[4][16][16] __attribute__((aligned(64)));
#pragma omp for schedule(static) nowait
    for (int64_t column = 0; column < n; column += WIDE) {
        const bf16 *left = packed + column * k, *right = left + 16 * k;
        for (int64_t row = 0; row < rows; row += 32) {
            const bf16 *from = x + row * x_stride;
            int64_t count = rows - row < 32 ? rows - row : 32;
            _tile_zero(0);
            _tile_zero(1);
            if (count > 16) {
                _tile_zero(2);
                _tile_zero(3);
                for (int64_t i = 0; i < k; i += 32) {
                    if (!row) ahead(left + 16 * i), ahead(right + 16 * i);
                    _tile_stream_loadd(6, left + 16 * i, 64);
                    _tile_loadd(4, from + i, 2 * x_stride);
                    _tile_stream_loadd(7, right + 16 * i, 64);
                    _tile_loadd(5, from + 16 * x_stride + i, 2 * x_stride);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(2, sums[2], 64);
                _tile_stored(3, sums[3], 64);
            } else
                for (int64_t i = 0; i < k; i += 32) {
                    if (!row) ahead(left + 16 * i), ahead(right + 16 * i);
                    _tile_stream_loadd(6, left + 16 * i, 64);
                    _tile_loadd(4, from + i, 2 * x_stride);
                    _tile_stream_loadd(7, right + 16 * i, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                }
            _tile_stored(0, sums[0], 64);
            _tile_stored(1, sums[1], 64);
            vec near = bias ? load(bias + column) : splat(0), far = bias ? load(bias + column + 16) : splat(0);
            for (int64_t i = 0; i < count; i++) {
                bf16 *to = out + (row + i) * out_stride + column;
                narrow(to, load(sums[i / 16 * 2][i % 16]) + near);
                narrow(to + 16, load(sums[i / 16 * 2 + 1][i % 16]) + far);
            }
        }
    }
}

#else

#define ROWS 8 /* at once: two sums each, and the weights of a step, leave no vector unused for long */

/* Pairs of a row's inputs times those of 32 columns, from first to last: the same order however many `rows` there are. */
static inline __attribute__((always_inline)) void block(const bf16 *x, int64_t x_stride, const bf16 *left,
                                                        const bf16 *right, const float *bias, bf16 *out,
                                                        int64_t out_stride, int64_t k, int rows) {
    __m512 near[ROWS], far[ROWS];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) near[row] = far[row] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 2) {
        __m512bh one = (__m512bh)_mm512_loadu_si512(left + 16 * i), other = (__m512bh)_mm512_loadu_si512(right + 16 * i);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            int32_t pair;
            memcpy(&pair, x + row * x_stride + i, 4);
            __m512bh given = (__m512bh)_mm512_set1_epi32(pair);
            near[row] = _mm512_dpbf16_ps(near[row], given, one);
            far[row] = _mm512_dpbf16_ps(far[row], given, other);
        }
    }
    vec first = bias ? load(bias) : splat(0), second = bias ? load(bias + 16) : splat(0);
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
        narrow(out + row * out_stride, (vec)near[row] + first);
        narrow(out + row * out_stride + 16, (vec)far[row] + second);
    }
}

static void product_part(const bf16 *x, int64_t x_stride, const bf16 *packed, const float *bias, bf16 *out,
                         int64_t out_stride, int64_t rows, int64_t n, int64_t k) {
#pragma omp for schedule(static) nowait
    for (int64_t column = 0; column < n; column += WIDE) {
        const bf16 *left = packed + column * k, *right = left + 16 * k;
        const float *add = bias ? bias + column : 0;
        for (int64_t row = 0; row < rows; row += ROWS) {
            const bf16 *from = x + row * x_stride;
            bf16 *to = out + row * out_stride + column;
#define OF(count) \
    case count: \
        block(from, x_stride, left, right, add, to, out_stride, k, count); \
        break
            switch (rows - row) { /* sums are registers only where their number is known */
                OF(1);
                OF(2);
                OF(3);
                OF(4);
                OF(5);
                OF(6);
                OF(7);
            default:
                block(from, x_stride, left, right, add, to, out_stride, k, ROWS);
            }
#undef OF
        }
    }
}

#endif

void product(const bf16 *x, int64_t x_stride, const bf16 *packed, const float *bias, bf16 *out, int64_t rows, int64_t n, int64_t k,
             int threads) {
#pragma omp parallel num_threads(threads)
    {
        tiles_on();
        product_part(x, x_stride, packed, bias, out, n, rows, n, k);
        tiles_off();
    }
}

typedef struct {
    const bf16 *packed;
    const float *bias;
    int64_t out;
    adapters adapters;
} site;

/* A norm's weight (null: no norm) and eps. */
typedef struct {
    const float *weight;
    double eps;
} norm;

typedef struct {
    site qkv, o, gate_up, down;
    norm before, after, before_mlp, after_mlp;
    attention attention;
    int64_t hidden, activation;
} decoder_layer;

/* Room for a step's activations; `x` has rows up to a multiple of 16, `APART` apart. */
typedef struct {
    bf16 *x, *q, *wide;
} room;

static void site_rows(const bf16 *x, const site *of, const tiles *tile, bf16 *out, int64_t rows) {
    int64_t in = of->adapters.in;
    product_part(x, in + APART, of->packed, of->bias, out, of->out, rows, of->out, in);
    shrink_rows(x, in + APART, &of->adapters, tile);
    if (tile->count) expand_rows(&of->adapters, tile, out, of->out);
}

static inline float factor(vec squares, int64_t dim, double eps) {
    return 1.0f / sqrtf(sum(squares) / (float)dim + (float)eps);
}

/* hidden += norm(added), where there is something to add; then x = norm(hidden), where there is a `next`. */
static void join_rows(float *hidden, const bf16 *added, const norm *of, const norm *next, bf16 *x, int64_t rows,
                      int64_t dim) {
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
        float *at = hidden + row * dim;
        const bf16 *add = added + row * dim;
        vec squares = {0};
        if (added) {
            float by = 1.0f;
            if (of->weight) {
                for (int64_t i = 0; i < dim; i += LANES) squares += widen(add + i) * widen(add + i);
                by = factor(squares, dim, of->eps);
            }
            for (int64_t i = 0; i < dim; i += LANES) {
                vec value = widen(add + i) * by;
                if (of->weight) value *= load(of->weight + i);
                store(at + i, load(at + i) + value);
            }
        }
        if (!next) continue;
        squares = splat(0);
        for (int64_t i = 0; i < dim; i += LANES) squares += load(at + i) * load(at + i);
        float by = factor(squares, dim, next->eps);
        for (int64_t i = 0; i < dim; i += LANES) narrow(x + row * (dim + APART) + i, load(at + i) * by * load(next->weight + i));
    }
}

/* `hidden` [rows, hidden] through one layer, in place; every row is a sequence's new token. */
void decode(const decoder_layer *l, const sequences *at, const tiles *tile, float *hidden, const room *in, int threads) {
    int64_t rows = at->rows;
#pragma omp parallel num_threads(threads)
    {
        tiles_on();
        join_rows(hidden, 0, 0, &l->before, in->x, rows, l->hidden);
        site_rows(in->x, &l->qkv, tile, in->wide, rows);
        rotate_rows(in->wide, l->qkv.out, &l->attention, at, in->q);
        attend_rows(in->q, &l->attention, at, in->x, l->o.adapters.in + APART);
        site_rows(in->x, &l->o, tile, in->wide, rows);
        join_rows(hidden, in->wide, &l->after, &l->before_mlp, in->x, rows, l->hidden);
        site_rows(in->x, &l->gate_up, tile, in->wide, rows);
        gated_rows(in->wide, in->x, l->down.adapters.in + APART, rows, l->down.adapters.in, l->activation);
        site_rows(in->x, &l->down, tile, in->wide, rows);
        join_rows(hidden, in->wide, &l->after_mlp, 0, 0, rows, l->hidden);
        tiles_off();
    }
}

#endif

/* How products are made here: 1 by tiles, 2 by vectors, 0 not at all. */
int products(void) {
#if defined(HAS_TILES)
    return 1;
#elif defined(HAS_PRODUCTS)
    return 2;
#else
    return 0;
#endif
}
