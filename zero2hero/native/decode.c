/* One step of generation on a CPU: the next tokens of many texts in, the logits of what follows them out.

   For few tokens such a step is matrix times vector, and all that counts is how fast the weights stream past; for many
   it is arithmetic. So weights are used where they lie, [out, in] as nn.Linear stores them, and each that is loaded
   meets several tokens in registers. Rows of weights are divided among the threads, and a whole step is one parallel
   region with seven barriers a layer.

   Every sum is made in one order that depends on nothing but its own terms. So neither the number of threads nor what
   else is in the batch changes a bit of a text's result. Keys and values lie in pages of 16 tokens, of which each text
   has a list (zero2hero/generate/pages.py). A token sees what earlier tokens of the same step have put there: a
   prompt is read like everything else, as many tokens at once.

   The model is Decoder (zero2hero/models/decoder.py) with RMSNorm, rotary positions and SwiGLU or ReLU^2. Weights, keys
   and values are fp32 or bf16 (this file includes itself once for each); everything between them is fp32.

   N tokens, D width, H heads, G key/value heads, K head width, F inner width, V vocabulary, S slots of a text. */

#ifndef REAL /* ---- what both precisions share; then the step, twice ----------------------------------------------- */

extern int omp_get_thread_num(void);

#include "fused.c" /* for bf16_load, bf16_store and exponential */
#undef REAL
#undef LOAD
#undef STORE
#undef NAME

typedef struct { /* pointers to fp32 or bf16; biases, the norms of queries and keys, and the gate may be null */
    const void *input_norm, *q, *k, *v, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *output, *output_bias;
    const void *post_norm, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
    void *keys, *values; /* [pages, G, K, 16] and [pages, G, 16, K] */
} block;

typedef struct {
    i64 layers, D, H, G, K, F, V, window; /* window: how many tokens a query sees, itself included */
    float eps, scale;
    const block *blocks;
    const void *norm, *head;
    const float *cos, *sin; /* [positions, K / 2] */
} model;

typedef struct {
    i64 N, wanted, table_width, scratch_size;
    const i64 *positions, *texts, *rows;          /* [N]; [N] the text of each; [wanted] tokens whose logits are wanted */
    const int32_t *tables;                        /* [texts, table_width] the pages of each text */
    float *x;                                     /* [N, D] the tokens' embeddings; overwritten */
    float *normalized, *queries, *mixed, *hidden; /* working memory: [N, D], [N, H, K], [N, H, K], [N, F] */
    float *scratch;                               /* [threads, scratch_size]: S, and N times K and ROWS */
    float *logits;                                /* [wanted, V] */
} batch;

enum { PAGE = 16, ROWS = 8 }; /* a thread takes this many rows of a matrix at a time */
#ifdef __AVX512F__
enum { TOKENS = 6 }; /* so many tokens meet four rows of weights in registers */
#else
enum { TOKENS = 2 };
#endif

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef float half_vec __attribute__((vector_size(32)));
typedef float quarter_vec __attribute__((vector_size(16)));

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

static inline vec vec_fp32(const float *p) { return *(const vec *)p; }
static inline vec vec_bf16(const uint16_t *p) { return (vec)(__builtin_convertvector(*(const halves *)p, words) << 16); }

static inline float sum_of(vec v) {
    union { vec v; half_vec h[2]; } a = {v};
    union { half_vec h; quarter_vec q[2]; } b = {a.h[0] + a.h[1]};
    quarter_vec c = b.q[0] + b.q[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

/* p = softmax(p), n numbers. */
static void softmax(float *restrict p, i64 n) {
    float most = -INFINITY, sum = 0;
    for (i64 i = 0; i < n; i++) most = p[i] > most ? p[i] : most;
    for (i64 i = 0; i < n; i++) sum += p[i] = exponential(p[i] - most);
    for (i64 i = 0; i < n; i++) p[i] /= sum;
}

#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))

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

/* y[t, r] = w[r] . x[t] for R rows of weights [R, n] and T rows of x [T, n], constants both. y's rows are `apart`. */
INLINE void NAME(tile)(const int R, const int T, const REAL *w, const float *x, i64 n, float *y, i64 apart) {
    vec sums[4][8], a[4];
    i64 i = 0;
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) sums[r][t] = (vec){0};
    for (; i + 16 <= n; i += 16) {
        UNROLL for (int r = 0; r < R; r++) {
            a[r] = NAME(vec)(w + r * n + i);
            __builtin_prefetch(w + (R + r) * n + i); /* the next rows, early enough */
        }
        UNROLL for (int t = 0; t < T; t++) {
            vec b = vec_fp32(x + t * n + i);
            UNROLL for (int r = 0; r < R; r++) sums[r][t] += a[r] * b;
        }
    }
    if (i < n) { /* the rest, filled up with zeros */
        REAL rest_w[4][16] = {{0}};
        float rest_x[8][16] = {{0}};
        for (int r = 0; r < R; r++) memcpy(rest_w[r], w + r * n + i, (n - i) * sizeof(REAL));
        for (int t = 0; t < T; t++) memcpy(rest_x[t], x + t * n + i, (n - i) * sizeof(float));
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) sums[r][t] += NAME(vec)(rest_w[r]) * vec_fp32(rest_x[t]);
    }
    UNROLL for (int t = 0; t < T; t++) UNROLL for (int r = 0; r < R; r++) y[t * apart + r] = sum_of(sums[r][t]);
}

