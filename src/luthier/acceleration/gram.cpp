// Sums x^T x on a CPU with AVX-512, compiled and called by `native.py`: those of a calibration pass, and what a
// change of weights does under them.
//
// Both sides of the product are laid out as they are read: columns of the right one in panels of 64, four
// registers; columns of the left one by six, whose 24 sums stay in registers. What lies left of the diagonal is
// not computed. Numbers in bfloat16 come in pairs, two tokens at a step, which takes no longer than one number
// in float32; their products and sums are float32.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

namespace {

constexpr int64_t LANES = 16, VECTORS = 4, PANEL = VECTORS * LANES, ROWS = 6;
constexpr int64_t CHUNK = 192;  // tokens: a panel of them stays near

int64_t parts(int64_t all, int64_t size) { return (all + size - 1) / size; }

// Sixteen numbers of a token of x in float32, those outside `lanes` 0.
__m512 read(const void* x, bool half, int64_t at, __mmask16 lanes) {
    if (!half) return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + at);
    const __m256i bits = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(x) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

__m512i rounded(__m512 values) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

// Some tokens of x (tokens, features), laid out twice. A step is a token, or of `pairs` two, the first in the
// lower half of each 32 bits.
struct Sides {
    const int64_t features, most;  // steps that there is room for
    const bool pairs;
    std::unique_ptr<float[]> lefts, rights;

    Sides(int64_t features, int64_t tokens, bool pairs)
        : features(features), most(pairs ? (tokens + 1) / 2 : tokens), pairs(pairs),
          lefts(new float[parts(features, ROWS) * ROWS * most]),
          rights(new float[parts(features, PANEL) * PANEL * most]) {
        const int64_t six = parts(features, ROWS) - 1, panel = parts(features, PANEL) - 1;
        std::fill(left(six * ROWS), left(six * ROWS) + ROWS * most, 0.f);
        std::fill(right(panel * PANEL), right(panel * PANEL) + PANEL * most, 0.f);
    }
    float* left(int64_t column) const { return &lefts[column * most]; }
    float* right(int64_t column) const { return &rights[column * most]; }

    // By all threads together; `step` (features) is each one's own. Returns the number of steps.
    int64_t fill(const void* x, bool half, const float* scale, int64_t start, int64_t count, float* step) {
        const int64_t width = pairs ? 2 : 1, steps = parts(count, width);
#pragma omp for schedule(static)
        for (int64_t s = 0; s < steps; s++) {
            const int64_t token = start + s * width;
            const bool second = pairs && token + 1 < start + count;
            for (int64_t i = 0; i < features; i += LANES) {
                const int64_t here = std::min(LANES, features - i);
                const __mmask16 lanes = (1u << here) - 1, others = second ? lanes : 0;
                __m512 one = read(x, half, token * features + i, lanes);
                if (scale) one = _mm512_mul_ps(one, _mm512_set1_ps(scale[token]));
                if (pairs) {
                    __m512 other = read(x, half, (token + second) * features + i, others);
                    if (scale) other = _mm512_mul_ps(other, _mm512_set1_ps(scale[token + second]));
                    one = _mm512_castsi512_ps(
                        _mm512_or_si512(rounded(one), _mm512_slli_epi32(rounded(other), 16)));
                }
                _mm512_mask_storeu_ps(step + i, lanes, one);
            }
            lay_out<PANEL>(step, s, rights.get());
            lay_out<ROWS>(step, s, lefts.get());
        }
        return steps;
    }
    template <int64_t WIDTH>
    void lay_out(const float* step, int64_t s, float* side) const {
        int64_t i = 0;
        for (; i + WIDTH <= features; i += WIDTH)  // of a size that the compiler knows
            std::memcpy(side + i * most + s * WIDTH, step + i, WIDTH * sizeof(float));
        std::memcpy(side + i * most + s * WIDTH, step + i, (features - i) * sizeof(float));
    }
};

template <bool PAIRS>
__m512 add_product(__m512 sum, __m512 left, __m512 right) {
    if constexpr (PAIRS)
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
    else
        return _mm512_fmadd_ps(left, right, sum);
}

// Six rows and 64 columns of x^T x.
struct Tile {
    __m512 sum[ROWS][VECTORS];

