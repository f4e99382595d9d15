/* One step of generation on a CPU: the next tokens of many texts in, the logits of what follows them out.

   For few tokens such a step is matrix times vector, and all that counts is how fast the weights stream past; for many
   it is arithmetic. So weights are used where they lie, [out, in] as nn.Linear stores them, and each that is loaded
   meets several tokens in registers. Rows of weights are divided among the threads, and a whole step is one parallel
   region with seven barriers a layer.

   A matrix may be in int8 (int8.c), which is half of bf16 to read.

   Every sum is made in one order that depends on nothing but its own terms (so the compiler must not reorder them, as it
   may in fused.c, but where SIMD_ says so). So neither the number of threads nor what
   else is in the batch changes a bit of a text's result. Keys and values lie in pages of 16 tokens, of which each text
   has a list (zero2hero/generate/pages.py). A token sees what earlier tokens of the same step have put there: a
   prompt is read like everything else, as many tokens at once.

   The model is Decoder (zero2hero/models/decoder.py) with RMSNorm, rotary positions and SwiGLU or ReLU^2. Other weights,
   keys and values are fp32 or bf16 (this file includes itself once for each); everything between them is fp32.

   N tokens, D width, H heads, G key/value heads, K head width, F inner width, V vocabulary, S slots of a text. */

#ifndef REAL /* ---- what both precisions share; then the step, twice ----------------------------------------------- */

extern int omp_get_thread_num(void);

#include "fused.c" /* for bf16_load, bf16_store and exponential */
#undef REAL
#undef LOAD
#undef STORE
#undef NAME

typedef struct { /* [out, in] of fp32 or bf16; or of int8, and then scales [out]. The bias [out] may be null. */
    const void *weights, *bias;
    const float *scales;
} matrix;

typedef struct { /* the norms of queries and keys and the gate's weights may be null */
    matrix q, k, v, output, gate, up, down;
    const void *input_norm, *q_norm, *k_norm, *post_norm;
    void *keys, *values; /* [pages, G, K, 16] and [pages, G, 16, K] */
} block;

typedef struct {
    i64 layers, D, H, G, K, F, V, window, int8; /* window: how many tokens a query sees, itself included */
    float eps, scale;
    const block *blocks;
    matrix head;
    const void *embedding, *norm;
    const float *cos, *sin; /* [positions, K / 2] */
} model;

typedef struct {
    i64 N, wanted, table_width, scratch_size;
    const i64 *ids, *positions, *texts, *rows;    /* [N]; [N]; [N] each one's text; [wanted] tokens, for their logits */
    const i64 *tables;                            /* [texts, table_width] the pages of each text */
    float *x;                                     /* [N, D] what is read: given where the id is -1; overwritten */
    float *normalized, *queries, *mixed, *hidden; /* working memory: [N, D], [N, H, K], [N, H, K], [N, F] */
    int8_t *codes;                                /* [N, a row's groups, 64] what an int8 matrix multiplies, */
    float *shares;                                /* [N, a row's groups] and what stands for 1 in it */
    float *scratch;                               /* [threads, scratch_size]: S, and N times K and ROWS */
    float *logits;                                /* [wanted, V] */
} batch;

enum { PAGE = 16, ROWS = 8, AHEAD = 8192 }; /* a thread takes ROWS rows of a matrix at a time */
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

#define SIMD_SUM _Pragma("omp simd reduction(+ : sum)")
#define SIMD_SQUARES _Pragma("omp simd reduction(+ : squares)")

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
    SIMD_MAXIMUM
    for (i64 i = 0; i < n; i++) most = p[i] > most ? p[i] : most;
    for (i64 i = 0; i < n; i++) p[i] = exponential(p[i] - most);
    SIMD_SUM
    for (i64 i = 0; i < n; i++) sum += p[i];
    for (i64 i = 0; i < n; i++) p[i] /= sum;
}

#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))

/* Rows of weights and tokens, in tiles: TILE(R, T, r, t) does R rows from r on with T tokens from t on. Few tokens meet
   one row at a time, for memory is fastest when it is read in order; of many, those of a tile stay in the core's cache
   and meet four rows at a time, for then arithmetic is what counts. */
#define IN_TILES(rows, N, TILE)                                                                                        \
    if (N <= TOKENS)                                                                                                   \
        for (i64 r = 0; r < rows; r++) {                                                                               \
            i64 t = 0;                                                                                                 \
            for (; t + 4 <= N; t += 4) TILE(1, 4, r, t);                                                               \
            for (; t + 2 <= N; t += 2) TILE(1, 2, r, t);                                                               \
            if (t < N) TILE(1, 1, r, t);                                                                               \
        }                                                                                                              \
    else {                                                                                                             \
        i64 t = 0;                                                                                                     \
        for (; t + TOKENS <= N; t += TOKENS) IN_FOURS(rows, TOKENS, t, TILE)                                           \
        for (; t + 2 <= N; t += 2) IN_FOURS(rows, 2, t, TILE)                                                          \
        if (t < N) IN_FOURS(rows, 1, t, TILE)                                                                          \
    }
#define IN_FOURS(rows, T, t, TILE)                                                                                     \
    {                                                                                                                  \
        i64 r = 0;                                                                                                     \
        for (; r + 4 <= rows; r += 4) TILE(4, T, r, t);                                                                \
        for (; r < rows; r++) TILE(1, T, r, t);                                                                        \
    }

#include "int8.c"

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
            __builtin_prefetch(R > 1 ? w + (R + r) * n + i : w + i + AHEAD / sizeof(REAL)); /* early enough */
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