/* y[t, r] = w[r] . x[t] + bias[r]: w [rows, n], x [N, n], bias [rows] or null; y's rows are `apart`. */
static void NAME(product)(const REAL *w, const REAL *bias, const float *x, i64 n, i64 rows, i64 N, float *y, i64 apart) {
    for (i64 r = 0; r < rows;) {
        const REAL *at = w + r * n;
        float *out = y + r;
        i64 t = 0, R = rows - r >= 4 ? 4 : 1;
        if (R == 4) {
            for (; t + TOKENS <= N; t += TOKENS) NAME(tile)(4, TOKENS, at, x + t * n, n, out + t * apart, apart);
            for (; t + 2 <= N; t += 2) NAME(tile)(4, 2, at, x + t * n, n, out + t * apart, apart);
            if (t < N) NAME(tile)(4, 1, at, x + t * n, n, out + t * apart, apart);
        } else
            for (; t < N; t++) NAME(tile)(1, 1, at, x + t * n, n, out + t * apart, apart);
        r += R;
    }
    if (bias)
        for (i64 t = 0; t < N; t++)
            for (i64 r = 0; r < rows; r++) y[t * apart + r] += LOAD(bias[r]);
}

static void NAME(normalize)(const float *x, const REAL *restrict w, float *y, i64 n, float eps) {
    float squares = 0;
    for (i64 i = 0; i < n; i++) squares += x[i] * x[i];
    float scale = 1.0f / sqrtf(squares / n + eps);
    for (i64 i = 0; i < n; i++) y[i] = x[i] * scale * LOAD(w[i]);
}

/* One head of queries (0 <= h < H), keys (H <= h < H + G) or values of all tokens: project, normalize, rotate, put away. */
static void NAME(head)(const model *m, const block *b, const batch *s, i64 h, float *scratch) {
    i64 D = m->D, H = m->H, G = m->G, K = m->K, half = K / 2, first = h < H ? 0 : h < H + G ? H : H + G;
    const REAL *w = h < H ? b->q : h < H + G ? b->k : b->v, *bias = h < H ? b->q_bias : h < H + G ? b->k_bias : b->v_bias;
    h -= first;
    NAME(product)(w + h * K * D, bias ? bias + h * K : 0, s->normalized, D, K, s->N, scratch, K);
    for (i64 t = 0; t < s->N; t++) {
        float *y = scratch + t * K;
        i64 position = s->positions[t];
        if (first < H + G) {
            const float *cos = m->cos + position * half, *sin = m->sin + position * half;
            if (b->q_norm) NAME(normalize)(y, first < H ? b->q_norm : b->k_norm, y, K, m->eps);
            for (i64 i = 0; i < half; i++) {
                float one = y[i], two = y[half + i];
                y[i] = one * cos[i] - two * sin[i];
                y[half + i] = two * cos[i] + one * sin[i];
            }
        }
        i64 page = (s->tables[s->texts[t] * s->table_width + position / PAGE] * G + h) * K * PAGE, slot = position % PAGE;
        if (first == 0)
            for (i64 i = 0; i < K; i++) s->queries[(t * H + h) * K + i] = y[i] * m->scale;
        else if (first == H)
            for (i64 i = 0; i < K; i++) ((REAL *)b->keys)[page + i * PAGE + slot] = STORE(y[i]);
        else
            for (i64 i = 0; i < K; i++) ((REAL *)b->values)[page + slot * K + i] = STORE(y[i]);
    }
}

