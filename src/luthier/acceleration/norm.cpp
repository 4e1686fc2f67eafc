// RMS normalisation in float32 on a CPU with AVX-512, compiled and called by `native.py`.

#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace {

constexpr int64_t LANES = 16;

__mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (1u << count) - 1; }

}  // namespace

extern "C" {

// y = weight * x / sqrt(mean(x^2) + eps), row by row. x and y (rows, width).
void luthier_rms_norm(const float* x, const float* weight, float* y, float eps, int64_t rows, int64_t width,
                      int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float* from = x + r * width;
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t k = 0; k < width; k += LANES) {
            const __m512 value = _mm512_maskz_loadu_ps(first(width - k), from + k);
            __m512& part = sum[k / LANES % 2];
            part = _mm512_fmadd_ps(value, value, part);
        }
        const float square = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
        const __m512 inverse = _mm512_set1_ps(1.f / std::sqrt(square / width + eps));
        for (int64_t k = 0; k < width; k += LANES) {
            const __mmask16 lanes = first(width - k);
            const __m512 normal = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, from + k), inverse);
            _mm512_mask_storeu_ps(y + r * width + k, lanes,
                                  _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, weight + k), normal));
        }
    }
}
}
