/* One step of Muon (train/muon.py) on a matrix, all of it in the core's cache: momentum, orthogonalization, update.

   Of X^T X and of its square, which are symmetric, the half above the diagonal is enough: half of the arithmetic. And
   a matrix product is small here, so that the pauses between products count; here each thread takes a whole matrix
   through all of them, without waiting for another.

   bf16 products with sums in fp32, by the instruction vdpbf16ps: a sum of 16 columns gets a[k] b[k] + a[k+1] b[k+1], for
   which b's rows k and k+1 lie as pairs, "paired": P[k/2][j] = (b[k][j], b[k+1][j]) in 32 bits. Of a symmetric matrix
   the same pairs are what is needed on the other side. So a symmetric matrix is kept in this form only; and a pair of
   neighbours in a row is a transposed paired matrix's. */

#include <stdint.h>

#ifndef __AVX512BF16__

int64_t muon_usable(void) { return 0; }

#else

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
typedef uint32_t pair; /* two numbers in bf16 */

#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))
enum { ROWS = 8, WIDTH = 3 }; /* of a tile: 8 rows of up to 3 vectors of 16 */

int64_t muon_usable(void) { return 1; }

/* A pair's first and second number of 16 pairs; and 16 pairs of two vectors. */
INLINE __m512 first(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
INLINE __m512 second(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000)));
}
INLINE __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE __m512i paired(__m256i a, __m256i b) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

/* to[c * ld + r] = rows[r][c], 8 x 8 numbers of 32 bits. */
INLINE void transpose(const __m256i rows[8], pair *to, i64 ld) {
    __m256i a[8], b[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + 2 + j]);
        b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256((__m256i *)(to + i * ld), _mm256_permute2x128_si256(b[i], b[i + 4], 0x20));
        _mm256_storeu_si256((__m256i *)(to + (i + 4) * ld), _mm256_permute2x128_si256(b[i], b[i + 4], 0x31));
    }
}

/* sums = a b for a tile. a's pair of row r and depth k is at r * a_row + k * a_deep; b is paired, `ldb` wide. */
INLINE void multiply(__m512 sums[ROWS][WIDTH], int width, const pair *a, i64 a_row, i64 a_deep, const pair *b, i64 ldb,
                     i64 depth) {
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int v = 0; v < width; v++) sums[r][v] = _mm512_setzero_ps();
    for (i64 k = 0; k < depth; k++) {
        __m512bh columns[WIDTH];
        UNROLL for (int v = 0; v < width; v++) columns[v] = (__m512bh)_mm512_loadu_si512(b + k * ldb + 16 * v);
        UNROLL for (int r = 0; r < ROWS; r++) {
            __m512bh row = (__m512bh)_mm512_set1_epi32((int)a[r * a_row + k * a_deep]);
            UNROLL for (int v = 0; v < width; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, columns[v]);
        }
    }
}

typedef struct { /* out = scale a b + more_scale more + diagonal I, all [n, n], symmetric, paired, `ld` wide */
    const pair *a, *b, *more;
    pair *out;
    float scale, more_scale, diagonal;
    i64 ld, depth;
} product;

/* The tile at (i, j) of a product, and its mirror image. */
INLINE void symmetric_tile(const product *p, i64 i, i64 j, int width) {
    __m512 sums[ROWS][WIDTH];
    multiply(sums, width, p->a + i, 1, p->ld, p->b + j, p->ld, p->depth);
    UNROLL for (int v = 0; v < width; v++) {
        __m256i rows[ROWS];
        i64 column = j + 16 * v;
        UNROLL for (int r = 0; r < ROWS; r += 2) {
            __m512 x = sums[r][v] * _mm512_set1_ps(p->scale), y = sums[r + 1][v] * _mm512_set1_ps(p->scale);
            if (p->more) {
                __m512i more = _mm512_loadu_si512(p->more + (i + r) / 2 * p->ld + column);
                x += first(more) * _mm512_set1_ps(p->more_scale), y += second(more) * _mm512_set1_ps(p->more_scale);
            }
            if (column <= i && i < column + 16) {
                __mmask16 at = (__mmask16)(1 << (i + r - column)), next = (__mmask16)(at << 1);
                x = _mm512_mask_add_ps(x, at, x, _mm512_set1_ps(p->diagonal));
                y = _mm512_mask_add_ps(y, next, y, _mm512_set1_ps(p->diagonal));
            }
            rows[r] = rounded(x), rows[r + 1] = rounded(y);
            _mm512_storeu_si512(p->out + (i + r) / 2 * p->ld + column, paired(rows[r], rows[r + 1]));
        }
        if (column > i) transpose(rows, p->out + column / 2 * p->ld + i, p->ld);
    }
}

static void symmetric(product p, i64 n) {
    for (i64 j = 0; j < n; j += 16 * WIDTH) {
        i64 end = j + 16 * WIDTH < n ? j + 16 * WIDTH : n;
        for (i64 i = 0; i < end; i += ROWS) {
            i64 start = i < j ? j : i / 16 * 16; /* on the diagonal, less */
            if (end - start == 48) symmetric_tile(&p, i, start, 3);
            else if (end - start == 32) symmetric_tile(&p, i, start, 2);
            else symmetric_tile(&p, i, start, 1);
        }
    }
}

