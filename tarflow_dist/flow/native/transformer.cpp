// A flow block's transformer for a few patches that follow those in a KV cache, in float32.
//
// One call takes the patches through all layers, so that a CPU spends its time on reading weights,
// keys and values. Each token is worked out by itself and in the same order of operations whatever
// comes along with it: its bits depend neither on the batch nor on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6;  // 24 sums, 4 weights and an input fill 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 2;
#elif defined(__ARM_NEON)
constexpr int LANES = 4, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 2;
#endif
constexpr int VECTORS = 4, PANEL = VECTORS * LANES;

typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

int panels_of(int columns) { return (columns + PANEL - 1) / PANEL; }

// e^x for x ≤ 0, to an ulp or two; at least e^-87
Vec exp_negative(Vec x) {
    const Vec least = Vec{} - 87.0f;
    x = x < least ? least : x;
    const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to a whole number
    const Vec n = (x * 1.44269504f + magic) - magic;
    const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
    Vec p = r * 1.98756915e-4f + 1.39819995e-3f;
    p = p * r + 8.33345190e-3f;
    p = p * r + 4.16657963e-2f;
    p = p * r + 1.66666655e-1f;
    p = p * r + 5.00000012e-1f;
    p = p * (r * r) + r + 1.0f;
    const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * (Vec)bits;
}

// x · Φ(x), with −ln(2 Φ(−|x|)) / |x| as a polynomial fitted on 0…9; error below 5e-8
Vec gelu(Vec x) {
    const Vec zero = {}, most = zero + 9.0f;
    Vec a = x < zero ? -x : x;
    a = a > most ? most : a;
    Vec p = a * 1.29948674e-8f - 4.48087292e-7f;
    p = p * a + 6.37496942e-6f;
    p = p * a - 4.76960013e-5f;
    p = p * a + 1.80629534e-4f;
    p = p * a + 2.01158891e-5f;
    p = p * a - 4.83419932e-3f;
    p = p * a + 3.63601632e-2f;
    p = p * a + 3.18304539e-1f;
    p = p * a + 7.97884941e-1f;
    const Vec tail = 0.5f * exp_negative(-a * p);
    return x * (x < zero ? tail : 1.0f - tail);
}

// All matrices that rows are multiplied with lie in panels of PANEL columns, [ins][PANEL] each.
// Meanwhile FETCHED · ins vectors from `ahead` on are brought into the cache.
template <int COUNT, int FETCHED = 0>
void multiply_panel(const float* panel, int ins, const float* x, int64_t x_stride,
                    Vec (&products)[COUNT][VECTORS], const float* ahead = nullptr) {
    Vec sums[COUNT][VECTORS] = {};
    for (int k = 0; k < ins; ++k, panel += PANEL) {
        for (int j = 0; j < FETCHED; ++j) __builtin_prefetch(ahead + (k * FETCHED + j) * LANES);
        Vec w[VECTORS];
        for (int j = 0; j < VECTORS; ++j) w[j] = load(panel + j * LANES);
        for (int r = 0; r < COUNT; ++r)
            for (int j = 0; j < VECTORS; ++j) sums[r][j] += x[r * x_stride + k] * w[j];
    }
    for (int r = 0; r < COUNT; ++r)
        for (int j = 0; j < VECTORS; ++j) products[r][j] = sums[r][j];
}

// The same for the rows from `first`, of `rows`. Where several groups of rows take turns with one
// panel, each brings in its share of the next, so that memory and arithmetic overlap.
template <int COUNT>
void multiply_group(const float* panel, int ins, const float* x, int first, int rows,
                    Vec (&products)[COUNT][VECTORS]) {
    const int shared = rows > ROWS ? VECTORS : 0;
    const int start = first * shared / rows, fetched = (first + COUNT) * shared / rows - start;
    const float* ahead = panel + int64_t(ins) * (PANEL + start * LANES);
    x += int64_t(first) * ins;
    if (fetched == 0) multiply_panel(panel, ins, x, ins, products);
    if (fetched == 1) multiply_panel<COUNT, 1>(panel, ins, x, ins, products, ahead);
    if (fetched == 2) multiply_panel<COUNT, 2>(panel, ins, x, ins, products, ahead);
    if (fetched == 3) multiply_panel<COUNT, 3>(panel, ins, x, ins, products, ahead);
}

// Calls work(count, first row) for all rows, with a count that is known to the compiler.
template <int COUNT = ROWS, class Work>
void by_rows(int first, int rows, const Work& work) {
    for (; rows - first >= COUNT; first += COUNT)
        work(std::integral_constant<int, COUNT>{}, first);
    if constexpr (COUNT > 1) by_rows<COUNT - 1>(first, rows, work);
}

struct Linear {
    const float *weight, *bias;
    int32_t ins, outs;
};

struct Norm {
    const float *weight, *bias;
    float eps;
};

struct Layer {
    Norm attention_norm;
    Linear qkv, proj;
    Norm mlp_norm;
    Linear up, down;
    float* keys;    // [sequence][head], and panels of places, [channel][PANEL]
    float* values;  // [sequence][head], and panels of channels, [place][PANEL]
};

