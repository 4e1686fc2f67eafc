// The column sweep of GPTQ and SparseGPT on a CPU with AVX-512, compiled and called by `native.py`.
//
// Matrices lie column after column, (columns, rows): rows do not know of each other, and 48 of them, three
// registers, go through all columns alone. To a few columns first what earlier changes ask of them is added,
// eight columns at a time, whose 24 sums stay in registers; then they are settled one after the other.

#include <algorithm>
#include <numeric>
#include <vector>

#include "strips.h"

namespace {

constexpr int64_t CLOSE = 32;  // columns that are settled one by one: a multiple of PANEL

__mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (1u << count) - 1; }

// Places of 16 numbers one below the other.
__m512i along(int64_t columns) {
    return _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                              _mm512_set1_epi32(columns));
}

// Up to 48 rows of a matrix with so many.
struct Strip {
    int64_t row, rows;
    __mmask16 lanes[VECTORS];

    Strip(int64_t row, int64_t rows) : row(row), rows(rows) {
        for (int64_t v = 0; v < VECTORS; v++)
            lanes[v] = first(std::max(rows - row - v * LANES, int64_t{0}));
    }
    void load(const float* matrix, int64_t column, float* to) const {
        for (int64_t v = 0; v < VECTORS; v++)
            _mm512_store_ps(to + v * LANES, _mm512_maskz_loadu_ps(lanes[v], at(matrix, column, v)));
    }
    void store(const float* from, float* matrix, int64_t column) const {
        for (int64_t v = 0; v < VECTORS; v++)
            _mm512_mask_storeu_ps(at(matrix, column, v), lanes[v], _mm512_load_ps(from + v * LANES));
    }
    template <class T>
    T* at(T* matrix, int64_t column, int64_t v) const {
        return matrix + column * rows + row + v * LANES;
    }
};

// Steps and codes of zero of each group, (groups, rows), and what codes there are. No scale: no grid.
struct Grid {
    const float *scale, *zero;
    const int64_t* group;  // of each column
    float low, high;

    __m512 nearest(__m512 value, int64_t column, const Strip& strip, int64_t v) const {
        if (!scale) return value;
        const __mmask16 lanes = strip.lanes[v];
        const __m512 step =
            _mm512_mask_loadu_ps(_mm512_set1_ps(1.f), lanes, strip.at(scale, group[column], v));
        const __m512 origin =
            zero ? _mm512_maskz_loadu_ps(lanes, strip.at(zero, group[column], v)) : _mm512_setzero_ps();
        __m512 code = _mm512_add_ps(_mm512_roundscale_ps(_mm512_div_ps(value, step), 0), origin);
        code = _mm512_min_ps(_mm512_max_ps(code, _mm512_set1_ps(low)), _mm512_set1_ps(high));
        return _mm512_mul_ps(_mm512_sub_ps(code, origin), step);
    }
};

// The part of V, (columns, columns), from row `first` on and within columns `start` to `stop`, as it is read:
// eight columns side by side, row after row. Filled by all threads together.
struct Panels {
    const int64_t first, start, stop, columns, length;
    std::unique_ptr<float[]> packed;

    Panels(int64_t first, int64_t start, int64_t stop, int64_t columns)
        : first(first), start(start), stop(stop), columns(columns), length((stop - first) * PANEL),
          packed(new float[(stop - start + PANEL - 1) / PANEL * length]) {}

    void fill(const float* unit) {
#pragma omp for schedule(dynamic)
        for (int64_t k = start; k < stop; k += PANEL) {
            const int64_t count = std::min(PANEL, stop - k);
            float* to = of(k);
            for (int64_t j = first; j < k; j++, to += PANEL) {
                for (int64_t i = 0; i < count; i++) to[i] = unit[j * columns + k + i];
                for (int64_t i = count; i < PANEL; i++) to[i] = 0;
            }
        }
    }
    float* of(int64_t column) const { return &packed[(column - start) / PANEL * length]; }
};

}  // namespace

extern "C" {

// Row by row matrices (rows, columns) as the sweep has them: made (columns, rows), column k that of `order`.
void luthier_take_columns(const float* matrix, const int64_t* order, float* made, int64_t rows, int64_t columns,
                          int threads) {
    const __m512i down = along(columns);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row += LANES) {
        const __mmask16 lanes = first(rows - row);
        for (int64_t k = 0; k < columns; k++)
            _mm512_mask_storeu_ps(made + k * rows + row, lanes,
                                  _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, down,
                                                           matrix + row * columns + order[k], sizeof(float)));
    }
}