/* What a tile of a product that is not symmetric becomes: rows of a matrix (both ways), or a part of an update. */
typedef struct {
    pair *by_row, *paired;
    i64 row_ld, paired_ld;
    float *weight, keep, rate; /* [rows, columns], or NULL */
    i64 columns;
} target;

INLINE void tile(const pair *a, i64 a_row, i64 a_deep, const pair *b, i64 ldb, i64 depth, const target *to, i64 i, i64 j,
                 int width) {
    __m512 sums[ROWS][WIDTH];
    multiply(sums, width, a + i * a_row, a_row, a_deep, b + j, ldb, depth);
    UNROLL for (int v = 0; v < width; v++) UNROLL for (int r = 0; r < ROWS; r += 2) {
        i64 row = i + r, column = j + 16 * v;
        if (to->weight) {
            float *w = to->weight + row * to->columns + column, *below = w + to->columns;
            __m512 keep = _mm512_set1_ps(to->keep), rate = _mm512_set1_ps(to->rate);
            _mm512_storeu_ps(w, _mm512_loadu_ps(w) * keep - sums[r][v] * rate);
            _mm512_storeu_ps(below, _mm512_loadu_ps(below) * keep - sums[r + 1][v] * rate);
        } else {
            __m256i x = rounded(sums[r][v]), y = rounded(sums[r + 1][v]);
            _mm256_storeu_si256((__m256i *)(to->by_row + row * to->row_ld + column / 2), x);
            _mm256_storeu_si256((__m256i *)(to->by_row + (row + 1) * to->row_ld + column / 2), y);
            _mm512_storeu_si512(to->paired + row / 2 * to->paired_ld + column, paired(x, y));
        }
    }
}

/* a b, [rows, columns]. */
static void general(const pair *a, i64 a_row, i64 a_deep, const pair *b, i64 ldb, i64 depth, target to, i64 rows,
                    i64 columns) {
    for (i64 j = 0; j < columns; j += 16 * WIDTH)
        for (i64 i = 0; i < rows; i += ROWS) {
            if (columns - j >= 48) tile(a, a_row, a_deep, b, ldb, depth, &to, i, j, 3);
            else if (columns - j == 32) tile(a, a_row, a_deep, b, ldb, depth, &to, i, j, 2);
            else tile(a, a_row, a_deep, b, ldb, depth, &to, i, j, 1);
        }
}

/* The paired form of the transpose of x [rows, columns], given by row. */
static void turn(const pair *by_row, i64 row_ld, i64 rows, i64 columns, pair *to, i64 ld) {
    for (i64 i = 0; i < rows; i += 8)
        for (i64 k = 0; k < columns / 2; k += 8) {
            __m256i block[8];
            for (int r = 0; r < 8; r++) block[r] = _mm256_loadu_si256((const __m256i *)(by_row + (i + r) * row_ld + k));
            transpose(block, to + k * ld + i, ld);
        }
}

/* The new momentum, and what is to be made orthogonal: row by row and paired. Returns the sum of its squares. */
static float momentum(const float *grad, float *old, i64 rows, i64 columns, float beta, i64 nesterov, pair *by_row,
                      i64 row_ld, pair *paired_rows, i64 ld) {
    __m512 squares = _mm512_setzero_ps(), weight = _mm512_set1_ps(1 - beta), step = _mm512_set1_ps(beta);
    for (i64 i = 0; i < rows; i += 2)
        for (i64 j = 0; j < columns; j += 16) {
            __m256i ahead[2];
            UNROLL for (int r = 0; r < 2; r++) {
                i64 at = (i + r) * columns + j;
                __m512 g = _mm512_loadu_ps(grad + at), m = _mm512_loadu_ps(old + at);
                m += weight * (g - m);
                _mm512_storeu_ps(old + at, m);
                __m512 x = m;
                if (nesterov) x = g + step * (m - g);
                squares += x * x;
                ahead[r] = rounded(x);
                _mm256_storeu_si256((__m256i *)(by_row + (i + r) * row_ld + j / 2), ahead[r]);
            }
            _mm512_storeu_si512(paired_rows + i / 2 * ld + j, paired(ahead[0], ahead[1]));
        }
    return _mm512_reduce_add_ps(squares);
}

/* The Frobenius norm of a symmetric matrix. */
static float norm(const pair *x, i64 n, i64 ld) {
    __m512 squares = _mm512_setzero_ps();
    for (i64 i = 0; i < n / 2; i++)
        for (i64 j = 0; j < n; j += 16) {
            __m512i pairs = _mm512_loadu_si512(x + i * ld + j);
            squares += first(pairs) * first(pairs) + second(pairs) * second(pairs);
        }
    return sqrtf(_mm512_reduce_add_ps(squares));
}

