/* What a decode step does between its products, fused: bf16 values, fp32 arithmetic, rows independent of each other.
 *
 * Compiled by native.py on the machine that runs it. Vectors are the compiler's own (`vector_size`), so nothing here
 * names an instruction set, but for one product where avx512_bf16 halves the work.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LANES 16
#define MAX_DIM 512
#define MAX_GROUP 16
#define TILE 16
#define BLOCK 64

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
    words bits = (words)value; /* to the nearest, ties to even; a NaN stays one */
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ints nan = value != value;
    *(halves *)to = __builtin_convertvector((rounded & ~(words)nan) | ((words)nan & 0x7fc0), halves);
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
    float total = 0;
    for (int i = 0; i < LANES; i++) total += value[i];
    return total;
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

/* out[row] = x[row] * weight / sqrt(mean(x[row]^2) + eps). `x`: bf16 or fp32, its rows `stride` apart. */
void rms_norm(const void *x, int is_bf16, int64_t stride, const float *weight, float *out, int64_t rows, int64_t dim,
              float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * dim > 65536)
    for (int64_t row = 0; row < rows; row++) {
        const float *wide = (const float *)x + row * stride;
        const bf16 *half = (const bf16 *)x + row * stride;
        float *to = out + row * dim;
        vec total = {0};
        float tail = 0;
        int64_t i = 0;
        for (; i + LANES <= dim; i += LANES) {
            vec value = is_bf16 ? widen(half + i) : load(wide + i);
            total += value * value;
        }
        for (int64_t j = i; j < dim; j++) {
            float value = is_bf16 ? widen_one(half[j]) : wide[j];
            tail += value * value;
        }
        float factor = 1.0f / sqrtf((sum(total) + tail) / (float)dim + eps);
        for (i = 0; i + LANES <= dim; i += LANES) {
            vec value = is_bf16 ? widen(half + i) : load(wide + i);
            store(to + i, value * factor * load(weight + i));
        }
        for (; i < dim; i++) to[i] = (is_bf16 ? widen_one(half[i]) : wide[i]) * factor * weight[i];
    }
}

/* Queries and keys of `qkv` [rows, heads + 2 kv_heads, dim] normalised (if `norm` [heads + kv_heads, dim] is there) and
 * rotated by `cosine` and `sine` [rows, dim]; queries to `q`, keys and values to their places in the cache. */
void rotate(const bf16 *qkv, int64_t stride, const float *norm, float eps, const float *cosine, const float *sine,
            const int64_t *places, bf16 *q, bf16 *k_cache, bf16 *v_cache, int64_t rows, int64_t heads,
            int64_t kv_heads, int64_t dim, int threads) {
    int64_t half = dim / 2, turned = heads + kv_heads;
#pragma omp parallel for num_threads(threads) if (rows * turned * dim > 32768)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = qkv + row * stride;
        const float *c = cosine + row * dim, *s = sine + row * dim;
        for (int64_t head = 0; head < turned; head++, from += dim) {
            bf16 *to = head < heads ? q + (row * heads + head) * dim
                                    : k_cache + (places[row] * kv_heads + head - heads) * dim;
            float value[MAX_DIM], factor = 1.0f;
            vec total = {0};
            for (int64_t i = 0; i < dim; i += LANES) {
                vec v = widen(from + i);
                total += v * v;
                store(value + i, v);
            }
            if (norm) {
                factor = 1.0f / sqrtf(sum(total) / (float)dim + eps);
                for (int64_t i = 0; i < dim; i += LANES)
                    store(value + i, load(value + i) * factor * load(norm + head * dim + i));
            }
            for (int64_t i = 0; i < half; i += LANES) {
                vec a = load(value + i), b = load(value + half + i);
                narrow(to + i, a * load(c + i) - b * load(s + i));
                narrow(to + half + i, b * load(c + half + i) + a * load(s + half + i));
            }
        }
        memcpy(v_cache + places[row] * kv_heads * dim, from, 2 * kv_heads * dim);
    }
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

/* One new token a sequence: `q` and `out` [rows, heads, dim]; `k`, `v` [blocks, block, kv_heads, dim]; `tables` [rows,
 * width] name each sequence's blocks. A row sees its last `window` tokens (0: all). Softmax as it goes, in blocks. */
