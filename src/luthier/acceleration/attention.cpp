// Attention in float32 without a gradient, on a CPU with AVX-512, compiled and called by `native.py`.
//
// A task is some rows of queries of one head: their scores with every key that they see, the softmax, the
// product with the values. Its scores stay in the cache. Keys are laid out first in panels of 64, each
// (dim, 64), so that both products run down rows of 16 lanes times 4.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace {

constexpr int64_t LANES = 16, PANEL = 64;
constexpr int64_t ROWS = 6;   // of the left matrix at once: with 4 registers of the right one they fill 32
constexpr int64_t TASK = 48;  // rows of queries

// R rows of a (stride `a_row`) times b, `inner` rows of 16 V columns (stride `b_row`), to c.
template <int R, int V>
void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t inner, float* c,
          int64_t c_row) {
    __m512 sum[R][V];
    for (int i = 0; i < R * V; i++) (&sum[0][0])[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inner; k++) {
        __m512 right[V];
        for (int v = 0; v < V; v++) right[v] = _mm512_loadu_ps(b + k * b_row + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const __m512 left = _mm512_set1_ps(a[r * a_row + k]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[r][v] = _mm512_fmadd_ps(left, right[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) _mm512_storeu_ps(c + r * c_row + v * LANES, sum[r][v]);
}

template <int V>
void product(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t inner,
             float* c, int64_t c_row) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        tile<ROWS, V>(a + r * a_row, a_row, b, b_row, inner, c + r * c_row, c_row);
    for (; r < rows; r++) tile<1, V>(a + r * a_row, a_row, b, b_row, inner, c + r * c_row, c_row);
}

// e^x for x <= 0: e^(n ln 2) e^r with |r| <= ln(2) / 2, and a polynomial for e^r, to the last bit or two.
__m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.f), x);  // in this order NaN stays NaN
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.f / 5040);
    for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

__mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (1u << count) - 1; }

// The first `seen` of `all` scores become e^(scale (score - greatest)), the others 0; returns their sum.
float soften(float* scores, int64_t seen, int64_t all, float scale) {
    __m512 most = _mm512_set1_ps(scores[0]);
    for (int64_t j = 0; j < seen; j += LANES)
        most = _mm512_mask_max_ps(most, first(seen - j), most, _mm512_loadu_ps(scores + j));
    const __m512 greatest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < seen; j += LANES) {
        const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(scores + j), greatest);
        const __m512 made = _mm512_maskz_mov_ps(
            first(seen - j), exponential(_mm512_mul_ps(below, _mm512_set1_ps(scale))));
        _mm512_storeu_ps(scores + j, made);
        sum = _mm512_add_ps(sum, made);
    }
    const int64_t end = (seen + LANES - 1) / LANES * LANES;
    std::fill(scores + end, scores + std::max(all, end), 0.f);
    return _mm512_reduce_add_ps(sum);
}

}  // namespace

extern "C" {

// q (batch, heads, seq, dim), k and v (batch, kv heads, seq, dim), each with three strides and numbers of a row
// side by side; y (batch, seq, heads, dim) whole. dim is a multiple of 16.
void luthier_attention(const float* q, const float* k, const float* v, float* y, const int64_t* strides,
                       float scale, int causal, int64_t batch, int64_t heads, int64_t kv_heads, int64_t seq,
                       int64_t dim, int threads) {
    const int64_t panels = (seq + PANEL - 1) / PANEL, blocks = (seq + TASK - 1) / TASK;
    std::unique_ptr<float[]> packed(new float[batch * kv_heads * panels * PANEL * dim]);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(3) schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t h = 0; h < kv_heads; h++)
                for (int64_t p = 0; p < panels; p++) {
                    const float* from = k + b * strides[3] + h * strides[4] + p * PANEL * strides[5];
                    float* panel = &packed[((b * kv_heads + h) * panels + p) * PANEL * dim];
                    const int64_t keys = std::min(PANEL, seq - p * PANEL);
                    std::fill(panel, panel + PANEL * dim, 0.f);
                    for (int64_t j = 0; j < keys; j++)
                        for (int64_t d = 0; d < dim; d++) panel[d * PANEL + j] = from[j * strides[5] + d];
                }
        const int64_t width = panels * PANEL;
        std::unique_ptr<float[]> scores(new float[TASK * width]);
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t n = 0; n < blocks; n++)  // the longest tasks first
            for (int64_t b = 0; b < batch; b++)
                for (int64_t h = 0; h < heads; h++) {
                    const int64_t start = (blocks - 1 - n) * TASK, rows = std::min(TASK, seq - start);
                    const int64_t keys = causal ? start + rows : seq, kv = h * kv_heads / heads;
                    const float* queries = q + b * strides[0] + h * strides[1] + start * strides[2];
                    const float* panel = &packed[(b * kv_heads + kv) * panels * PANEL * dim];
                    for (int64_t j = 0; j < keys; j += PANEL, panel += PANEL * dim)
                        product<4>(rows, queries, strides[2], panel, PANEL, dim, &scores[j], width);
                    float sums[TASK];
                    for (int64_t r = 0; r < rows; r++)
                        sums[r] = soften(&scores[r * width], causal ? start + r + 1 : seq, keys, scale);
                    const float* values = v + b * strides[6] + kv * strides[7];
                    float* out = y + ((b * seq + start) * heads + h) * dim;
                    for (int64_t d = 0; d < dim; d += 4 * LANES) {
                        const auto times = dim - d >= 64   ? product<4>
                                           : dim - d == 48 ? product<3>
                                           : dim - d == 32 ? product<2>
                                                           : product<1>;
                        times(rows, scores.get(), width, values + d, strides[8], keys, out + d, heads * dim);
                    }
                    for (int64_t r = 0; r < rows; r++)
                        for (int64_t d = 0; d < dim; d++) out[r * heads * dim + d] /= sums[r];
                }
    }
}
}
