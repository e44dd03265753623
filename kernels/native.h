/* Vectors of bf16 and fp32, and what the files here call of each other.
 *
 * Vectors are the compiler's own (`vector_size`), so nothing here names an instruction set, but for products where
 * avx512_bf16 halves the work. A function named `..._rows` is called by every thread of a parallel region, shares its
 * work among them and returns when all of it is done.
 */

#ifndef RIVERDELTA_NATIVE_H
#define RIVERDELTA_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_TILES
#endif
#if defined(HAS_TILES) || defined(__AVX512BF16__)
#define HAS_PRODUCTS
#endif

#define LANES 16
#define TILE 16

typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

static inline vec splat(float value) { return (vec){0} + value; }

static inline vec load(const float *from) { return *(const vec *)from; }

static inline void store(float *to, vec value) { *(vec *)to = value; }

static inline vec widen(const bf16 *from) {
    return (vec)(__builtin_convertvector(*(const halves *)from, words) << 16);
}

static inline void narrow(bf16 *to, vec value) {
#ifdef __AVX512BF16__
    *(halves *)to = (halves)_mm512_cvtneps_pbh((__m512)value);
#else
    words bits = (words)value; /* to the nearest, ties to even; a NaN stays one */
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ints nan = value != value;
    *(halves *)to = __builtin_convertvector((rounded & ~(words)nan) | ((words)nan & 0x7fc0), halves);
#endif
}

static inline float widen_one(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

static inline bf16 narrow_one(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float sum(vec value) {
#ifdef __AVX512BF16__
    return _mm512_reduce_add_ps((__m512)value);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += value[i];
    return total;
#endif
}

static inline vec least(vec a, vec b) {
    ints smaller = a < b;
    return (vec)(((ints)a & smaller) | ((ints)b & ~smaller));
}

static inline vec most(vec a, vec b) { return -least(-a, -b); }

/* e^x to about 2e-7: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
static inline vec exponential(vec x) {
    x = most(least(x, splat(88.0f)), splat(-87.0f));
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    vec k = shifted - 12582912.0f;
    vec r = x - k * 0.693145752f - k * 1.42860677e-6f;
    vec p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f)))));
    return (vec)((words)p + (((words)shifted) << 23));
}

static inline float dot(const bf16 *a, const bf16 *b, int64_t n) {
    float total = 0;
    int64_t i = 0;
#ifdef __AVX512BF16__
    __m512 sums = _mm512_setzero_ps();
    for (; i + 32 <= n; i += 32)
        sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
    total = _mm512_reduce_add_ps(sums);
#else
    vec sums = {0};
    for (; i + LANES <= n; i += LANES) sums += widen(a + i) * widen(b + i);
    total = sum(sums);
#endif
    for (; i < n; i++) total += widen_one(a[i]) * widen_one(b[i]);
    return total;
}


/* What attention needs of a layer: its heads, and where its keys and values are kept. */
typedef struct {
    int64_t heads, kv_heads, dim, block, window;
    float scale, eps;
    const float *norm; /* of queries and keys, [heads + kv_heads, dim]; or null */
    bf16 *k, *v;
} attention;

/* Where a step's rows are: one new token a sequence. */
typedef struct {
    int64_t rows, width;
    const int64_t *places;
    const int32_t *tables, *lengths;
    const float *cosine, *sine;
} sequences;

/* The adapters of one site, as a LoraPool holds them, and the step's tiles {slot, first row, rows}. */
typedef struct {
    const bf16 *a, *b;
    const int32_t *offsets;
    const float *scales;
    const int64_t *columns;
    int64_t parts, max_rank, in;
} adapters;

typedef struct {
    const int32_t *at;
    int64_t count;
    float *hidden; /* [count * TILE, parts * max_rank] */
} tiles;

#ifdef HAS_TILES
/* Accumulators 0 to 3, left operands 4 and 5, right operands 6 and 7: all full. */
static inline void tiles_on(void) {
    struct {
        uint8_t palette, first, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((packed)) config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

static inline void tiles_off(void) { _tile_release(); }
#else
static inline void tiles_on(void) {}
static inline void tiles_off(void) {}
#endif

void rotate_rows(const bf16 *qkv, int64_t stride, const attention *to, const sequences *at, bf16 *q);
void attend_rows(const bf16 *q, const attention *to, const sequences *at, bf16 *out, int64_t stride);
void gated_rows(const bf16 *x, bf16 *out, int64_t stride, int64_t rows, int64_t width, int kind);
void shrink_rows(const bf16 *x, int64_t x_stride, const adapters *from, const tiles *tile);
void expand_rows(const adapters *from, const tiles *tile, bf16 *out, int64_t out_stride);

#endif
