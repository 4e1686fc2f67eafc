// Products of quantised weights on a CPU with AVX-512 BF16 and VNNI, compiled and called by `native.py`.
//
// Rows of output stand in tiles of 16, the lanes of a register. A load of 64 bytes has a lane's next inputs:
// 8 codes of 4 bits, 4 of 8, or a pair in bfloat16. Tiles come in pairs; rows beyond the last are padding.

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <memory>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t MANY = 16;     // rows of input from which it pays to write a pair of tiles out in bfloat16
constexpr int64_t AHEAD = 4096;  // bytes asked of the memory before they are needed (measured, Zen 5)
constexpr float TINY = 1e-10f;   // least step of inputs, as in compression/grid.py

struct Weight {
    const uint8_t* codes;
    const uint16_t *scale, *zero;  // bfloat16 (tile, group, lane); zero may be null
    int64_t inputs, group;
};

uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

__m512i broadcast(const void* four_bytes) {
    int32_t value;
    memcpy(&value, four_bytes, 4);
    return _mm512_set1_epi32(value);
}

__m512 widen(const void* bf16, __mmask16 mask = 0xffff) {
    const __m512i lower = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bf16));
    return _mm512_castsi512_ps(_mm512_slli_epi32(lower, 16));
}

__m512bh half(const uint16_t* x, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16(count >= 2 * LANES ? ~0u : (1u << count) - 1, x);
}

void store(void* y, bool wide, int64_t at, __m512 value, __mmask16 mask) {
    if (wide)
        _mm512_mask_storeu_ps(static_cast<float*>(y) + at, mask, value);
    else
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

int64_t chunk(int64_t rows) { return rows >= 6 ? 6 : rows >= 3 ? 3 : rows; }

__mmask16 first(int64_t count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// A half of a lane indexes a table by its lowest five bits; the fifth belongs to a neighbour, so each value
// stands twice.
struct Tables {
    alignas(64) uint16_t whole[32], low[32], high[32];  // code - 8; what the halves of 8 bits stand for
    Tables() {
        for (int i = 0; i < 32; i++) {
            whole[i] = bits_of(i % 16 - 8.f) >> 16;
            low[i] = bits_of(i % 16) >> 16;
            high[i] = bits_of((i % 16 - 8) * 16.f) >> 16;
        }
    }
} const tables;

// R rows of input times T tiles, row r and tile t to total[2 r + t]. C sums each: a product must not wait for
// the one before it.
template <int BITS, int T, int R, int C>
void tile(const Weight& w, const uint16_t* x, const float* sums, __m512* total) {
    constexpr int64_t STEP = 32 / BITS;
    constexpr int PARTS = BITS == 16 ? 1 : 4;
    const __m512i low = _mm512_load_si512(BITS == 4 ? tables.whole : tables.low);
    const __m512i high = _mm512_load_si512(tables.high);
    const int64_t groups = w.inputs / w.group, width = w.inputs * 2 * BITS;
    const uint8_t* codes = w.codes;
    for (int i = 0; i < 2 * R; i += T == 2 ? 1 : 2) total[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512 sum[R][T][C];
        for (int i = 0; i < R * T * C; i++) (&sum[0][0][0])[i] = _mm512_setzero_ps();
        for (int64_t k = g * w.group; k < (g + 1) * w.group; k += STEP, codes += 64) {
            __m512i v[T];
            for (int t = 0; t < T; t++) {
                v[t] = _mm512_loadu_si512(codes + t * width);
                _mm_prefetch(codes + t * width + AHEAD, _MM_HINT_T0);
            }
#pragma GCC unroll 4
            for (int j = 0; j < PARTS; j++) {
                __m512bh pair[T];
#pragma GCC unroll 2
                for (int t = 0; t < T; t++)
                    pair[t] = (__m512bh)(BITS == 16 ? v[t]
                                         : _mm512_permutexvar_epi16(_mm512_srli_epi32(v[t], 4 * j),
                                                                    BITS == 8 && j % 2 ? high : low));
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const __m512bh input =
                        (__m512bh)broadcast(x + r * w.inputs + k + 2 * (BITS == 8 ? j / 2 : j));
#pragma GCC unroll 2
                    for (int t = 0; t < T; t++)
                        sum[r][t][j % C] = _mm512_dpbf16_ps(sum[r][t][j % C], pair[t], input);
                }
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) {
            const int64_t at = (t * groups + g) * LANES;
            const __m512 scale = widen(w.scale + at);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                __m512 all = sum[r][t][0];
                for (int c = 1; c < C; c++) all = _mm512_add_ps(all, sum[r][t][c]);
                if (w.zero)
                    all = _mm512_fnmadd_ps(widen(w.zero + at), _mm512_set1_ps(sums[r * groups + g]), all);
                total[2 * r + t] = _mm512_fmadd_ps(all, scale, total[2 * r + t]);
            }
        }
    }
}

float sum_of(const uint16_t* x, int64_t count) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k += 2 * LANES)
        sum = _mm512_dpbf16_ps(sum, half(x + k, count - k), ones);
    return _mm512_reduce_add_ps(sum);
}