/* y[t, i] = w[r + i] . x[t] + bias[r + i] for `rows` rows of the matrix; x [N, n], and y's rows are `apart`. */
static void NAME(product)(const matrix *m, i64 r, i64 rows, const batch *s, const float *x, i64 n, i64 N, float *y, i64 apart) {
    const REAL *w = (const REAL *)m->weights + r * n, *bias = m->bias;
    if (m->scales)
        product_int8((const int8_t *)m->weights + r * n, m->scales + r, s->codes, s->shares, n, rows, N, y, apart);
    else {
#define TILE(R, T, r, t) NAME(tile)(R, T, w + r * n, x + t * n, n, y + t * apart + r, apart)
        IN_TILES(rows, N, TILE)
#undef TILE
    }
    if (bias)
        for (i64 t = 0; t < N; t++)
            for (i64 i = 0; i < rows; i++) y[t * apart + i] += LOAD(bias[r + i]);
}

static void NAME(normalize)(const float *x, const REAL *restrict w, float *y, i64 n, float eps) {
    float squares = 0;
    SIMD_SQUARES
    for (i64 i = 0; i < n; i++) squares += x[i] * x[i];
    float scale = 1.0f / sqrtf(squares / n + eps);
    for (i64 i = 0; i < n; i++) y[i] = x[i] * scale * LOAD(w[i]);
}

/* One head of queries (0 <= h < H), keys (H <= h < H + G) or values of all tokens: project, normalize, rotate, put away. */
static void NAME(head)(const model *m, const block *b, const batch *s, i64 h, float *scratch) {
    i64 D = m->D, H = m->H, G = m->G, K = m->K, half = K / 2, first = h < H ? 0 : h < H + G ? H : H + G;
    h -= first;
    NAME(product)(first == 0 ? &b->q : first == H ? &b->k : &b->v, h * K, K, s, s->normalized, D, s->N, scratch, K);
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
    const i64 *table = s->tables + s->texts[t] * s->table_width + base;
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
    const void *gate = b->gate.weights;
    NAME(product)(&b->up, r, n, s, s->normalized, m->D, s->N, s->hidden + r, m->F);
    if (gate) NAME(product)(&b->gate, r, n, s, s->normalized, m->D, s->N, g, ROWS);
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
static void NAME(add)(const batch *s, const matrix *w, const float *y, i64 width, i64 D, i64 r, i64 n, float *sums) {
    NAME(product)(w, r, n, s, y, width, s->N, sums, ROWS);
    for (i64 t = 0; t < s->N; t++)
        for (i64 i = 0; i < n; i++) s->x[t * D + r + i] += sums[t * ROWS + i];
}

/* What a token's row of the residual stream is before a block's matrices read it. */
static void NAME(prepare)(const model *m, const batch *s, const REAL *norm, i64 t) {
    float *y = s->normalized + t * m->D;
    NAME(normalize)(s->x + t * m->D, norm, y, m->D, m->eps);
    if (m->int8) quantize(y, m->D, s->codes + t * groups_of(m->D) * GROUP, s->shares + t * groups_of(m->D));
}

/* Read the tokens: their keys and values enter the pages, logits are those of the tokens that follow the wanted ones. */
void NAME(step)(const model *m, const batch *s, i64 threads) {
    i64 D = m->D, HK = m->H * m->K, F = m->F, V = m->V, N = s->N;
#pragma omp parallel num_threads((int)threads)
    {
        float *scratch = s->scratch + omp_get_thread_num() * s->scratch_size;
#pragma omp for schedule(static)
        for (i64 t = 0; t < N; t++)
            for (i64 i = 0; i < D && s->ids[t] >= 0; i++) s->x[t * D + i] = LOAD(((const REAL *)m->embedding)[s->ids[t] * D + i]);
        for (const block *b = m->blocks; b < m->blocks + m->layers; b++) {
#pragma omp for schedule(static)
            for (i64 t = 0; t < N; t++) NAME(prepare)(m, s, b->input_norm, t);
#pragma omp for schedule(static)
            for (i64 h = 0; h < m->H + 2 * m->G; h++) NAME(head)(m, b, s, h, scratch);
#pragma omp for schedule(dynamic)
            for (i64 th = 0; th < N * m->H; th++) NAME(attend)(m, b, s, th / m->H, th % m->H, scratch);
            if (m->int8) {
#pragma omp for schedule(static)
                for (i64 t = 0; t < N; t++)
                    quantize(s->mixed + t * HK, HK, s->codes + t * groups_of(HK) * GROUP, s->shares + t * groups_of(HK));
            }
#pragma omp for schedule(static)
            for (i64 r = 0; r < D; r += ROWS) NAME(add)(s, &b->output, s->mixed, HK, D, r, least(ROWS, D - r), scratch);
#pragma omp for schedule(static)
            for (i64 t = 0; t < N; t++) NAME(prepare)(m, s, b->post_norm, t);
#pragma omp for schedule(static)
            for (i64 r = 0; r < F; r += ROWS) NAME(inner)(m, b, s, r, least(ROWS, F - r), scratch);
            if (m->int8) {
#pragma omp for schedule(static)
                for (i64 t = 0; t < N; t++)
                    quantize(s->hidden + t * F, F, s->codes + t * groups_of(F) * GROUP, s->shares + t * groups_of(F));
            }
#pragma omp for schedule(static)
            for (i64 r = 0; r < D; r += ROWS) NAME(add)(s, &b->down, s->hidden, F, D, r, least(ROWS, D - r), scratch);
        }
#pragma omp for schedule(static)
        for (i64 i = 0; i < s->wanted; i++)
            NAME(normalize)(s->x + s->rows[i] * D, m->norm, s->normalized + i * D, D, m->eps);
#pragma omp for schedule(static)
        for (i64 r = 0; r < V; r += ROWS)
            NAME(product)(&m->head, r, least(ROWS, V - r), s, s->normalized, D, s->wanted, s->logits + r, V);
    }
}

#endif