/* out = scale x + more_scale more + diagonal I, of symmetric matrices. */
static void combine(const pair *x, float scale, const pair *more, float more_scale, float diagonal, pair *out, i64 n,
                    i64 ld) {
    for (i64 i = 0; i < n; i += 2)
        for (i64 j = 0; j < n; j += 16) {
            __m512i xs = _mm512_loadu_si512(x + i / 2 * ld + j), ms = _mm512_loadu_si512(more + i / 2 * ld + j);
            __m512 a = first(xs) * _mm512_set1_ps(scale) + first(ms) * _mm512_set1_ps(more_scale);
            __m512 b = second(xs) * _mm512_set1_ps(scale) + second(ms) * _mm512_set1_ps(more_scale);
            if (j <= i && i < j + 16) {
                a = _mm512_mask_add_ps(a, (__mmask16)(1 << (i - j)), a, _mm512_set1_ps(diagonal));
                b = _mm512_mask_add_ps(b, (__mmask16)(2 << (i - j)), b, _mm512_set1_ps(diagonal));
            }
            _mm512_storeu_si512(out + i / 2 * ld + j, paired(rounded(a), rounded(b)));
        }
}

/* weight, old momentum, grad [rows, columns], multiples of 16. `abc` [count, 3]: the polynomials. As `orthogonalize` in
   train/muon.py, but always on the matrix itself: only squares of symmetric matrices are exactly symmetric when rounded. */
static void one(float *weight, float *old, const float *grad, i64 rows, i64 columns, const float *abc, i64 count,
                float beta, i64 nesterov, float keep, float rate, pair *space) {
    i64 wide = rows < columns, n = wide ? rows : columns, most = wide ? columns : rows;
    i64 ld = n + 16, row_ld = columns / 2 + 16, x_ld = columns + 16, square = n / 2 * ld, whole = rows * row_ld;
    pair *by_row[2] = {space, space + whole}, *x[2] = {space + 2 * whole, space + 2 * whole + rows / 2 * x_ld};
    pair *turned = x[1] + rows / 2 * x_ld, *gram = turned + most / 2 * ld, *factor = gram + square,
         *next = factor + square;
    float trace = momentum(grad, old, rows, columns, beta, nesterov, by_row[0], row_ld, x[0], x_ld);
    float scale = 1 / fmaxf(trace, 1e-30f);
    if (wide) turn(by_row[0], row_ld, rows, columns, turned, ld);
    const pair *side = wide ? turned : x[0];
    symmetric((product){side, side, NULL, gram, scale, 0, 0, ld, most / 2}, n);
    symmetric((product){gram, gram, NULL, next, 1, 0, 0, ld, n / 2}, n);
    float size = 1.03f * fmaxf(sqrtf(sqrtf(norm(next, n, ld))), 1e-3f), cube = size * size * size;
    combine(next, abc[2] / (cube * size * size), gram, abc[1] / cube, abc[0] / size, factor, n, ld);
    int now = 0;
    target last = {NULL, NULL, 0, 0, weight, keep, rate * sqrtf(scale), columns};
    for (i64 i = 1; i < count; i++) {
        float a = abc[3 * i], b = abc[3 * i + 1], c = abc[3 * i + 2];
        target to = {by_row[!now], x[!now], row_ld, x_ld, NULL, 0, 0, 0};
        if (wide) general(factor, 1, ld, x[now], x_ld, n / 2, to, rows, columns);
        else general(by_row[now], row_ld, 1, factor, ld, n / 2, to, rows, columns);
        now = !now;
        if (wide) turn(by_row[now], row_ld, rows, columns, turned, ld);
        side = wide ? turned : x[now];
        symmetric((product){side, side, NULL, gram, scale, 0, 0, ld, most / 2}, n);
        symmetric((product){gram, gram, gram, factor, c, b, a, ld, n / 2}, n);
    }
    if (wide) general(factor, 1, ld, x[now], x_ld, n / 2, last, rows, columns);
    else general(by_row[now], row_ld, 1, factor, ld, n / 2, last, rows, columns);
}

/* A step on `matrices` of them, each given by its addresses, sides and numbers; returns 0, or 1 without memory. */
int64_t muon_step(float **weights, float **old, const float **grads, const i64 *sides, const float *keeps, const float *rates,
                  i64 matrices, const float *abc, i64 count, float beta, i64 nesterov, i64 threads) {
    i64 most = 0, failed = 0;
    for (i64 i = 0; i < matrices; i++) {
        i64 r = sides[2 * i], c = sides[2 * i + 1], n = r < c ? r : c, m = r < c ? c : r;
        i64 needed = 2 * r * (c / 2 + 16) + 2 * (r / 2) * (c + 16) + m / 2 * (n + 16) + 3 * (n / 2) * (n + 16);
        most = needed > most ? needed : most;
    }
    _Pragma("omp parallel num_threads((int)threads)") {
        pair *space = aligned_alloc(64, (most * sizeof(pair) + 63) / 64 * 64);
        _Pragma("omp for schedule(dynamic, 1)") for (i64 i = 0; i < matrices; i++) {
            if (space)
                one(weights[i], old[i], grads[i], sides[2 * i], sides[2 * i + 1], abc, count, beta, nesterov, keeps[i],
                    rates[i], space);
            else
                failed = 1;
        }
        free(space);
    }
    return failed;
}

#endif
