/* What a decode step does between its products, fused: bf16 values, fp32 arithmetic, rows independent of each other. */

#include "native.h"

#define MAX_DIM 512
#define MAX_GROUP 16
#define BLOCK 64

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

/* Queries and keys of `qkv` [rows, heads + 2 kv_heads, dim] normalised (if there is a norm) and rotated; queries to `q`,
 * keys and values to their places in the cache. */
void rotate_rows(const bf16 *qkv, int64_t stride, const attention *to, const sequences *at, bf16 *q) {
    int64_t dim = to->dim, half = dim / 2, heads = to->heads, kv_heads = to->kv_heads;
#pragma omp for
    for (int64_t row = 0; row < at->rows; row++) {
        const bf16 *from = qkv + row * stride;
        const float *c = at->cosine + row * dim, *s = at->sine + row * dim;
        for (int64_t head = 0; head < heads + kv_heads; head++, from += dim) {
            bf16 *out = head < heads ? q + (row * heads + head) * dim
                                     : to->k + (at->places[row] * kv_heads + head - heads) * dim;
            float value[MAX_DIM], factor = 1.0f;
            vec total = {0};
            for (int64_t i = 0; i < dim; i += LANES) {
                vec v = widen(from + i);
                total += v * v;
                store(value + i, v);
            }
            if (to->norm) {
                factor = 1.0f / sqrtf(sum(total) / (float)dim + to->eps);
                for (int64_t i = 0; i < dim; i += LANES)
                    store(value + i, load(value + i) * factor * load(to->norm + head * dim + i));
            }
            for (int64_t i = 0; i < half; i += LANES) {
                vec a = load(value + i), b = load(value + half + i);
                narrow(out + i, a * load(c + i) - b * load(s + i));
                narrow(out + half + i, b * load(c + half + i) + a * load(s + half + i));
            }
        }
        memcpy(to->v + at->places[row] * kv_heads * dim, from, 2 * kv_heads * dim);
    }
}

void rotate(const bf16 *qkv, int64_t stride, const attention *to, const sequences *at, bf16 *q, int threads) {
#pragma omp parallel num_threads(threads) if (at->rows * (to->heads + to->kv_heads) * to->dim > 32768)
    rotate_rows(qkv, stride, to, at, q);
}

/* One new token a sequence: `q` and `out` [rows, heads, dim]; the cache [blocks, block, kv_heads, dim]; `tables` [rows,
 * width] name each sequence's blocks. A row sees its last `window` tokens (0: all). Softmax as it goes, in blocks. */
void attend_rows(const bf16 *q, const attention *to, const sequences *at, bf16 *out, int64_t stride) {
    int64_t heads = to->heads, kv_heads = to->kv_heads, dim = to->dim, block = to->block, window = to->window;
    int64_t group = heads / kv_heads;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < at->rows * kv_heads; item++) {
        int64_t row = item / kv_heads, kv = item % kv_heads, length = at->lengths[row];
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
            int64_t first = ((int64_t)at->tables[row * at->width + t / block] * block + inside) * kv_heads + kv;
            const bf16 *keys = to->k + first * dim, *values = to->v + first * dim;
            int64_t step = kv_heads * dim;
            for (int64_t h = 0; h < group; h++) {
                float best = top[h], *w = weights[h];
                for (int64_t i = 0; i < count; i++) {
                    w[i] = dot(query + h * dim, keys + i * step, dim) * to->scale;
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
                    vec sum4[4];
                    for (int64_t j = 0; j < 4; j++) sum4[j] = load(sums[h + (j < heads_left ? j : 0)] + d);
                    for (int64_t i = 0; i < count; i++) {
                        vec value = widen(values + i * step + d);
                        for (int64_t j = 0; j < 4; j++) sum4[j] += weights[h + j][i] * value;
                    }
                    for (int64_t j = 0; j < heads_left; j++) store(sums[h + j] + d, sum4[j]);
                }
            t += count;
        }
        bf16 *into = out + row * stride + kv * group * dim;
        for (int64_t h = 0; h < group; h++)
            for (int64_t d = 0; d < dim; d += LANES)
                narrow(into + h * dim + d, total[h] > 0 ? load(sums[h] + d) / total[h] : splat(0));
    }
}

