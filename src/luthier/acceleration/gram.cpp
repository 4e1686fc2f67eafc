// Sums x^T x on a CPU with AVX-512, compiled and called by `native.py`: those of a calibration pass, and what a
// change of weights does under them.
//
// Both sides of the product are laid out as they are read: columns of the right one in panels of 64, four
// registers; columns of the left one by six, whose 24 sums stay in registers. What lies left of the diagonal is
// not computed.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

constexpr int64_t LANES = 16, VECTORS = 4, PANEL = VECTORS * LANES, ROWS = 6;
constexpr int64_t CHUNK = 192;  // tokens: a panel of them stays near

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

// Some tokens of x (tokens, features), laid out twice.
struct Sides {
    const int64_t features, most;
    std::unique_ptr<float[]> lefts, rights;

    Sides(int64_t features, int64_t most)
        : features(features), most(most), lefts(new float[parts(features, ROWS) * ROWS * most]),
          rights(new float[parts(features, PANEL) * PANEL * most]) {
        const int64_t six = parts(features, ROWS) - 1, panel = parts(features, PANEL) - 1;
        std::fill(left(six * ROWS), left(six * ROWS) + ROWS * most, 0.f);
        std::fill(right(panel * PANEL), right(panel * PANEL) + PANEL * most, 0.f);
    }
    float* left(int64_t column) const { return &lefts[column * most]; }
    float* right(int64_t column) const { return &rights[column * most]; }

    // By all threads together; `token` (features) is each one's own.
    void fill(const void* x, bool half, const float* scale, int64_t start, int64_t count, float* token) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; t++) {
            widen(x, half, (start + t) * features, features, token);
            if (scale)
                for (int64_t i = 0; i < features; i++) token[i] *= scale[start + t];
            lay_out<PANEL>(token, t, rights.get());
            lay_out<ROWS>(token, t, lefts.get());
        }
    }
    template <int64_t WIDTH>
    void lay_out(const float* token, int64_t t, float* side) const {
        int64_t i = 0;
        for (; i + WIDTH <= features; i += WIDTH)  // of a size that the compiler knows
            std::memcpy(side + i * most + t * WIDTH, token + i, WIDTH * sizeof(float));
        std::copy_n(token + i, features - i, side + i * most + t * WIDTH);
    }
};

// Six rows and 64 columns of x^T x.
struct Tile {
    __m512 sum[ROWS][VECTORS];

    Tile(const float* left, const float* right, int64_t tokens) {
        for (int i = 0; i < ROWS * VECTORS; i++) (&sum[0][0])[i] = _mm512_setzero_ps();
        for (int64_t t = 0; t < tokens; t++, left += ROWS, right += PANEL) {
            __m512 part[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) part[v] = _mm512_loadu_ps(right + v * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                const __m512 one = _mm512_set1_ps(left[r]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_fmadd_ps(one, part[v], sum[r][v]);
            }
        }
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
void luthier_gram(const void* x, int half, const float* scale, float* sums, int64_t tokens, int64_t features,
                  int threads) {
    Sides sides(features, CHUNK);
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<float[]> token(new float[features]);
        for (int64_t start = 0; start < tokens; start += CHUNK) {
            const int64_t count = std::min(CHUNK, tokens - start);
            sides.fill(x, half, scale, start, count, token.get());
            tiles(features, [&](int64_t row, int64_t column) {
                Tile(sides.left(row), sides.right(column), count)
                    .each(row, column, features, [&](int64_t i, int64_t j, __mmask16 lanes, __m512 sum) {
                        float* to = sums + i * features + j;
                        _mm512_mask_storeu_ps(to, lanes,
                                              _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), sum));
                    });
            });
        }
    }
}

// tr(x H x^T) of x (tokens, features) and a symmetric H (features, features), of which only what lies right of
// the diagonal is read.
double luthier_square(const float* x, const float* hessian, int64_t tokens, int64_t features, int threads) {
    double total = 0;
    Sides sides(features, tokens);
    const __m512i counted = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const std::unique_ptr<float[]> token(new float[features]);
        sides.fill(x, false, nullptr, 0, tokens, token.get());
        tiles(features, [&](int64_t row, int64_t column) {
            __m512 on = _mm512_setzero_ps(), right = _mm512_setzero_ps();
            Tile(sides.left(row), sides.right(column), tokens)
                .each(row, column, features, [&](int64_t i, int64_t j, __mmask16 lanes, __m512 sum) {
                    const __m512i place = _mm512_add_epi32(counted, _mm512_set1_epi32(j - i));
                    const __m512 h = _mm512_maskz_loadu_ps(lanes, hessian + i * features + j);
                    const __mmask16 beyond = _mm512_cmpgt_epi32_mask(place, _mm512_setzero_si512());
                    right = _mm512_mask3_fmadd_ps(h, sum, right, beyond);
                    on = _mm512_mask3_fmadd_ps(h, sum, on, _mm512_testn_epi32_mask(place, place));
                });
            total += _mm512_reduce_add_ps(on) + 2.0 * _mm512_reduce_add_ps(right);
        });
    }
    return total;
}
}