    Tile(const Sides& sides, int64_t row, int64_t column, int64_t steps) {
        if (sides.pairs)
            make<true>(sides.left(row), sides.right(column), steps);
        else
            make<false>(sides.left(row), sides.right(column), steps);
    }
    template <bool PAIRS>
    void make(const float* left, const float* right, int64_t steps) {
        __m512 made[ROWS][VECTORS];
        for (int i = 0; i < ROWS * VECTORS; i++) (&made[0][0])[i] = _mm512_setzero_ps();
        for (int64_t s = 0; s < steps; s++, left += ROWS, right += PANEL) {
            __m512 part[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) part[v] = _mm512_loadu_ps(right + v * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const __m512 one = _mm512_set1_ps(left[r]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) made[r][v] = add_product<PAIRS>(made[r][v], one, part[v]);
            }
        }
        std::memcpy(sum, made, sizeof(sum));
    }
    template <class Use>
    void each(int64_t row, int64_t column, int64_t features, Use use) const {
        for (int64_t r = 0; r < std::min(ROWS, features - row); r++)
            for (int64_t v = 0; v < VECTORS; v++) {
                const int64_t first = column + v * LANES;
                const int64_t count = std::clamp(features - first, int64_t{0}, LANES);
                use(row + r, first, static_cast<__mmask16>((1u << count) - 1), sum[r][v]);
            }
    }
};

// Calls make(row, column) for the corner of every tile that has something right of the diagonal.
template <class Make>
void tiles(int64_t features, Make make) {
    const int64_t panels = parts(features, PANEL);
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < panels; n++) {
        const int64_t column = (panels - 1 - n) * PANEL;  // the longest first
        for (int64_t row = 0; row < std::min(column + PANEL, features); row += ROWS) make(row, column);
    }
}

}  // namespace

extern "C" {

// Adds x^T x to sums (features, features), right of its diagonal at least. x (tokens, features), float32 or
// bfloat16 (if half); each token counts as if it were multiplied by its `scale` (tokens,), where there is one.
// Of `pairs` the numbers are rounded to bfloat16 then.
void luthier_gram(const void* x, int half, int pairs, const float* scale, float* sums, int64_t tokens,
                  int64_t features, int threads) {
    Sides sides(features, CHUNK, pairs);
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<float[]> step(new float[features]);
        for (int64_t start = 0; start < tokens; start += CHUNK) {
            const int64_t count = std::min(CHUNK, tokens - start);
            const int64_t steps = sides.fill(x, half, scale, start, count, step.get());
            tiles(features, [&](int64_t row, int64_t column) {
                Tile(sides, row, column, steps)
                    .each(row, column, features, [&](int64_t i, int64_t j, __mmask16 lanes, __m512 sum) {
                        float* to = sums + i * features + j;
                        _mm512_mask_storeu_ps(to, lanes,
                                              _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), sum));
                    });
            });
        }
    }
}

// tr(x H x^T) of x (tokens, features), rounded to bfloat16, and a symmetric H (features, features), of which only
// what lies right of the diagonal is read.
double luthier_square(const float* x, const float* hessian, int64_t tokens, int64_t features, int threads) {
    Sides sides(features, tokens, true);
    std::vector<double> found(parts(features, PANEL));  // of each panel: the sum is the same with any threads
    const __m512i counted = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<float[]> step(new float[features]);
        const int64_t steps = sides.fill(x, false, nullptr, 0, tokens, step.get());
        tiles(features, [&](int64_t row, int64_t column) {
            __m512 on = _mm512_setzero_ps(), right = _mm512_setzero_ps();
            Tile(sides, row, column, steps)
                .each(row, column, features, [&](int64_t i, int64_t j, __mmask16 lanes, __m512 sum) {
                    const __m512i place = _mm512_add_epi32(counted, _mm512_set1_epi32(j - i));
                    const __m512 h = _mm512_maskz_loadu_ps(lanes, hessian + i * features + j);
                    const __mmask16 beyond = _mm512_cmpgt_epi32_mask(place, _mm512_setzero_si512());
                    right = _mm512_mask3_fmadd_ps(h, sum, right, beyond);
                    on = _mm512_mask3_fmadd_ps(h, sum, on, _mm512_testn_epi32_mask(place, place));
                });
            found[column / PANEL] += _mm512_reduce_add_ps(on) + 2.0 * _mm512_reduce_add_ps(right);
        });
    }
    return std::accumulate(found.begin(), found.end(), 0.0);
}
}