void attend(const bf16 *q, const attention *to, const sequences *at, bf16 *out, int threads) {
#pragma omp parallel num_threads(threads)
    attend_rows(q, to, at, out, to->heads * to->dim);
}

/* out[row, i] = act(x[row, i]) * x[row, width + i]; `kind` 0: SiLU, 1: GELU by its tanh form. */
void gated_rows(const bf16 *x, bf16 *out, int64_t stride, int64_t rows, int64_t width, int kind) {
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *gate = x + row * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += LANES) {
            vec g = widen(gate + i);
            vec e = kind ? 1.59576912f * (g + 0.044715f * g * g * g) : g;
            narrow(out + row * stride + i, g / (1.0f + exponential(-e)) * widen(up + i));
        }
    }
}

void gated(const bf16 *x, bf16 *out, int64_t rows, int64_t width, int kind, int threads) {
#pragma omp parallel num_threads(threads) if (rows * width > 16384)
    gated_rows(x, out, width, rows, width, kind);
}

/* Two rows of weights by two rows of x; every sum has its own accumulator. */
static inline void dots(const bf16 *a, const bf16 *b, const bf16 *x, const bf16 *y, int64_t n, float found[4]) {
#ifdef __AVX512BF16__
    __m512 ax = _mm512_setzero_ps(), ay = ax, bx = ax, by = ax;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __builtin_prefetch(a + i + 8192, 0, 2); /* the weights of later ranks lie behind these */
        __builtin_prefetch(b + i + 8192, 0, 2);
        __m512bh va = (__m512bh)_mm512_loadu_si512(a + i), vb = (__m512bh)_mm512_loadu_si512(b + i);
        __m512bh vx = (__m512bh)_mm512_loadu_si512(x + i), vy = (__m512bh)_mm512_loadu_si512(y + i);
        ax = _mm512_dpbf16_ps(ax, va, vx);
        ay = _mm512_dpbf16_ps(ay, va, vy);
        bx = _mm512_dpbf16_ps(bx, vb, vx);
        by = _mm512_dpbf16_ps(by, vb, vy);
    }
    found[0] = _mm512_reduce_add_ps(ax) + dot(a + i, x + i, n - i);
    found[1] = _mm512_reduce_add_ps(ay) + dot(a + i, y + i, n - i);
    found[2] = _mm512_reduce_add_ps(bx) + dot(b + i, x + i, n - i);
    found[3] = _mm512_reduce_add_ps(by) + dot(b + i, y + i, n - i);
#else
    found[0] = dot(a, x, n), found[1] = dot(a, y, n), found[2] = dot(b, x, n), found[3] = dot(b, y, n);
#endif
}

/* hidden = x A^T, a piece of work being eight ranks of a tile. */
void shrink_rows(const bf16 *x, int64_t x_stride, const adapters *from, const tiles *tile) {
    int64_t ranks = from->parts * from->max_rank, in = from->in;
#pragma omp for schedule(static) collapse(2)
    for (int64_t n = 0; n < tile->count; n++)
        for (int64_t begin = 0; begin < ranks; begin += 8) {
            const int32_t *t = tile->at + 3 * n;
            int64_t held = from->offsets[t[0] * (from->parts + 1) + from->parts];
            int64_t end = begin + 8 < held ? begin + 8 : held;
            for (int64_t r = begin; r < end; r += 2)
                for (int64_t i = 0; i < t[2]; i += 2) {
                    int64_t more = r + 1 < end, below = i + 1 < t[2];
                    const bf16 *a = from->a + (t[0] * ranks + r) * in, *row = x + (t[1] + i) * x_stride;
                    float found[4], *to = tile->hidden + (n * TILE + i) * ranks + r;
                    dots(a, a + more * in, row, row + below * x_stride, in, found);
                    to[0] = found[0];
                    if (below) to[ranks] = found[1];
                    if (more) to[1] = found[2];
                    if (more && below) to[ranks + 1] = found[3];
                }
        }
}