// The way back.
void luthier_put_columns(const float* made, const int64_t* order, float* matrix, int64_t rows, int64_t columns,
                         int threads) {
    const __m512i down = along(columns);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row += LANES) {
        const __mmask16 lanes = first(rows - row);
        for (int64_t k = 0; k < columns; k++)
            _mm512_mask_i32scatter_ps(matrix + row * columns + order[k], lanes, down,
                                      _mm512_maskz_loadu_ps(lanes, made + k * rows + row), sizeof(float));
    }
}

// Brings columns `start` to `stop` of w up to date with what was changed in those from `first` on, up to them.
// w, changes (columns, rows); unit (columns, columns).
void luthier_catch_up(float* w, const float* changes, const float* unit, int64_t rows, int64_t columns,
                      int64_t first, int64_t start, int64_t stop, int threads) {
    Panels panels(first, start, stop, columns);
#pragma omp parallel num_threads(threads)
    {
        panels.fill(unit);
        const Buffer known = buffer(start - first), some = buffer(PANEL);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < rows; row += STRIP) {
            const Strip strip(row, rows);
            for (int64_t j = first; j < start; j++) strip.load(changes, j, &known[(j - first) * STRIP]);
            for (int64_t k = start; k < stop; k += PANEL) {
                const int64_t count = std::min(PANEL, stop - k);
                for (int64_t i = 0; i < count; i++) strip.load(w, k + i, &some[i * STRIP]);
                accumulate<true, PANEL>(some.get(), known.get(), panels.of(k), start - first);
                for (int64_t i = 0; i < count; i++) strip.store(&some[i * STRIP], w, k + i);
            }
        }
    }
}

// Settles columns `start` to `stop` of w, which are up to date with what was changed before. Returns what that
// costs: the sum of (roots (w - w'))^2. before, the columns as they first were, changes and w are
// (columns, rows); zeros (stop - start, rows), or null, says what becomes zero.
double luthier_settle(float* w, const float* before, float* changes, const float* unit, const float* roots,
                      const float* scale, const float* zero, const int64_t* group, float low, float high,
                      const uint8_t* zeros, int64_t rows, int64_t columns, int64_t start, int64_t stop,
                      int threads) {
    const Grid grid = {scale, zero, group, low, high};
    Panels panels(start, start, stop, columns);
    std::vector<double> costs((rows + STRIP - 1) / STRIP);  // of each strip: the sum is the same with any threads
#pragma omp parallel num_threads(threads)
    {
        panels.fill(unit);
        const Buffer known = buffer(stop - start), close = buffer(CLOSE);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < rows; row += STRIP) {
            const Strip strip(row, rows);
            for (int64_t first = start; first < stop; first += CLOSE) {
                const int64_t last = std::min(first + CLOSE, stop);
                __m512 squares = _mm512_setzero_ps();
                for (int64_t k = first; k < last; k++) strip.load(w, k, &close[(k - first) * STRIP]);
                for (int64_t k = first; k < last && first > start; k += PANEL)
                    accumulate<true, PANEL>(&close[(k - first) * STRIP], known.get(), panels.of(k),
                                            first - start);
                for (int64_t j = first; j < last; j++) {
                    float *column = &close[(j - first) * STRIP], *change = &known[(j - start) * STRIP];
                    for (int64_t v = 0; v < VECTORS; v++) {
                        const __m512 now = _mm512_load_ps(column + v * LANES);
                        __mmask16 kept = strip.lanes[v];
                        if (zeros) {
                            const uint8_t* here = strip.at(zeros, j - start, v);
                            kept &= ~_mm512_cmpneq_epi32_mask(
                                _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(kept, here)), _mm512_setzero_si512());
                        }
                        const __m512 after = grid.nearest(_mm512_maskz_mov_ps(kept, now), j, strip, v);
                        const __m512 lost = _mm512_mul_ps(_mm512_sub_ps(now, after), _mm512_set1_ps(roots[j]));
                        const __m512 first_value = _mm512_maskz_loadu_ps(strip.lanes[v], strip.at(before, j, v));
                        squares = _mm512_fmadd_ps(lost, lost, squares);
                        _mm512_store_ps(column + v * LANES, after);
                        _mm512_store_ps(change + v * LANES, _mm512_sub_ps(first_value, after));
                    }
                    const float* factor = unit + j * columns;
                    for (int64_t k = j + 1; k < last; k++) {
                        float* later = &close[(k - first) * STRIP];
                        const __m512 share = _mm512_set1_ps(factor[k]);
                        for (int64_t v = 0; v < VECTORS * LANES; v += LANES)
                            _mm512_store_ps(later + v, _mm512_fmadd_ps(share, _mm512_load_ps(change + v),
                                                                       _mm512_load_ps(later + v)));
                    }
                    strip.store(column, w, j);
                    strip.store(change, changes, j);
                }
                costs[row / STRIP] += _mm512_reduce_add_ps(squares);
            }
        }
    }
    return std::accumulate(costs.begin(), costs.end(), 0.0);
}
}