// A pair of tiles, their codes as bfloat16.
template <int BITS>
void expand(const Weight& w, uint16_t* made) {
    const __m512i table = _mm512_load_si512(tables.whole);
    for (int64_t at = 0; at < w.inputs * 4 * BITS; at += 64, made += LANES * 32 / BITS) {
        const __m512i v = _mm512_loadu_si512(w.codes + at);
        if (BITS == 4) {
            for (int j = 0; j < 4; j++)
                _mm512_storeu_si512(made + 2 * LANES * j,
                                    _mm512_permutexvar_epi16(_mm512_srli_epi32(v, 4 * j), table));
        } else {
            auto number = [&](int byte) {  // of each lane, as float: its upper half is exact
                const __m512i moved = _mm512_slli_epi32(v, 24 - 8 * byte);
                const __m512i code = _mm512_xor_si512(moved, _mm512_set1_epi32(1 << 31));
                return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(code, 24)));
            };
            for (int j = 0; j < 2; j++)  // in the order of `shifts` in native_linear.py
                _mm512_storeu_si512(made + 2 * LANES * j,
                                    _mm512_or_si512(_mm512_srli_epi32(number(j), 16), number(j + 2)));
        }
    }
}

template <int BITS>
void product(const Weight& w, const uint16_t* x, void* y, bool wide, int64_t rows, int64_t outputs,
             int threads) {
    const int64_t groups = w.inputs / w.group;
    std::unique_ptr<float[]> sums(w.zero ? new float[rows * groups] : nullptr);  // of a row's groups
#pragma omp parallel num_threads(threads)
    {
        if (w.zero) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < rows * groups; i++) sums[i] = sum_of(x + i * w.group, w.group);
        }
        std::unique_ptr<uint16_t[]> made(rows < MANY ? nullptr : new uint16_t[w.inputs * 2 * LANES]);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < outputs; n += 2 * LANES) {
            const Weight here = {w.codes + n * w.inputs * BITS / 8, w.scale + n * groups,
                                 w.zero ? w.zero + n * groups : nullptr, w.inputs, w.group};
            const Weight next = {here.codes + w.inputs * 2 * BITS, here.scale + LANES * groups,
                                 w.zero ? here.zero + LANES * groups : nullptr, w.inputs, w.group};
            Weight plain = here;
            if (made) {
                expand<BITS>(here, made.get());
                plain.codes = reinterpret_cast<uint8_t*>(made.get());
            }
            __m512 total[12];
            for (int64_t r = 0, count; r < rows; r += count) {
                const uint16_t* from = x + r * w.inputs;
                const float* sum = w.zero ? &sums[r * groups] : nullptr;
                count = chunk(rows - r);
                if (count == 6 && made)
                    tile<16, 2, 6, 1>(plain, from, sum, total);
                else if (count == 6)
                    tile<BITS, 2, 6, 1>(here, from, sum, total);
                else if (count == 3)
                    tile<BITS, 2, 3, 2>(here, from, sum, total);
                else {
                    const auto one = count == 2 ? tile<BITS, 1, 2, 2> : tile<BITS, 1, 1, 4>;
                    one(here, from, sum, total);
                    one(next, from, sum, total + 1);
                }
                for (int64_t i = 0; i < count; i++)
                    for (int t = 0; t < 2; t++)
                        store(y, wide, (r + i) * outputs + n + t * LANES, total[2 * i + t],
                              first(outputs - n - t * LANES));
            }
        }
    }
}

// Inputs in whole numbers; returns their step. `made` is zero from `inputs` on, to a full register.
float round_row(const void* x, bool wide, int64_t inputs, float step, int bits, int8_t* made, int32_t* sum) {
    auto load = [&](int64_t k) {
        const __mmask16 mask = first(inputs - k);
        return wide ? _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + k)
                    : widen(static_cast<const uint16_t*>(x) + k, mask);
    };
    if (step == 0) {
        __m512i peak = _mm512_setzero_si512();  // as whole numbers, of which NaN has the greatest
        for (int64_t k = 0; k < inputs; k += LANES)
            peak = _mm512_max_epu32(peak, _mm512_castps_si512(_mm512_abs_ps(load(k))));
        const uint32_t most = _mm512_reduce_max_epu32(peak);
        memcpy(&step, &most, 4);
        step /= ((1 << bits) - 1) / 2.f;
        step = step < TINY ? TINY : step;
    }
    const __m512 low = _mm512_set1_ps(-(1 << (bits - 1))), high = _mm512_set1_ps((1 << (bits - 1)) - 1);
    __m512i total = _mm512_setzero_si512();
    for (int64_t k = 0; k < inputs; k += LANES) {
        const __m512 value = _mm512_roundscale_ps(_mm512_div_ps(load(k), _mm512_set1_ps(step)), 0);
        const __m512i code = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(value, low), high));
        total = _mm512_add_epi32(total, code);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(made + k), _mm512_cvtepi32_epi8(code));
    }
    *sum = _mm512_reduce_add_epi32(total);
    return step;
}

