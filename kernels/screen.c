/* The greedy token of a wide head: all tokens in int8 by tiles (AMX), in fp32 those that this cannot rule out.
 *
 * A token's true score lies within its length's share of what its weights lost by rounding (Cauchy-Schwarz), so the best
 * is among those whose upper bound reaches the highest lower bound.
 */

#include "native.h"

#ifdef HAS_TILES

#define ROWS 32
#define TOKENS 16 /* ruled out together */
#define PART 128  /* of an activation's upper half to its lower */
#define UNITS (127 * PART)

/* `hidden` [ROWS, k] divided by `smooth`, in UNITS of each row's own: two signed bytes a value, as right operands
 * [2 halves of rows, 2 parts, k / 64, 16, 16 rows, 4]. `length`: of a row, in its units. */
static void quantise(const float *hidden, const float *smooth, int64_t rows, int64_t k, int8_t *parts, float *length) {
#pragma omp for
    for (int64_t row = 0; row < ROWS; row++) {
        const float *x = hidden + row * k;
        int8_t *to = parts + row / 16 * 2 * 16 * k + row % 16 * 4;
        float top = 0, squares = 0;
        for (int64_t i = 0; i < k && row < rows; i++) {
            float value = x[i] / smooth[i];
            squares += value * value;
            if (fabsf(value) > top) top = fabsf(value);
        }
        float unit = top > 0 ? UNITS / top : 0;
        length[row] = row < rows ? sqrtf(squares) * unit : 0;
        for (int64_t i = 0; i < k; i++) {
            int32_t value = row < rows ? (int32_t)lrintf(x[i] / smooth[i] * unit) : 0;
            int32_t upper = (value + PART / 2) >> 7, place = i / 4 * 64 + i % 4;
            to[place] = (int8_t)upper;
            to[place + 16 * k] = (int8_t)(value - upper * PART);
        }
    }
}

static inline vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }

static inline vec whole(const int32_t *from) { return __builtin_convertvector(*(const ints *)from, vec); }

/* Sums [half, part, token, row] of 16 tokens. */
typedef int32_t sums[2][2][TOKENS][16];

static inline void multiply(const int8_t *weights, const int8_t *parts, int64_t k) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < 16 * k; i += 1024) {
        for (int line = 0; line < 16; line++) __builtin_prefetch(weights + i + 16384 + 64 * line, 0, 2);
        _tile_stream_loadd(4, weights + i, 64);
        _tile_loadd(5, parts + i, 64);
        _tile_loadd(6, parts + i + 16 * k, 64);
        _tile_loadd(7, parts + i + 32 * k, 64);
        _tile_dpbssd(0, 4, 5);
        _tile_dpbssd(1, 4, 6);
        _tile_loadd(5, parts + i + 48 * k, 64);
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(3, 4, 5);
    }
}

static inline void keep(sums to) {
    _tile_stored(0, to[0][0], 64);
    _tile_stored(1, to[0][1], 64);
    _tile_stored(2, to[1][0], 64);
    _tile_stored(3, to[1][1], 64);
}

/* What the best of 16 tokens scores at most, to `upper` [ROWS], and at least, to `low` where that is more. */
static inline void bound(const sums of, const float *scale, const float *lost, const float *length, float *upper,
                         vec low[2]) {
    float most = 0;
    for (int t = 0; t < TOKENS; t++) most = lost[t] > most ? lost[t] : most;
    for (int half = 0; half < 2; half++) {
        vec high = splat(-INFINITY), reach = load(length + 16 * half);
        for (int t = 0; t < TOKENS; t++)
            high = larger((whole(of[half][0][t]) * PART + whole(of[half][1][t])) * scale[t] + reach * lost[t], high);
        store(upper + 16 * half, high);
        low[half] = larger(high - 2 * reach * most, low[half]);
    }
}

