/* One step of generation on a CPU: one token of one sequence in, the logits of the next token out.

   Such a step is matrix times vector, so all that counts is how fast the weights stream past. They are used where
   they lie, [out, in] as nn.Linear stores them; rows are divided among the threads, and a whole step is one parallel
   region with five barriers a layer. A row's sum is made by one thread in one order: the number of threads changes no
   bit of the result.

   The model is Decoder (zero2hero/models/decoder.py) with RMSNorm, rotary positions and SwiGLU or ReLU^2. Weights, keys
   and values are fp32 or bf16 (this file includes itself once for each); everything between them is fp32.

   D width, H heads, G key/value heads, K head width, F inner width, V vocabulary, S slots of the cache. */

#ifndef REAL /* ---- what both precisions share; then the step, twice ----------------------------------------------- */

#include "fused.c" /* for bf16_load, bf16_store and exponential */
#undef REAL
#undef LOAD
#undef STORE
#undef NAME

typedef struct { /* pointers to fp32 or bf16; biases, the norms of queries and keys, and the gate may be null */
    const void *input_norm, *q, *k, *v, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *output, *output_bias;
    const void *post_norm, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
    void *keys, *values; /* [G, S, K] */
} block;

typedef struct {
    i64 layers, D, H, G, K, F, V, S, window; /* window: how many tokens a query sees, itself included */
    float eps, scale;
    const block *blocks;
    const void *embedding, *norm, *head;
    const float *cos, *sin;                       /* [positions, K / 2] */
    float *x, *queries, *mixed, *hidden, *scores; /* working memory: [D], [H, K], [H, K], [F], [H, S] */
} model;

enum { ROWS = 8 }; /* a thread takes this many rows of a matrix at a time */

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* p = softmax(p), n numbers. */
static void softmax(float *restrict p, i64 n) {
    float most = -INFINITY, sum = 0;
    for (i64 i = 0; i < n; i++) most = p[i] > most ? p[i] : most;
    for (i64 i = 0; i < n; i++) sum += p[i] = exponential(p[i] - most);
    for (i64 i = 0; i < n; i++) p[i] /= sum;
}

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

#else /* ---- the step ---------------------------------------------------------------------------------------------- */

/* y = w x + bias: w [rows, n], bias [rows] or null. Four rows at a time, so that their sums overlap. */
static void NAME(product)(const REAL *w, const REAL *bias, const float *restrict x, i64 n, i64 rows, float *restrict y) {
    i64 r = 0;
    for (; r + 4 <= rows; r += 4) {
        const REAL *restrict a = w + r * n, *restrict b = a + n, *restrict c = b + n, *restrict d = c + n;
        float sa = 0, sb = 0, sc = 0, sd = 0;
        for (i64 i = 0; i < n; i++) {
            sa += LOAD(a[i]) * x[i];
            sb += LOAD(b[i]) * x[i];
            sc += LOAD(c[i]) * x[i];
            sd += LOAD(d[i]) * x[i];
        }
        y[r] = sa, y[r + 1] = sb, y[r + 2] = sc, y[r + 3] = sd;
    }
    for (; r < rows; r++) {
        float sum = 0;
        for (i64 i = 0; i < n; i++) sum += LOAD(w[r * n + i]) * x[i];
        y[r] = sum;
    }
    if (bias)
        for (r = 0; r < rows; r++) y[r] += LOAD(bias[r]);
}

static void NAME(normalize)(const float *x, const REAL *restrict w, float *y, i64 n, float eps) {
    float squares = 0;
    for (i64 i = 0; i < n; i++) squares += x[i] * x[i];
    float scale = 1.0f / sqrtf(squares / n + eps);
    for (i64 i = 0; i < n; i++) y[i] = x[i] * scale * LOAD(w[i]);
}

/* One head of queries (0 <= h < H), keys (H <= h < H + G) or values from x [D]: project, normalize, rotate, put away. */
static void NAME(head)(const model *m, const block *b, const float *x, i64 h, i64 position) {
    i64 D = m->D, H = m->H, G = m->G, K = m->K, half = K / 2, first = h < H ? 0 : h < H + G ? H : H + G;
    const REAL *w = h < H ? b->q : h < H + G ? b->k : b->v, *bias = h < H ? b->q_bias : h < H + G ? b->k_bias : b->v_bias;
    float y[K];
    NAME(product)(w + (h - first) * K * D, bias ? bias + (h - first) * K : 0, x, D, K, y);
    if (h < H + G) {
        const float *cos = m->cos + position * half, *sin = m->sin + position * half;
        if (b->q_norm) NAME(normalize)(y, h < H ? b->q_norm : b->k_norm, y, K, m->eps);
        for (i64 i = 0; i < half; i++) {
            float one = y[i], two = y[half + i];
            y[i] = one * cos[i] - two * sin[i];
            y[half + i] = two * cos[i] + one * sin[i];
        }
    }
    if (h < H) {
        for (i64 i = 0; i < K; i++) m->queries[h * K + i] = y[i] * m->scale;
    } else {
        REAL *stored = (REAL *)(h < H + G ? b->keys : b->values) + ((h - first) * m->S + position) * K;
        for (i64 i = 0; i < K; i++) stored[i] = STORE(y[i]);
    }
}