template <int T, int R, int C>
void whole_tile(const uint8_t* codes, const int8_t* x, int64_t inputs, __m512i* total) {
    __m512i sum[R][T][C];
    for (int i = 0; i < R * T * C; i++) (&sum[0][0][0])[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < inputs; k += 4 * C)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            __m512i v[T];
#pragma GCC unroll 2
            for (int t = 0; t < T; t++) v[t] = _mm512_loadu_si512(codes + (t * inputs + k + 4 * c) * LANES);
            _mm_prefetch(codes + (k + 4 * c) * LANES + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const __m512i input = broadcast(x + r * inputs + k + 4 * c);
#pragma GCC unroll 2
                for (int t = 0; t < T; t++) sum[r][t][c] = _mm512_dpbusd_epi32(sum[r][t][c], v[t], input);
            }
        }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            __m512i all = sum[r][t][0];
            for (int c = 1; c < C; c++) all = _mm512_add_epi32(all, sum[r][t][c]);
            total[2 * r + t] = all;
        }
}

}  // namespace

extern "C" {

// y = x W^T: x bfloat16 (rows, inputs), y float32 (if wide) or bfloat16 (rows, outputs).
void luthier_weight_only(int bits, const uint8_t* codes, const uint16_t* scale, const uint16_t* zero,
                         const uint16_t* x, void* y, int wide, int64_t rows, int64_t inputs, int64_t outputs,
                         int64_t group, int threads) {
    const auto kernel = bits == 4 ? product<4> : product<8>;
    kernel({codes, scale, zero, inputs, group}, x, y, wide, rows, outputs, threads);
}

// y = (p q^T - z sum(p)) t s with p = round(x / t), and t of each row where `step` is 0. The codes are
// q + 128, which the instruction takes as unsigned, so `offset` is z + 128. `padded` inputs fill registers.
void luthier_whole_numbers(const uint8_t* codes, const int32_t* offset, const float* scale, const void* x,
                           void* y, int wide, float step, int bits, int64_t rows, int64_t inputs,
                           int64_t padded, int64_t outputs, int threads) {
    std::unique_ptr<int8_t[]> whole(new int8_t[rows * padded]);
    std::unique_ptr<float[]> steps(new float[rows]);
    std::unique_ptr<int32_t[]> sums(new int32_t[rows]);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const char* row = static_cast<const char*>(x) + r * inputs * (wide ? 4 : 2);
            steps[r] = round_row(row, wide, inputs, step, bits, &whole[r * padded], &sums[r]);
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < outputs; n += 2 * LANES) {
            const uint8_t* here = codes + n * padded;
            __m512i total[12];
            for (int64_t r = 0, count; r < rows; r += count) {
                const int8_t* from = &whole[r * padded];
                count = chunk(rows - r);
                if (count == 6)
                    whole_tile<2, 6, 1>(here, from, padded, total);
                else if (count == 3)
                    whole_tile<2, 3, 2>(here, from, padded, total);
                else {
                    const auto one = count == 2 ? whole_tile<1, 2, 4> : whole_tile<1, 1, 4>;
                    one(here, from, padded, total);
                    one(here + padded * LANES, from, padded, total + 1);
                }
                for (int64_t i = 0; i < count; i++)
                    for (int t = 0; t < 2; t++) {
                        const int64_t at = n + t * LANES;
                        const __mmask16 mask = first(outputs - at);
                        const __m512i less = _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(mask, offset + at),
                                                                _mm512_set1_epi32(sums[r + i]));
                        const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(total[2 * i + t], less));
                        const __m512 stepped = _mm512_mul_ps(exact, _mm512_set1_ps(steps[r + i]));
                        store(y, wide, (r + i) * outputs + at,
                              _mm512_mul_ps(stepped, _mm512_maskz_loadu_ps(mask, scale + at)), mask);
                    }
            }
        }
    }
}

// One row of input times a plain weight, bfloat16 (outputs, inputs) as it lies.
void luthier_one_row(const uint16_t* weight, const uint16_t* x, uint16_t* y, int64_t inputs, int64_t outputs,
                     int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < outputs; n += LANES) {
        float sums[LANES] = {};
        for (int64_t i = 0; i < LANES && n + i < outputs; i++) {
            const uint16_t* row = weight + (n + i) * inputs;
            __m512 sum[4] = {};
            int64_t k = 0;
            for (; k + 128 <= inputs; k += 128)
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) {
                    _mm_prefetch(row + k + 32 * c + AHEAD / 2, _MM_HINT_T0);
                    sum[c] = _mm512_dpbf16_ps(sum[c], (__m512bh)_mm512_loadu_si512(row + k + 32 * c),
                                              (__m512bh)_mm512_loadu_si512(x + k + 32 * c));
                }
            for (; k < inputs; k += 32)
                sum[0] = _mm512_dpbf16_ps(sum[0], half(row + k, inputs - k), half(x + k, inputs - k));
            sum[0] = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
            sums[i] = _mm512_reduce_add_ps(sum[0]);
        }
        store(y, false, n, _mm512_loadu_ps(sums), first(outputs - n));
    }
}
}
