/* The elementwise halves of a training step on a CPU, each in one pass over memory.

   Between two matrix products a Transformer normalizes, rotates, gates and takes softmaxes. As single tensor operations
   each of these reads and writes its operands several times, and memory, not arithmetic, is what a CPU runs out of. A
   kernel here keeps a row in the core's cache until it is done. The definitions are the tensor operations beside which
   each kernel is called (zero2hero/nn); these are the same formulas.

   Every kernel exists for fp32 and bf16 (this file includes itself once for each) and computes in fp32. Rows are
   divided among the threads in fixed parts and sums are made in a fixed order: same threads, same result. The loops are
   plain; the compiler makes vector instructions of them. */

#ifndef REAL /* ---- what both precisions share; then the kernels, twice -------------------------------------------- */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef union {
    float f;
    uint32_t u;
    int32_t i;
} bits;

static inline float bf16_load(uint16_t x) { return (bits){.u = (uint32_t)x << 16}.f; }

static inline uint16_t bf16_store(float x) { /* to the nearest, ties to even; not a number stays so */
    uint32_t u = (bits){.f = x}.u;
    uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    return (uint16_t)((u & 0x7FFFFFFF) > 0x7F800000 ? u >> 16 | 0x40 : rounded);
}

/* e^x = 2^n e^r with r = x - n ln 2 in [-0.35, 0.35] and a polynomial for e^r: two units in the last place. */
static inline float exponential(float x) {
    float clamped = x < -88.0f ? -88.0f : x; /* there n = -127, whose power below is zero */
    clamped = clamped > 88.0f ? 88.0f : clamped;
    int32_t n = (int32_t)rintf(clamped * 1.44269504f);
    float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * (bits){.i = (n + 127) << 23}.f;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

#define ROWS_IN_PARALLEL _Pragma("omp parallel for num_threads((int)threads) schedule(static)")
#define WHOLE_VECTORS(n, most) ((n + 31) / 32 * 32 < most ? (n + 31) / 32 * 32 : most) /* a rest goes one by one */
#define SIMD_MAXIMUM _Pragma("omp simd reduction(max : most)")

#define REAL float
#define LOAD(x) (x)
#define STORE(x) (x)
#define NAME(kernel) kernel##_fp32
#include __FILE__
#undef REAL
#undef LOAD
#undef STORE
#undef NAME

#define REAL uint16_t
#define LOAD(x) bf16_load(x)
#define STORE(x) bf16_store(x)
#define NAME(kernel) kernel##_bf16
#include __FILE__

#else /* ---- the kernels ------------------------------------------------------------------------------------------- */

/* RMSNorm: y = w x r with r = 1 / sqrt(mean(x^2) + eps). x, y [rows, width]; r [rows]. */
void NAME(rms_norm)(const REAL *x, const REAL *w, REAL *y, float *r, i64 rows, i64 width, float eps, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const REAL *restrict xs = x + row * width, *restrict ws = w;
        REAL *restrict ys = y + row * width;
        float squares = 0;
        for (i64 i = 0; i < width; i++) squares += LOAD(xs[i]) * LOAD(xs[i]);
        float scale = r[row] = 1.0f / sqrtf(squares / width + eps);
        for (i64 i = 0; i < width; i++) ys[i] = STORE(LOAD(xs[i]) * scale * LOAD(ws[i]));
    }
}

/* Its gradient: with h = w dy, dx = r (h - x r mean(h x r)); dw [threads, width] gets each part's sum of dy x r. */
void NAME(rms_norm_backward)(const REAL *x, const REAL *w, const float *r, const REAL *dy, REAL *dx, float *dw,
                             i64 rows, i64 width, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 part = 0; part < threads; part++) {
        const REAL *restrict ws = w;
        float *restrict sums = dw + part * width;
        for (i64 i = 0; i < width; i++) sums[i] = 0;
        for (i64 row = rows * part / threads; row < rows * (part + 1) / threads; row++) {
            const REAL *restrict xs = x + row * width, *restrict dys = dy + row * width;
            REAL *restrict dxs = dx + row * width;
            float scale = r[row], mean = 0;
            for (i64 i = 0; i < width; i++) {
                float product = LOAD(dys[i]) * LOAD(xs[i]) * scale;
                mean += product * LOAD(ws[i]);
                sums[i] += product;
            }
            mean *= scale / width;
            for (i64 i = 0; i < width; i++)
                dxs[i] = STORE(scale * (LOAD(dys[i]) * LOAD(ws[i]) - LOAD(xs[i]) * mean));
        }
    }
}

/* One head of the kernel below; inlined with `half` a constant, so that the loop becomes a few vector instructions. */
static inline void NAME(rotate_head)(const REAL *restrict x, REAL *restrict y, const REAL *restrict cos,
                                     const REAL *restrict sin, i64 half, float direction) {
    for (i64 i = 0; i < half; i++) {
        float first = LOAD(x[i]), second = LOAD(x[half + i]), turn = LOAD(sin[i]) * direction;
        y[i] = STORE(first * LOAD(cos[i]) - second * turn);
        y[half + i] = STORE(second * LOAD(cos[i]) + first * turn);
    }
}