#define STRETCH (8 * LANES)

/* to[c] += scale * sum of h[r] * b[r, c] over a stretch of columns, for two rows. */
static inline void add_stretch(const bf16 *b, int64_t size, int64_t rank, const float *h, const float *g, float scale,
                               bf16 *to, bf16 *and) {
    vec one[8] = {{0}}, two[8] = {{0}};
    for (int64_t r = 0; r < rank; r++)
        for (int j = 0; j < 8; j++) {
            const bf16 *from = b + r * size + j * LANES;
            if (j % 2 == 0) __builtin_prefetch(from + STRETCH);
            vec value = widen(from);
            one[j] += h[r] * value;
            two[j] += g[r] * value;
        }
    for (int j = 0; j < 8; j++) {
        if (and != to) narrow(and + j * LANES, widen(and + j * LANES) + scale * two[j]);
        narrow(to + j * LANES, widen(to + j * LANES) + scale * one[j]);
    }
}

/* out += scale * hidden B^T, a piece of work being 512 columns of a tile. */
void expand_rows(const adapters *from, const tiles *tile, bf16 *out, int64_t out_stride) {
    int64_t parts = from->parts, ranks = parts * from->max_rank, width = from->columns[parts];
    int64_t pieces = (width + 511) / 512;
#pragma omp for schedule(static) collapse(2)
    for (int64_t n = 0; n < tile->count; n++)
        for (int64_t piece = 0; piece < pieces; piece++) {
            const int32_t *t = tile->at + 3 * n, *held = from->offsets + t[0] * (parts + 1);
            for (int64_t part = 0; part < parts; part++) {
                int64_t first = from->columns[part], size = from->columns[part + 1] - first;
                int64_t begin = piece * 512 < first ? first : piece * 512, rank = held[part + 1] - held[part];
                int64_t end = piece * 512 + 512 < first + size ? piece * 512 + 512 : first + size;
                if (begin >= end || !rank) continue;
                const bf16 *weights = from->b + (t[0] * width + first) * from->max_rank - first;
                float scale = from->scales[t[0] * parts + part];
                int64_t c = begin;
                for (; c + STRETCH <= end; c += STRETCH)
                    for (int64_t i = 0; i < t[2]; i += 2) {
                        int64_t below = i + 1 < t[2];
                        const float *h = tile->hidden + (n * TILE + i) * ranks + held[part];
                        bf16 *to = out + (t[1] + i) * out_stride + c;
                        add_stretch(weights + c, size, rank, h, h + below * ranks, scale, to, to + below * out_stride);
                    }
                for (int64_t i = 0; i < t[2]; i++)
                    for (int64_t left = c; left < end; left++) {
                        const float *h = tile->hidden + (n * TILE + i) * ranks + held[part];
                        bf16 *to = out + (t[1] + i) * out_stride + left;
                        float added = 0;
                        for (int64_t r = 0; r < rank; r++) added += h[r] * widen_one(weights[r * size + left]);
                        *to = narrow_one(widen_one(*to) + scale * added);
                    }
            }
        }
}

/* out[row] += scale * (x[row] A^T) B^T for the rows of every tile. */
void lora(const bf16 *x, int64_t x_stride, const adapters *from, const tiles *tile, bf16 *out, int64_t out_stride,
          int threads) {
#pragma omp parallel num_threads(threads)
    {
        shrink_rows(x, x_stride, from, tile);
        expand_rows(from, tile, out, out_stride);
    }
}
