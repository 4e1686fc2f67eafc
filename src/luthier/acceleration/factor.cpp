// The factor of a Hessian on a CPU with AVX-512, compiled and called by `native.py`.
//
// H = R R^T, R upper triangular, its last columns first. R lies in strips of 48 rows, column after column, three
// registers each: so both sides of all its products are read as they lie.

#include <algorithm>
#include <cmath>

#include "strips.h"

namespace {

// Divides column k of a strip by `root` and takes its products with numbers of `by` from the columns before.
void settle(float* strip, int64_t k, float root, const float* by) {
    float* column = strip + k * STRIP;
    __m512 own[VECTORS];
    for (int64_t v = 0; v < VECTORS; v++) {
        own[v] = _mm512_div_ps(_mm512_load_ps(column + v * LANES), _mm512_set1_ps(root));
        _mm512_store_ps(column + v * LANES, own[v]);
    }
    for (int64_t i = 0; i < k; i++)
        for (int64_t v = 0; v < VECTORS; v++) {
            float* before = strip + i * STRIP + v * LANES;
            _mm512_store_ps(before, _mm512_fnmadd_ps(_mm512_set1_ps(by[i]), own[v], _mm512_load_ps(before)));
        }
}

// Factors the block on the diagonal; false where it is not positive.
bool settle_diagonal(float* block, float* roots) {
    for (int64_t k = STRIP - 1; k >= 0; k--) {
        const float square = block[k * STRIP + k];
        if (!(square > 0) || !std::isfinite(square)) return false;
        roots[k] = std::sqrt(square);
        // Its own numbers below the diagonal are never read: rows after k have had their columns.
        alignas(64) float by[STRIP];
        for (int64_t i = 0; i < k; i++) by[i] = block[k * STRIP + i] / roots[k];
        settle(block, k, roots[k], by);
    }
    return true;
}

}  // namespace

extern "C" {

// H = V diag(roots^2) V^T with V, `unit` (n, n), upper triangular and 1 on the diagonal; H (n, n) symmetric. Of
// `unit` what lies left of the diagonal is left as it is. Returns 0 where H is not positive definite.
int luthier_factor(const float* hessian, float* unit, float* roots, int64_t n, int threads) {
    const int64_t strips = (n + STRIP - 1) / STRIP, padded = strips * STRIP;
    const Buffer memory = buffer(strips * padded);
    const std::unique_ptr<float[]> root(new float[padded]);
    const auto at = [&](int64_t strip, int64_t column) { return &memory[(strip * padded + column) * STRIP]; };
    bool positive = true;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t s = 0; s < strips; s++)
            for (int64_t k = s * STRIP; k < padded; k++)
                for (int64_t l = 0; l < STRIP; l++) {
                    const int64_t row = s * STRIP + l;
                    at(s, k)[l] = k < n && row < n ? hessian[k * n + row] : (k == row);
                }
        for (int64_t b = strips - 1; b >= 0 && positive; b--) {
            const int64_t column = b * STRIP, next = column + STRIP;
#pragma omp for schedule(dynamic)
            for (int64_t s = b; s >= 0; s--)
                for (int64_t i = 0; i < STRIP; i += PANEL)
                    accumulate<false, STRIP>(at(s, column + i), at(s, next), at(b, next) + i, padded - next);
#pragma omp single
            positive = settle_diagonal(at(b, column), &root[column]);
            if (!positive) break;
#pragma omp for schedule(dynamic)
            for (int64_t s = 0; s < b; s++)
                for (int64_t k = STRIP - 1; k >= 0; k--)
                    settle(at(s, column), k, root[column + k], at(b, column + k));
        }
        if (positive) {
#pragma omp for schedule(dynamic)
            for (int64_t row = 0; row < n; row++) {
                const float* from = at(row / STRIP, 0) + row % STRIP;
                unit[row * n + row] = 1;
                for (int64_t k = row + 1; k < n; k++) unit[row * n + k] = from[k * STRIP] / root[k];
            }
        }
    }
    std::copy_n(root.get(), n, roots);
    return positive;
}
}