struct Transformer {
    Linear input, output;
    const float* positions;  // [place][width]
    const float* classes;    // [sequence][width]
    const Layer* layers;
    int32_t num_layers;
};

enum class Then { STORE, GELU, ADD };

// out (rows, outs) from x (rows, ins); to be called by all threads of a team
template <Then THEN>
void multiply(const Linear& linear, const float* x, float* out, int rows) {
#pragma omp for schedule(static)
    for (int panel = 0; panel < panels_of(linear.outs); ++panel) {
        const float* weight = linear.weight + int64_t(panel) * linear.ins * PANEL;
        const int column = panel * PANEL, columns = std::min(PANEL, linear.outs - column);
        float bias[PANEL] = {};
        std::copy_n(linear.bias + column, columns, bias);
        by_rows(0, rows, [&](auto count, int first) {
            Vec sums[count][VECTORS];
            multiply_group(weight, linear.ins, x, first, rows, sums);
            for (int r = 0; r < count; ++r) {
                float* to = out + int64_t(first + r) * linear.outs + column;
                float result[PANEL] = {};
                if (THEN == Then::ADD) std::copy_n(to, columns, result);
                for (int j = 0; j < VECTORS; ++j) {
                    const Vec v = sums[r][j] + load(bias + j * LANES);
                    const Vec before = load(result + j * LANES);
                    store(result + j * LANES, THEN == Then::GELU ? gelu(v) : before + v);
                }
                std::copy_n(result, columns, to);
            }
        });
    }
}

// out (rows, width) from x; to be called by all threads of a team
void normalize(const Norm& norm, const float* x, float* out, int rows, int width) {
#pragma omp for schedule(static)
    for (int row = 0; row < rows; ++row) {
        const float* from = x + int64_t(row) * width;
        float* to = out + int64_t(row) * width;
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < width; ++i) sum += from[i];
        const float mean = sum / width;
#pragma omp simd reduction(+ : squares)
        for (int i = 0; i < width; ++i) squares += (from[i] - mean) * (from[i] - mean);
        const float scale = 1 / std::sqrt(squares / width + norm.eps);
        for (int i = 0; i < width; ++i)
            to[i] = (from[i] - mean) * scale * norm.weight[i] + norm.bias[i];
    }
}

// scores[0…count) → e^(scale · (score − largest)), 0 from there to `end`; returns their sum
float exponentials(float* scores, int count, int end, float scale) {
    std::fill(scores + count, scores + end, -std::numeric_limits<float>::infinity());
    Vec largest = load(scores);
    for (int n = LANES; n < end; n += LANES) {
        const Vec s = load(scores + n);
        largest = largest < s ? s : largest;
    }
    float most = largest[0];
    for (int lane = 1; lane < LANES; ++lane) most = std::max(most, largest[lane]);
    Vec sums = {};
    for (int n = 0; n < end; n += LANES) {
        const Vec e = exp_negative((load(scores + n) - most) * scale);
        store(scores + n, e);
        sums += e;
    }
    std::fill(scores + count, scores + end, 0.0f);
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
    return sum;
}

// The tokens of a call. Token i of a sequence stands at place[sequence · tokens + i].
struct Tokens {
    int32_t batch, tokens, width, heads, num_patches;
    const int32_t* place;      // never descending in a sequence
    const float* logit_scale;  // (batch), multiplies the attention logits

    int rows() const { return batch * tokens; }
    int channels() const { return width / heads; }
    int64_t keys_size() const { return int64_t(panels_of(num_patches)) * PANEL * channels(); }
    int64_t values_size() const { return int64_t(panels_of(channels())) * PANEL * num_patches; }
};

// h (rows, width) from the patches x (rows, ins); to be called by all threads of a team
void embed(const Tokens& t, const Transformer& transformer, const float* x, float* h) {
    multiply<Then::STORE>(transformer.input, x, h, t.rows());
#pragma omp for schedule(static)
    for (int row = 0; row < t.rows(); ++row) {
        const float* position = transformer.positions + int64_t(t.place[row]) * t.width;
        const float* of_class = transformer.classes + int64_t(row / t.tokens) * t.width;
        for (int i = 0; i < t.width; ++i) h[int64_t(row) * t.width + i] += position[i] + of_class[i];
    }
}

// Puts one head's keys and values of one sequence where they belong; k and v lie 3 · width apart.
void remember(const Tokens& t, const int32_t* place, const float* k, const float* v, float* keys,
              float* values) {
    for (int i = 0; i < t.tokens; ++i, k += 3 * t.width, v += 3 * t.width) {
        float* key = keys + int64_t(place[i] / PANEL) * t.channels() * PANEL + place[i] % PANEL;
        for (int c = 0; c < t.channels(); ++c) {
            key[c * PANEL] = k[c];
            values[(int64_t(c / PANEL) * t.num_patches + place[i]) * PANEL + c % PANEL] = v[c];
        }
    }
}

