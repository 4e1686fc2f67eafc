// The column sweep of GPTQ and SparseGPT on a CPU with AVX-512, compiled and called by `native.py`.
//
// Rows of the weight do not know of each other: 16 of them, the lanes of a register, go through the columns of
// a block alone, in a copy that stays in the nearest cache.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace {

constexpr int64_t LANES = 16;

__mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (1u << count) - 1; }

// Steps and codes of zero of each group, (groups, rows), and what codes there are. No scale: no grid.
struct Grid {
    const float *scale, *zero;
    const int64_t* group;  // of each column
    float low, high;

    __m512 nearest(__m512 value, int64_t column, int64_t row, int64_t rows, __mmask16 lanes) const {
        if (!scale) return value;
        const int64_t at = group[column] * rows + row;
        const __m512 step = _mm512_mask_loadu_ps(_mm512_set1_ps(1.f), lanes, scale + at);
        const __m512 origin = zero ? _mm512_maskz_loadu_ps(lanes, zero + at) : _mm512_setzero_ps();
        __m512 code = _mm512_add_ps(_mm512_roundscale_ps(_mm512_div_ps(value, step), 0), origin);
        code = _mm512_min_ps(_mm512_max_ps(code, _mm512_set1_ps(low)), _mm512_set1_ps(high));
        return _mm512_mul_ps(_mm512_sub_ps(code, origin), step);
    }
};

}  // namespace

extern "C" {

// Settles the columns from `start` to `stop` of w (rows, columns) and brings those up to `end` up to date.
// upper (columns, columns); errors as w; zeros (rows, stop - start), or null, says what becomes zero.
void luthier_sweep(float* w, float* errors, const float* upper, const float* scale, const float* zero,
                   const int64_t* group, float low, float high, const uint8_t* zeros, int64_t rows,
                   int64_t columns, int64_t start, int64_t stop, int64_t end, int threads) {
    const Grid grid = {scale, zero, group, low, high};
#pragma omp parallel num_threads(threads)
    {
        std::unique_ptr<float[]> copy(new float[(end - start) * LANES]);  // a column after the other
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row += LANES) {
            const int64_t count = std::min(LANES, rows - row);
            const __mmask16 lanes = first(count);
            float* part = copy.get();
            std::fill(part, part + (end - start) * LANES, 0.f);
            for (int64_t r = 0; r < count; r++)
                for (int64_t k = start; k < end; k++)
                    part[(k - start) * LANES + r] = w[(row + r) * columns + k];
            for (int64_t j = start; j < stop; j++, part += LANES) {
                __mmask16 kept = 0xffff;
                if (zeros)
                    for (int64_t r = 0; r < count; r++)
                        if (zeros[(row + r) * (stop - start) + j - start]) kept &= ~(1u << r);
                const __m512 before = _mm512_loadu_ps(part);
                const __m512 after =
                    grid.nearest(_mm512_maskz_mov_ps(kept, before), j, row, rows, lanes);
                const float* factor = upper + j * columns;
                const __m512 lost = _mm512_div_ps(_mm512_sub_ps(before, after), _mm512_set1_ps(factor[j]));
                for (int64_t k = j + 1; k < end; k++) {
                    float* later = part + (k - j) * LANES;
                    _mm512_storeu_ps(later,
                                     _mm512_fnmadd_ps(_mm512_set1_ps(factor[k]), lost, _mm512_loadu_ps(later)));
                }
                alignas(64) float settled[LANES], error[LANES];
                _mm512_store_ps(settled, after);
                _mm512_store_ps(error, lost);
                for (int64_t r = 0; r < count; r++) {
                    w[(row + r) * columns + j] = settled[r];
                    errors[(row + r) * columns + j] = error[r];
                }
            }
            for (int64_t k = stop; k < end; k++, part += LANES)
                for (int64_t r = 0; r < count; r++) w[(row + r) * columns + k] = part[r];
        }
    }
}
}