void attend(const bf16 *q, const bf16 *k, const bf16 *v, const int32_t *tables, const int32_t *lengths, bf16 *out,
            int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t block, int64_t width, int64_t window,
            float scale, int threads) {
    int64_t group = heads / kv_heads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < rows * kv_heads; item++) {
        int64_t row = item / kv_heads, kv = item % kv_heads, length = lengths[row];
        const bf16 *query = q + (row * heads + kv * group) * dim;
        float sums[MAX_GROUP][MAX_DIM], weights[MAX_GROUP + 3][BLOCK], top[MAX_GROUP], total[MAX_GROUP];
        for (int64_t h = 0; h < group; h++) {
            top[h] = -INFINITY;
            total[h] = 0;
            memset(sums[h], 0, 4 * dim);
        }
        for (int64_t t = window && length > window ? length - window : 0; t < length;) {
            int64_t inside = t % block, count = block - inside;
            if (count > BLOCK) count = BLOCK;
            if (count > length - t) count = length - t;
            int64_t first = ((int64_t)tables[row * width + t / block] * block + inside) * kv_heads + kv;
            const bf16 *keys = k + first * dim, *values = v + first * dim;
            int64_t step = kv_heads * dim;
            for (int64_t h = 0; h < group; h++) {
                float best = top[h], *w = weights[h];
                for (int64_t i = 0; i < count; i++) {
                    w[i] = dot(query + h * dim, keys + i * step, dim) * scale;
                    if (w[i] > best) best = w[i];
                }
                for (int64_t i = count; i % LANES; i++) w[i] = -INFINITY;
                float shrink = expf(top[h] - best);
                vec added = {0};
                for (int64_t i = 0; i < count; i += LANES) {
                    vec p = exponential(load(w + i) - best);
                    for (int64_t j = count - i; j < LANES; j++) p[j] = 0;
                    store(w + i, p);
                    added += p;
                }
                total[h] = total[h] * shrink + sum(added);
                top[h] = best;
                if (shrink != 1.0f)
                    for (int64_t d = 0; d < dim; d += LANES) store(sums[h] + d, load(sums[h] + d) * shrink);
            }
            for (int64_t d = 0; d < dim; d += LANES)
                for (int64_t h = 0; h < group; h += 4) {
                    int64_t heads_left = group - h < 4 ? group - h : 4;
                    vec at[4];
                    for (int64_t j = 0; j < 4; j++) at[j] = load(sums[h + (j < heads_left ? j : 0)] + d);
                    for (int64_t i = 0; i < count; i++) {
                        vec value = widen(values + i * step + d);
                        for (int64_t j = 0; j < 4; j++) at[j] += weights[h + j][i] * value;
                    }
                    for (int64_t j = 0; j < heads_left; j++) store(sums[h + j] + d, at[j]);
                }
            t += count;
        }
        bf16 *to = out + (row * heads + kv * group) * dim;
        for (int64_t h = 0; h < group; h++)
            for (int64_t d = 0; d < dim; d += LANES)
                narrow(to + h * dim + d, total[h] > 0 ? load(sums[h] + d) / total[h] : splat(0));
    }
}

/* out[row, i] = act(x[row, i]) * x[row, width + i]; `kind` 0: SiLU, 1: GELU by its tanh form. */
void gated(const bf16 *x, bf16 *out, int64_t rows, int64_t width, int kind, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > 16384)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *gate = x + row * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += LANES) {
            vec g = widen(gate + i);
            vec e = kind ? 1.59576912f * (g + 0.044715f * g * g * g) : g;
            narrow(out + row * width + i, g / (1.0f + exponential(-e)) * widen(up + i));
        }
    }
}

/* out[row] += scale * (x[row] A^T) B^T by tiles {slot, first row, rows} of at most 16 rows; the pool's own layout. */
void lora(const bf16 *x, int64_t x_stride, const bf16 *a, const bf16 *b, const int32_t *offsets, const float *scales,
          const int64_t *columns, int64_t parts, int64_t max_rank, int64_t in, const int32_t *tiles, int64_t count,
          bf16 *out, int64_t out_stride, float *hidden, int threads) {
    int64_t ranks = parts * max_rank, width = columns[parts], pieces = (width + 511) / 512;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) collapse(2)
        for (int64_t n = 0; n < count; n++)
            for (int64_t begin = 0; begin < ranks; begin += 8) {
                const int32_t *tile = tiles + 3 * n;
                int64_t held = offsets[tile[0] * (parts + 1) + parts], end = begin + 8 < held ? begin + 8 : held;
                for (int64_t r = begin; r < end; r++) {
                    const bf16 *weights = a + (tile[0] * ranks + r) * in;
                    for (int64_t i = 0; i < tile[2]; i++)
                        hidden[(n * TILE + i) * ranks + r] = dot(weights, x + (tile[1] + i) * x_stride, in);
                }
            }
#pragma omp for schedule(static) collapse(2)
        for (int64_t n = 0; n < count; n++)
            for (int64_t piece = 0; piece < pieces; piece++) {
                const int32_t *tile = tiles + 3 * n, *held = offsets + tile[0] * (parts + 1);
                for (int64_t part = 0; part < parts; part++) {
                    int64_t first = columns[part], size = columns[part + 1] - first, rank = held[part + 1] - held[part];
                    int64_t begin = piece * 512 < first ? first : piece * 512;
                    int64_t end = piece * 512 + 512 < first + size ? piece * 512 + 512 : first + size;
                    if (begin >= end || !rank) continue;
                    const bf16 *weights = b + (tile[0] * width + first) * max_rank + begin - first;
                    for (int64_t i = 0; i < tile[2]; i++) {
                        const float *h = hidden + (n * TILE + i) * ranks + held[part];
                        bf16 *to = out + (tile[1] + i) * out_stride;
                        float scale = scales[tile[0] * parts + part];
                        int64_t c = begin;
                        for (; c + 4 * LANES <= end; c += 4 * LANES) {
                            vec added[4] = {{0}, {0}, {0}, {0}};
                            for (int64_t r = 0; r < rank; r++)
                                for (int j = 0; j < 4; j++)
                                    added[j] += h[r] * widen(weights + r * size + c - begin + j * LANES);
                            for (int j = 0; j < 4; j++)
                                narrow(to + c + j * LANES, widen(to + c + j * LANES) + scale * added[j]);
                        }
                        for (; c < end; c++) {
                            float added = 0;
                            for (int64_t r = 0; r < rank; r++) added += h[r] * widen_one(weights[r * size + c - begin]);
                            to[c] = narrow_one(widen_one(to[c]) + scale * added);
                        }
                    }
                }
            }
    }
}