// One head of one sequence: each query, 3 · width apart, over the places up to its own.
// `scores` has room for all places, in panels, of each token.
void attend(const Tokens& t, const int32_t* place, const float* q, const float* keys,
            const float* values, float scale, float* scores, float* out) {
    const int channels = t.channels(), stop = place[t.tokens - 1] + 1;
    const int end = panels_of(stop) * PANEL;
    for (int panel = 0; panel < panels_of(stop); ++panel)
        by_rows(0, t.tokens, [&](auto count, int first) {
            Vec sums[count][VECTORS];
            multiply_panel(keys + int64_t(panel) * channels * PANEL, channels,
                           q + int64_t(first) * 3 * t.width, 3 * t.width, sums);
            for (int r = 0; r < count; ++r)
                for (int j = 0; j < VECTORS; ++j)
                    store(scores + int64_t(first + r) * end + panel * PANEL + j * LANES, sums[r][j]);
        });
    std::vector<float> total(t.tokens);
    for (int i = 0; i < t.tokens; ++i)
        total[i] = exponentials(scores + int64_t(i) * end, place[i] + 1, end, scale);
    for (int panel = 0; panel < panels_of(channels); ++panel)
        by_rows(0, t.tokens, [&](auto count, int first) {
            Vec sums[count][VECTORS];
            multiply_panel(values + int64_t(panel) * t.num_patches * PANEL, stop,
                           scores + int64_t(first) * end, end, sums);
            for (int r = 0; r < count; ++r) {
                float result[PANEL];
                for (int j = 0; j < VECTORS; ++j)
                    store(result + j * LANES, sums[r][j] / total[first + r]);
                std::copy_n(result, std::min(PANEL, channels - panel * PANEL),
                            out + int64_t(first + r) * t.width + panel * PANEL);
            }
        });
}

// out (rows, width) from qkv (rows, 3 · width); to be called by all threads of a team
void attention(const Tokens& t, const Layer& layer, const float* qkv, float* scores, float* out) {
#pragma omp for schedule(static) collapse(2)
    for (int sequence = 0; sequence < t.batch; ++sequence)
        for (int head = 0; head < t.heads; ++head) {
            const int64_t number = int64_t(sequence) * t.heads + head;
            const int64_t row = int64_t(sequence) * t.tokens;
            float* keys = layer.keys + number * t.keys_size();
            float* values = layer.values + number * t.values_size();
            const float* q = qkv + row * 3 * t.width + head * t.channels();
            remember(t, t.place + row, q + t.width, q + 2 * t.width, keys, values);
            attend(t, t.place + row, q, keys, values, t.logit_scale[sequence], scores,
                   out + row * t.width + head * t.channels());
        }
}

}  // namespace

extern "C" {

// The sizes of one head's keys and values in one sequence.
int64_t keys_size(const Tokens* tokens) { return tokens->keys_size(); }

int64_t values_size(const Tokens* tokens) { return tokens->values_size(); }

// The size of a weight (outs, ins) in panels.
int64_t packed_size(int32_t outs, int32_t ins) { return int64_t(panels_of(outs)) * PANEL * ins; }

void pack(const float* weight, int32_t outs, int32_t ins, float* packed, int32_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int panel = 0; panel < panels_of(outs); ++panel)
        for (int start = 0; start < ins; start += 16)  // a cache line of each row at a time
            for (int j = 0; j < PANEL; ++j) {
                const int row = panel * PANEL + j;
                for (int k = start; k < std::min(start + 16, ins); ++k)
                    packed[(int64_t(panel) * ins + k) * PANEL + j] =
                        row < outs ? weight[int64_t(row) * ins + k] : 0;
            }
}

// Patches x (batch, tokens, ins) → out (batch, tokens, outs). A token sees what is kept of the places
// up to its own, by earlier calls and by this one.
void extend(const Transformer* transformer, const Tokens* tokens, const float* x, float* out,
            int32_t threads) {
    const Tokens& t = *tokens;
    std::vector<float> h(int64_t(t.rows()) * t.width), normed(h.size());
    std::vector<float> wide(4 * h.size());  // q, k, v, or the MLP's inside
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(int64_t(t.tokens) * panels_of(t.num_patches) * PANEL);
        embed(t, *transformer, x, h.data());
        for (int l = 0; l < transformer->num_layers; ++l) {
            const Layer& layer = transformer->layers[l];
            normalize(layer.attention_norm, h.data(), normed.data(), t.rows(), t.width);
            multiply<Then::STORE>(layer.qkv, normed.data(), wide.data(), t.rows());
            attention(t, layer, wide.data(), scores.data(), normed.data());
            multiply<Then::ADD>(layer.proj, normed.data(), h.data(), t.rows());
            normalize(layer.mlp_norm, h.data(), normed.data(), t.rows(), t.width);
            multiply<Then::GELU>(layer.up, normed.data(), wide.data(), t.rows());
            multiply<Then::ADD>(layer.down, wide.data(), h.data(), t.rows());
        }
        multiply<Then::STORE>(transformer->output, h.data(), out, t.rows());
    }
}
}
