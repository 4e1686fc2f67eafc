// Strips of 48 rows of a matrix, column after column, three registers each: what the factor of a Hessian and the
// sweep of columns are made of.

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

constexpr int64_t LANES = 16, VECTORS = 3, STRIP = LANES * VECTORS;
constexpr int64_t PANEL = 8;  // columns whose sums are made together, in 24 registers

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<float[], Free>;

inline Buffer buffer(int64_t columns) {
    return Buffer(static_cast<float*>(std::aligned_alloc(64, columns * STRIP * sizeof(float))));
}

// Adds to 8 columns of a strip, or takes from them, `count` others, each times its own 8 factors: those of two
// others lie STEP apart.
template <bool ADD, int64_t STEP>
void accumulate(float* columns, const float* others, const float* factors, int64_t count) {
    __m512 sum[PANEL][VECTORS];
    for (int i = 0; i < PANEL * VECTORS; i++) (&sum[0][0])[i] = _mm512_load_ps(columns + i * LANES);
    for (int64_t j = 0; j < count; j++, others += STRIP, factors += STEP) {
        __m512 other[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) other[v] = _mm512_load_ps(others + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < PANEL; i++) {
            const __m512 factor = _mm512_set1_ps(factors[i]);
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++)
                sum[i][v] = ADD ? _mm512_fmadd_ps(factor, other[v], sum[i][v])
                                : _mm512_fnmadd_ps(factor, other[v], sum[i][v]);
        }
    }
    for (int i = 0; i < PANEL * VECTORS; i++) _mm512_store_ps(columns + i * LANES, (&sum[0][0])[i]);
}