static inline float exact(const float *x, const float *w, int64_t k) {
    vec sums[4] = {{0}};
    for (int64_t i = 0; i < k; i += 64)
        for (int j = 0; j < 4; j++) sums[j] += load(x + i + j * LANES) * load(w + i + j * LANES);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/* The best token of each of at most ROWS rows of `hidden` [rows, k], the first of equals, into `best`; returns 0 if
 * more than `most` pairs of a row and 16 tokens cannot be ruled out, or a row has no best.
 *
 * `packed` int8: for every 16 tokens, tiles of 16 tokens by 64 inputs; a token's weights times `smooth` are its `scale`
 * times those, but for `lost`, the length of the difference. `weight` fp32 [vocab, k]. Room: `parts` int8 [4 * 16 * k],
 * `upper` fp32 [vocab / 16, ROWS], `found` int32 [most, 2] and `value` fp32 [most]. */
int screen(const float *hidden, const float *smooth, int64_t rows, int64_t k, const int8_t *packed, const float *scale,
           const float *lost, const float *weight, int64_t vocab, int8_t *parts, float *upper, int32_t *found,
           float *value, int64_t most, int64_t *best, int threads) {
    float length[ROWS], certain[ROWS], top[ROWS];
    int64_t count = 0;
    for (int row = 0; row < ROWS; row++) certain[row] = -INFINITY;
#pragma omp parallel num_threads(threads)
    {
        vec low[2] = {splat(-INFINITY), splat(-INFINITY)};
        tiles_on();
        quantise(hidden, smooth, rows, k, parts, length);
        sums both[2] __attribute__((aligned(64)));
        int64_t last = -1; /* the group whose sums wait: they are looked at while the next are multiplied */
#pragma omp for schedule(static) nowait
        for (int64_t group = 0; group < vocab / TOKENS; group++) {
            multiply(packed + group * TOKENS * k, parts, k);
            if (last >= 0)
                bound(both[last % 2], scale + last * TOKENS, lost + last * TOKENS, length, upper + last * ROWS, low);
            keep(both[group % 2]);
            last = group;
        }
        if (last >= 0)
            bound(both[last % 2], scale + last * TOKENS, lost + last * TOKENS, length, upper + last * ROWS, low);
        _tile_release();
#pragma omp critical
        for (int half = 0; half < 2; half++)
            store(certain + 16 * half, larger(load(certain + 16 * half), low[half]));
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t block = 0; block < vocab / TOKENS; block++)
            for (int half = 0; half < 2; half++) {
                unsigned reached = _mm512_cmp_ps_mask((__m512)load(upper + block * ROWS + 16 * half),
                                                      (__m512)load(certain + 16 * half), _CMP_GE_OQ);
                for (; reached; reached &= reached - 1) {
                    int row = 16 * half + __builtin_ctz(reached);
                    int64_t at;
                    if (row >= rows) continue;
#pragma omp atomic capture
                    at = count++;
                    if (at < most) found[2 * at] = row, found[2 * at + 1] = (int32_t)(block * TOKENS);
                }
            }
#pragma omp for schedule(dynamic, 4)
        for (int64_t n = 0; n < (count <= most ? count : 0); n++) {
            const float *x = hidden + found[2 * n] * k;
            int32_t first = found[2 * n + 1];
            value[n] = -INFINITY;
            for (int64_t t = first; t < first + TOKENS; t++) {
                float score = exact(x, weight + t * k, k);
                if (score > value[n]) value[n] = score, found[2 * n + 1] = (int32_t)t;
            }
        }
    }
    if (count > most) return 0;
    for (int64_t row = 0; row < rows; row++) top[row] = -INFINITY;
    for (int64_t n = 0; n < count; n++) {
        int32_t row = found[2 * n], token = found[2 * n + 1];
        if (value[n] > top[row] || (value[n] == top[row] && token < best[row])) top[row] = value[n], best[row] = token;
    }
    for (int64_t row = 0; row < rows; row++)
        if (top[row] == -INFINITY) return 0;
    return 1;
}

#endif
