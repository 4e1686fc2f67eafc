// The sums x^T x of a calibration pass on a CPU with AVX-512, compiled and called by `native.py`.
//
// Tokens come in chunks. Of a chunk both sides are laid out as they are read: columns of the right one in panels
// of 64, four registers; columns of the left one by six, whose 24 sums stay in registers for the whole chunk.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

constexpr int64_t LANES = 16, PANEL = 64, ROWS = 6;
constexpr int64_t CHUNK = 160;  // tokens: a panel of them stays in the nearest cache

int64_t parts(int64_t all, int64_t size) { return (all + size - 1) / size; }

// One token of x in float32.
void widen(const void* x, bool half, int64_t from, int64_t count, float* made) {
    if (!half) {
        std::memcpy(made, static_cast<const float*>(x) + from, count * sizeof(float));
        return;
    }
    const uint16_t* bits = static_cast<const uint16_t*>(x) + from;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
        std::memcpy(made + i, &wide, sizeof(float));
    }
}

void tile(const float* left, const float* right, int64_t tokens, float* sums, int64_t features, int64_t rows,
          int64_t columns) {
    __m512 sum[ROWS][4];
    for (int i = 0; i < ROWS * 4; i++) (&sum[0][0])[i] = _mm512_setzero_ps();
    for (int64_t t = 0; t < tokens; t++, left += ROWS, right += PANEL) {
        __m512 part[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) part[v] = _mm512_loadu_ps(right + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const __m512 one = _mm512_set1_ps(left[r]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) sum[r][v] = _mm512_fmadd_ps(one, part[v], sum[r][v]);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t v = 0; v * LANES < columns; v++) {
            const int64_t here = std::min(LANES, columns - v * LANES);
            const __mmask16 lanes = here == LANES ? 0xffff : (1u << here) - 1;
            float* to = sums + r * features + v * LANES;
            _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), sum[r][v]));
        }
}

}  // namespace

extern "C" {

// Adds x^T x to sums (features, features), right of its diagonal at least. x (tokens, features), float32 or
// bfloat16 (if half); each token counts as if it were multiplied by its `scale` (tokens,), where there is one.
void luthier_gram(const void* x, int half, const float* scale, float* sums, int64_t tokens, int64_t features,
                  int threads) {
    const int64_t panels = parts(features, PANEL), sixes = parts(features, ROWS);
    std::unique_ptr<float[]> right(new float[panels * PANEL * CHUNK]), left(new float[sixes * ROWS * CHUNK]);
    std::fill(&right[(panels - 1) * PANEL * CHUNK], &right[panels * PANEL * CHUNK], 0.f);
    std::fill(&left[(sixes - 1) * ROWS * CHUNK], &left[sixes * ROWS * CHUNK], 0.f);
#pragma omp parallel num_threads(threads)
    {
        std::unique_ptr<float[]> token(new float[features]);
        for (int64_t start = 0; start < tokens; start += CHUNK) {
            const int64_t count = std::min(CHUNK, tokens - start);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < count; t++) {
                widen(x, half, (start + t) * features, features, token.get());
                if (scale)
                    for (int64_t i = 0; i < features; i++) token[i] *= scale[start + t];
                for (int64_t i = 0; i < features; i += PANEL)
                    std::copy_n(&token[i], std::min(PANEL, features - i), &right[i * CHUNK + t * PANEL]);
                for (int64_t i = 0; i < features; i += ROWS)
                    std::copy_n(&token[i], std::min(ROWS, features - i), &left[i * CHUNK + t * ROWS]);
            }
#pragma omp for schedule(dynamic)
            for (int64_t n = 0; n < panels; n++) {
                const int64_t column = (panels - 1 - n) * PANEL;  // the longest first
                const int64_t columns = std::min(PANEL, features - column);
                for (int64_t row = 0; row < column + columns; row += ROWS)
                    tile(&left[row * CHUNK], &right[column * CHUNK], count, sums + row * features + column,
                         features, std::min(ROWS, features - row), columns);
            }
        }
    }
}
}
