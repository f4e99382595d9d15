/* Products with a matrix in int8, for decode.c, which includes this file.

   Each row of the matrix has a scale (nn/quantized.py). What it multiplies is rounded to int8 as well, 64 numbers at a
   time by the largest of them, as llama.cpp's Q8_0 does. So four products are summed in integers, exactly and, where the
   processor has the instruction for it (AVX-512 VNNI), 64 of them at once; sums of different scales are fp32. */

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

enum { GROUP = 64 };

typedef int32_t ints __attribute__((vector_size(64)));
typedef int8_t bytes __attribute__((vector_size(64), aligned(1), may_alias));

static i64 groups_of(i64 n) { return (n + GROUP - 1) / GROUP; }

/* Rows x [N, n] as codes [N, groups, 64], filled up with zeros, times shares [N, groups]. */
static void quantize(const float *x, i64 n, int8_t *codes, float *shares) {
    for (i64 g = 0; g < groups_of(n); g++) {
        i64 size = least(GROUP, n - g * GROUP);
        const float *restrict xs = x + g * GROUP;
        float most = 0;
        SIMD_MAXIMUM
        for (i64 i = 0; i < size; i++) most = fabsf(xs[i]) > most ? fabsf(xs[i]) : most;
        float up = most > 0 ? 127.0f / most : 0;
        memset(codes + g * GROUP, 0, GROUP);
        for (i64 i = 0; i < size; i++) codes[g * GROUP + i] = (int8_t)rintf(xs[i] * up);
        shares[g] = most / 127.0f;
    }
}

/* Sums of four products each, exact. The instruction wants one side without a sign: w + 128, and 128 x taken off. */
#ifdef __AVX512VNNI__
INLINE ints excess(bytes x) { return (ints)_mm512_dpbusd_epi32((__m512i)(ints){0}, _mm512_set1_epi8(-128), (__m512i)x); }
INLINE ints dot(bytes w, bytes x, ints excess) {
    return (ints)_mm512_dpbusd_epi32((__m512i)-excess, _mm512_xor_si512((__m512i)w, _mm512_set1_epi8(-128)), (__m512i)x);
}
#else
INLINE ints excess(bytes x) { return (ints){0}; }
INLINE ints dot(bytes w, bytes x, ints excess) {
    ints sums = {0};
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++) sums[i] += w[4 * i + j] * x[4 * i + j];
    return sums;
}
#endif

/* As `tile` below, for weights in int8 [R, n] and x in codes and shares. */
INLINE void tile_int8(const int R, const int T, const int8_t *w, const float *scales, const int8_t *x,
                      const float *shares, i64 n, float *y, i64 apart) {
    vec sums[4][8];
    bytes a[4];
    i64 groups = groups_of(n);
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) sums[r][t] = (vec){0};
    for (i64 g = 0; g < groups; g++) {
        UNROLL for (int r = 0; r < R; r++) {
            const int8_t *from = w + r * n + g * GROUP;
            if ((g + 1) * GROUP <= n)
                a[r] = *(const bytes *)from;
            else {
                int8_t rest[GROUP] = {0};
                a[r] = *(const bytes *)memcpy(rest, from, n - g * GROUP);
            }
            __builtin_prefetch(R > 1 ? w + (R + r) * n + g * GROUP : w + g * GROUP + AHEAD);
        }
        UNROLL for (int t = 0; t < T; t++) {
            bytes b = *(const bytes *)(x + (t * groups + g) * GROUP);
            ints more = excess(b);
            float share = shares[t * groups + g];
            UNROLL for (int r = 0; r < R; r++) sums[r][t] += __builtin_convertvector(dot(a[r], b, more), vec) * share;
        }
    }
    UNROLL for (int t = 0; t < T; t++) UNROLL for (int r = 0; r < R; r++) y[t * apart + r] = sum_of(sums[r][t]) * scales[r];
}

static void product_int8(const int8_t *w, const float *scales, const int8_t *x, const float *shares, i64 n, i64 rows,
                         i64 N, float *y, i64 apart) {
    i64 groups = groups_of(n);
#define TILE(R, T, r, t)                                                                                               \
    tile_int8(R, T, w + r * n, scales + r, x + t * groups * GROUP, shares + t * groups, n, y + t * apart + r, apart)
    IN_TILES(rows, N, TILE)
#undef TILE
}