/* Rotary positions: turn each pair (x[i], x[i + K/2]) by its angle, forth (direction 1) or back (-1), or only copy (0).
   x and y are [B, T, H, K] with any strides but the last; cos and sin [B, T, K/2], also strided. */
void NAME(rotate)(const REAL *x, i64 xb, i64 xt, i64 xh, REAL *y, i64 yb, i64 yt, i64 yh, const REAL *cos,
                  const REAL *sin, i64 ab, i64 at, i64 B, i64 T, i64 H, i64 K, float direction, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 row = 0; row < B * T; row++) {
        i64 b = row / T, t = row % T;
        const REAL *c = cos + b * ab + t * at, *s = sin + b * ab + t * at;
        for (i64 h = 0; h < H; h++) {
            const REAL *xs = x + b * xb + t * xt + h * xh;
            REAL *ys = y + b * yb + t * yt + h * yh;
            if (direction == 0)
                memcpy(ys, xs, K * sizeof(REAL));
            else if (K == 32)
                NAME(rotate_head)(xs, ys, c, s, 16, direction);
            else if (K == 64)
                NAME(rotate_head)(xs, ys, c, s, 32, direction);
            else if (K == 128)
                NAME(rotate_head)(xs, ys, c, s, 64, direction);
            else
                NAME(rotate_head)(xs, ys, c, s, K / 2, direction);
        }
    }
}

/* SwiGLU: y = silu(gate) up. y [rows, F]; rows of gate and up are `stride` apart. */
void NAME(silu_product)(const REAL *gate, const REAL *up, i64 stride, REAL *y, i64 rows, i64 F, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const REAL *restrict gs = gate + row * stride, *restrict us = up + row * stride;
        REAL *restrict ys = y + row * F;
        for (i64 i = 0; i < F; i++) ys[i] = STORE(LOAD(gs[i]) * sigmoid(LOAD(gs[i])) * LOAD(us[i]));
    }
}

/* Its gradient: dgate = dy up s (1 + gate (1 - s)) and dup = dy gate s, with s = sigmoid(gate). */
void NAME(silu_product_backward)(const REAL *gate, const REAL *up, i64 stride, const REAL *dy, REAL *dgate, REAL *dup,
                                 i64 dstride, i64 rows, i64 F, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const REAL *restrict gs = gate + row * stride, *restrict us = up + row * stride, *restrict dys = dy + row * F;
        REAL *restrict dgs = dgate + row * dstride, *restrict dus = dup + row * dstride;
        for (i64 i = 0; i < F; i++) {
            float g = LOAD(gs[i]), d = LOAD(dys[i]), s = sigmoid(g);
            dgs[i] = STORE(d * LOAD(us[i]) * s * (1.0f + g * (1.0f - s)));
            dus[i] = STORE(d * g * s);
        }
    }
}

/* ReLU squared, y = max(x, 0)^2, and its gradient, dx = 2 max(x, 0) dy. All [rows, F]. */
void NAME(relu2)(const REAL *x, REAL *y, i64 rows, i64 F, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const REAL *restrict xs = x + row * F;
        REAL *restrict ys = y + row * F;
        for (i64 i = 0; i < F; i++) ys[i] = STORE(LOAD(xs[i]) > 0 ? LOAD(xs[i]) * LOAD(xs[i]) : 0.0f);
    }
}

void NAME(relu2_backward)(const REAL *x, const REAL *dy, REAL *dx, i64 rows, i64 F, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 row = 0; row < rows; row++) {
        const REAL *restrict xs = x + row * F, *restrict dys = dy + row * F;
        REAL *restrict dxs = dx + row * F;
        for (i64 i = 0; i < F; i++) dxs[i] = STORE((LOAD(xs[i]) > 0 ? 2.0f * LOAD(xs[i]) : 0.0f) * LOAD(dys[i]));
    }
}

/* total += part, in fp32: gradients of many micro-batches. */
void NAME(accumulate)(float *total, const REAL *part, i64 count, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 i = 0; i < count; i++) total[i] += LOAD(part[i]);
}

/* momentum += (1 - beta) (grad - momentum), and ahead becomes it or, with `nesterov`, goes one more such step. */
void NAME(momentum)(const float *grad, float *momentum, REAL *ahead, i64 count, float beta, i64 nesterov, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 i = 0; i < count; i++) {
        float m = momentum[i] += (1 - beta) * (grad[i] - momentum[i]);
        ahead[i] = STORE(nesterov ? grad[i] + beta * (m - grad[i]) : m);
    }
}

/* weight = keep weight - rate update. */
void NAME(update)(float *weight, const REAL *update, i64 count, float keep, float rate, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 i = 0; i < count; i++) weight[i] = keep * weight[i] - rate * LOAD(update[i]);
}