/* Attention of query head h over the tokens it sees. */
static void NAME(attend)(const model *m, const block *b, i64 h, i64 position) {
    i64 K = m->K, seen = least(position + 1, m->window), group = h / (m->H / m->G);
    i64 start = (group * m->S + position + 1 - seen) * K;
    const REAL *keys = (const REAL *)b->keys + start, *restrict values = (const REAL *)b->values + start;
    float *restrict p = m->scores + h * m->S, *restrict y = m->mixed + h * K;
    NAME(product)(keys, 0, m->queries + h * K, K, seen, p);
    softmax(p, seen);
    for (i64 i = 0; i < K; i++) y[i] = 0;
    for (i64 s = 0; s < seen; s++)
        for (i64 i = 0; i < K; i++) y[i] += p[s] * LOAD(values[s * K + i]);
}

/* The feed-forward's inner numbers r, ..., r + n - 1: silu(gate) up, or ReLU^2. */
static void NAME(inner)(const model *m, const block *b, const float *x, i64 r, i64 n) {
    const REAL *up = b->up, *gate = b->gate, *up_bias = b->up_bias, *gate_bias = b->gate_bias;
    float *restrict y = m->hidden + r, g[ROWS];
    NAME(product)(up + r * m->D, up_bias ? up_bias + r : 0, x, m->D, n, y);
    if (gate) {
        NAME(product)(gate + r * m->D, gate_bias ? gate_bias + r : 0, x, m->D, n, g);
        for (i64 i = 0; i < n; i++) y[i] *= g[i] / (1.0f + exponential(-g[i]));
    } else {
        for (i64 i = 0; i < n; i++) y[i] = y[i] > 0 ? y[i] * y[i] : 0;
    }
}

/* x[r], ..., x[r + n - 1] += w y + bias: what a block adds to the residual stream. */
static void NAME(add)(float *x, const REAL *w, const REAL *bias, const float *y, i64 width, i64 r, i64 n) {
    float sums[ROWS];
    NAME(product)(w + r * width, bias ? bias + r : 0, y, width, n, sums);
    for (i64 i = 0; i < n; i++) x[r + i] += sums[i];
}

/* Read token `id` at `position`: its keys and values enter the cache, logits [V] are those of the next token. */
void NAME(step)(const model *m, i64 id, i64 position, float *logits, i64 threads) {
    i64 D = m->D, HK = m->H * m->K, F = m->F, V = m->V;
    for (i64 i = 0; i < D; i++) m->x[i] = LOAD(((const REAL *)m->embedding)[id * D + i]);
#pragma omp parallel num_threads((int)threads)
    {
        float x[D]; /* normalized, by every thread for itself: that is cheaper than to wait for one */
        for (const block *b = m->blocks; b < m->blocks + m->layers; b++) {
            NAME(normalize)(m->x, b->input_norm, x, D, m->eps);
#pragma omp for schedule(static)
            for (i64 h = 0; h < m->H + 2 * m->G; h++) NAME(head)(m, b, x, h, position);
#pragma omp for schedule(static)
            for (i64 h = 0; h < m->H; h++) NAME(attend)(m, b, h, position);
#pragma omp for schedule(static)
            for (i64 r = 0; r < D; r += ROWS) NAME(add)(m->x, b->output, b->output_bias, m->mixed, HK, r, least(ROWS, D - r));
            NAME(normalize)(m->x, b->post_norm, x, D, m->eps);
#pragma omp for schedule(static)
            for (i64 r = 0; r < F; r += ROWS) NAME(inner)(m, b, x, r, least(ROWS, F - r));
#pragma omp for schedule(static)
            for (i64 r = 0; r < D; r += ROWS) NAME(add)(m->x, b->down, b->down_bias, m->hidden, F, r, least(ROWS, D - r));
        }
        NAME(normalize)(m->x, m->norm, x, D, m->eps);
#pragma omp for schedule(static)
        for (i64 r = 0; r < V; r += ROWS)
            NAME(product)((const REAL *)m->head + r * D, 0, x, D, least(ROWS, V - r), logits + r);
    }
}

#endif