/* Attention of token t's query head h over the tokens it sees; p [S] is working memory. */
static void NAME(attend)(const model *m, const block *b, const batch *s, i64 t, i64 h, float *restrict p) {
    i64 K = m->K, group = h / (m->H / m->G), end = s->positions[t] + 1, start = end - least(end, m->window);
    i64 base = start / PAGE, pages = (end + PAGE - 1) / PAGE - base;
    const int32_t *table = s->tables + s->texts[t] * s->table_width + base;
    const float *q = s->queries + (t * m->H + h) * K;
    float *restrict y = s->mixed + (t * m->H + h) * K;
    for (i64 page = 0; page < pages; page++) {
        const REAL *keys = (const REAL *)b->keys + (table[page] * m->G + group) * K * PAGE;
        vec even = {0}, odd = {0};
        for (i64 i = 0; i < K; i += 2) {
            even += q[i] * NAME(vec)(keys + i * PAGE);
            odd += q[i + 1] * NAME(vec)(keys + (i + 1) * PAGE);
        }
        *(vec *)(p + page * PAGE) = even + odd;
    }
    for (i64 i = 0; i < start - base * PAGE; i++) p[i] = -INFINITY;
    for (i64 i = end - base * PAGE; i < pages * PAGE; i++) p[i] = -INFINITY;
    softmax(p, pages * PAGE);
    for (i64 i = 0; i < K; i++) y[i] = 0;
    for (i64 j = 0; j < pages * PAGE; j += 4) {
        const REAL *restrict v = (const REAL *)b->values + ((table[j / PAGE] * m->G + group) * PAGE + j % PAGE) * K;
        for (i64 i = 0; i < K; i++)
            y[i] += p[j] * LOAD(v[i]) + p[j + 1] * LOAD(v[K + i]) + p[j + 2] * LOAD(v[2 * K + i]) + p[j + 3] * LOAD(v[3 * K + i]);
    }
}

/* The feed-forward's inner numbers r, ..., r + n - 1 of all tokens: silu(gate) up, or ReLU^2. */
static void NAME(inner)(const model *m, const block *b, const batch *s, i64 r, i64 n, float *restrict g) {
    const REAL *up = b->up, *gate = b->gate, *up_bias = b->up_bias, *gate_bias = b->gate_bias;
    NAME(product)(up + r * m->D, up_bias ? up_bias + r : 0, s->normalized, m->D, n, s->N, s->hidden + r, m->F);
    if (gate) NAME(product)(gate + r * m->D, gate_bias ? gate_bias + r : 0, s->normalized, m->D, n, s->N, g, ROWS);
    for (i64 t = 0; t < s->N; t++)
        for (i64 i = 0; i < n; i++) {
            float *y = s->hidden + t * m->F + r + i, x = g[t * ROWS + i];
            if (gate)
                *y *= x / (1.0f + exponential(-x));
            else
                *y = *y > 0 ? *y * *y : 0;
        }
}

/* x[:, r], ..., x[:, r + n - 1] += w y + bias: what a block adds to the residual stream. */
static void NAME(add)(const batch *s, const REAL *w, const REAL *bias, const float *y, i64 width, i64 D, i64 r, i64 n, float *sums) {
    NAME(product)(w + r * width, bias ? bias + r : 0, y, width, n, s->N, sums, ROWS);
    for (i64 t = 0; t < s->N; t++)
        for (i64 i = 0; i < n; i++) s->x[t * D + r + i] += sums[t * ROWS + i];
}

/* Read the tokens: their keys and values enter the pages, logits are those of the tokens that follow the wanted ones. */
void NAME(step)(const model *m, const batch *s, i64 threads) {
    i64 D = m->D, HK = m->H * m->K, F = m->F, V = m->V, N = s->N;
#pragma omp parallel num_threads((int)threads)
    {
        float *scratch = s->scratch + omp_get_thread_num() * s->scratch_size;
        for (const block *b = m->blocks; b < m->blocks + m->layers; b++) {
#pragma omp for schedule(static)
            for (i64 t = 0; t < N; t++) NAME(normalize)(s->x + t * D, b->input_norm, s->normalized + t * D, D, m->eps);
#pragma omp for schedule(static)
            for (i64 h = 0; h < m->H + 2 * m->G; h++) NAME(head)(m, b, s, h, scratch);
#pragma omp for schedule(dynamic)
            for (i64 th = 0; th < N * m->H; th++) NAME(attend)(m, b, s, th / m->H, th % m->H, scratch);
#pragma omp for schedule(static)
            for (i64 r = 0; r < D; r += ROWS)
                NAME(add)(s, b->output, b->output_bias, s->mixed, HK, D, r, least(ROWS, D - r), scratch);
#pragma omp for schedule(static)
            for (i64 t = 0; t < N; t++) NAME(normalize)(s->x + t * D, b->post_norm, s->normalized + t * D, D, m->eps);
#pragma omp for schedule(static)
            for (i64 r = 0; r < F; r += ROWS) NAME(inner)(m, b, s, r, least(ROWS, F - r), scratch);
#pragma omp for schedule(static)
            for (i64 r = 0; r < D; r += ROWS)
                NAME(add)(s, b->down, b->down_bias, s->hidden, F, D, r, least(ROWS, D - r), scratch);
        }
#pragma omp for schedule(static)
        for (i64 i = 0; i < s->wanted; i++)
            NAME(normalize)(s->x + s->rows[i] * D, m->norm, s->normalized + i * D, D, m->eps);
#pragma omp for schedule(static)
        for (i64 r = 0; r < V; r += ROWS)
            NAME(product)((const REAL *)m->head + r * D, 0, s->normalized, D, least(ROWS, V - r), s->wanted, s->logits + r, V);
    }
}

#endif