/* log(sum(exp(scale x))) of n numbers. */
static inline float NAME(log_sum_exp)(const REAL *restrict x, i64 n, float scale) {
    float most = -INFINITY, sum = 0;
    SIMD_MAXIMUM
    for (i64 i = 0; i < n; i++) {
        float value = LOAD(x[i]) * scale;
        most = value > most ? value : most;
    }
    for (i64 i = 0; i < n; i++) sum += exponential(LOAD(x[i]) * scale - most);
    return most + logf(sum);
}

/* Attention's weights, in the scores' memory: softmax(scale x) of each row over the keys it may see. x [B, H, T, S].
   Those are the first t + 1 when `causal`, or what allowed [B or 1, T, S] says (`ab` apart), or all. */
void NAME(softmax)(REAL *x, const uint8_t *allowed, i64 ab, i64 causal, i64 B, i64 H, i64 T, i64 S, float scale,
                   i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 row = 0; row < B * H * T; row++) {
        i64 t = row % T, n = causal ? WHOLE_VECTORS(t + 1, S) : S;
        REAL *restrict xs = x + row * S;
        if (causal) {
            for (i64 i = t + 1; i < n; i++) xs[i] = STORE(-INFINITY);
        } else if (allowed) {
            const uint8_t *restrict seen = allowed + row / (H * T) * ab + t * S;
            for (i64 i = 0; i < n; i++) xs[i] = seen[i] ? xs[i] : STORE(-INFINITY);
        }
        float total = NAME(log_sum_exp)(xs, n, scale);
        for (i64 i = 0; i < n; i++) xs[i] = STORE(exponential(LOAD(xs[i]) * scale - total));
        memset(xs + n, 0, (S - n) * sizeof(REAL));
    }
}

/* Its gradient, in the memory of dy: dx = scale y (dy - sum(y dy)). y, dy [rows, S], row r of them at time r % T. */
void NAME(softmax_backward)(const REAL *y, REAL *dy, i64 causal, i64 rows, i64 T, i64 S, float scale, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 row = 0; row < rows; row++) {
        i64 n = causal ? WHOLE_VECTORS(row % T + 1, S) : S;
        const REAL *restrict ys = y + row * S;
        REAL *restrict dys = dy + row * S;
        float sum = 0;
        for (i64 i = 0; i < n; i++) sum += LOAD(ys[i]) * LOAD(dys[i]);
        for (i64 i = 0; i < n; i++) dys[i] = STORE(scale * LOAD(ys[i]) * (LOAD(dys[i]) - sum));
        memset(dys + n, 0, (S - n) * sizeof(REAL));
    }
}

/* The target's log-probability under softmax(scale x) for each row of x [rows, V]. With `gradient` each row becomes
   weight (softmax(scale x) - onehot(target)); without `weights` they are 1. */
void NAME(log_likelihood)(REAL *x, const i64 *targets, float *logprobs, i64 gradient, const float *weights, i64 rows,
                          i64 V, float scale, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 row = 0; row < rows; row++) {
        REAL *restrict xs = x + row * V;
        float total = NAME(log_sum_exp)(xs, V, scale), weight = weights ? weights[row] : 1.0f;
        logprobs[row] = LOAD(xs[targets[row]]) * scale - total;
        if (!gradient) continue;
        for (i64 i = 0; i < V; i++) xs[i] = STORE(weight * exponential(LOAD(xs[i]) * scale - total));
        xs[targets[row]] = STORE(weight * (expf(logprobs[row]) - 1.0f));
    }
}

/* NF4 (nn/nf4.py): of each share x r, how many of the 15 bounds are below it; two such numbers to a byte, the first one
   in the high half. x [blocks, 64], r [blocks], codes [blocks, 32]. */
void NAME(nf4_encode)(const REAL *x, const float *r, const float *bounds, uint8_t *codes, i64 blocks, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 block = 0; block < blocks; block++) {
        const REAL *restrict xs = x + block * 64;
        uint8_t *restrict bytes = codes + block * 32;
        int32_t below[64] = {0};
        for (i64 j = 0; j < 15; j++)
            for (i64 i = 0; i < 64; i++) below[i] += LOAD(xs[i]) * r[block] > bounds[j];
        for (i64 i = 0; i < 32; i++) bytes[i] = below[2 * i] << 4 | below[2 * i + 1];
    }
}

/* And back: y = value[code] scale. y [n], codes [n / 2], scales [n / 64] (rounded up), values [16]. */
void NAME(nf4_decode)(const uint8_t *codes, const float *scales, const float *values, REAL *y, i64 n, i64 threads) {
    ROWS_IN_PARALLEL
    for (i64 start = 0; start < n; start += 64) {
        const uint8_t *restrict bytes = codes + start / 2;
        REAL *restrict ys = y + start, scaled[16];
        for (i64 i = 0; i < 16; i++) scaled[i] = STORE(values[i] * scales[start / 64]);
        i64 pairs = (n - start < 64 ? n - start : 64) / 2;
        for (i64 i = 0; i < pairs; i++) {
            ys[2 * i] = scaled[bytes[i] >> 4];
            ys[2 * i + 1] = scaled[bytes[i] & 15];
        }
        if (n - start < 64 && n % 2) ys[2 * pairs] = scaled[bytes[pairs] >> 4];
    }
}

#endif
