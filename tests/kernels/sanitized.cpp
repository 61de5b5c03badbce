// Calls the kernels on random layers of odd shapes, and a decoder of random layers, for AddressSanitizer and UndefinedBehaviorSanitizer to watch.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "decoder.h"

extern "C" {
void tp_limit(int level);
const char *tp_instructions(void);
int tp_pack(const tp_weights *, const int32_t *, const int32_t *, const uint16_t *, const int32_t *, int32_t, int);
int tp_linear(const tp_call *, int);
}

template <typename T> T *room(size_t count) { // exactly as large as it says, and aligned
    void *p = nullptr;
    if (posix_memalign(&p, TP_ALIGN, count * sizeof(T) + (count == 0))) abort();
    return static_cast<T *>(p);
}

// A dense layer of random numbers, of which none is infinite.
tp_weights dense(std::mt19937 &random, int64_t outputs, int64_t inputs) {
    const int64_t group = 32 * ((inputs + 31) / 32), blocks = (outputs + TP_LANES - 1) / TP_LANES;
    uint16_t *data = room<uint16_t>(blocks * TP_LANES * group), *scale = room<uint16_t>(blocks * TP_LANES);
    for (int64_t i = 0; i < blocks * TP_LANES * group; ++i) data[i] = (uint16_t)((random() & 0x8000) | 0x3c00 | (random() & 0x7f));
    for (int64_t i = 0; i < blocks * TP_LANES; ++i) scale[i] = 0x3c00;
    return {outputs, inputs, blocks, 1, group, 16, (const uint8_t *)data, scale, nullptr, nullptr, nullptr};
}

// Multiplies with random bits as weights of 2:4 sparsity.
long sparse(std::mt19937 &random) {
    const int64_t inputs = 1 + random() % 200, outputs = 1 + random() % 50, units = (inputs + 31) / 32, blocks = (outputs + TP_LANES - 1) / TP_LANES;
    uint8_t *data = room<uint8_t>(blocks * units * 64 * TP_SPARSE);
    for (int64_t i = 0; i < blocks * units * 64 * TP_SPARSE; ++i) data[i] = (uint8_t)random();
    const tp_weights w = {outputs, inputs, blocks, 1, 32 * units, TP_SPARSE, data, nullptr, nullptr, nullptr, nullptr};
    long calls = 0;
    for (int64_t rows : {1, 2, 5}) {
        std::vector<float> x(rows * inputs, 1.0f), y(rows * outputs);
        const tp_call call = {&w, x.data(), y.data(), rows, inputs, 1, TP_F32, TP_INT8, TP_F32, calls % 2 == 1, nullptr};
        if (tp_linear(&call, 1)) abort();
        ++calls;
    }
    free(data);
    return calls;
}

// Reads a text in parts; every array is as large as it has to be.
long decode(std::mt19937 &random, int mode, int type) {
    const int64_t shared = 1 + random() % 2, heads = shared * (1 + random() % 3), head = 2 * (1 + random() % 20), hidden = 1 + random() % 70;
    const int64_t width = 1 + random() % 90, vocabulary = 1 + random() % 50, places = 24, kept_places = 32, size = type == TP_F32 ? 4 : 2;
    tp_weights w[] = {dense(random, heads * head, hidden), dense(random, shared * head, hidden), dense(random, shared * head, hidden),
                      dense(random, hidden, heads * head), dense(random, width, hidden), dense(random, width, hidden),
                      dense(random, hidden, width), dense(random, vocabulary, hidden)};
    std::vector<float> ones(hidden > head ? hidden : head, 1.0f), angles(places * head, 0.7f), embedding(vocabulary * hidden, 0.1f);
    std::vector<uint8_t> kept[4];
    for (auto &k : kept) k.resize(shared * kept_places * head * size);
    tp_block blocks[3] = {};
    for (int i = 0; i < 3; ++i) {
        blocks[i] = {ones.data(), ones.data(), w, w + 1, w + 2, w + 3, w + 4, w + 5, w + 6, i ? ones.data() : nullptr, nullptr, heads, shared,
                     kept[2 * (i & 1)].data(), kept[2 * (i & 1) + 1].data()};
        if (i == 1) blocks[i].feed_forward_norm = nullptr;
        if (i == 2) blocks[i].attention_norm = nullptr;
    }
    const tp_decoder d = {hidden, head, vocabulary, places, 3, blocks, embedding.data(), ones.data(), w + 7, angles.data(), angles.data(),
                          1e-5f, 0.2f, TP_F32, (int32_t)(random() % 2), mode, type};
    std::vector<int64_t> tokens(places);
    for (auto &t : tokens) t = (int64_t)(random() % vocabulary);
    long calls = 0;
    for (int64_t at = 0, rows; at < places; at += rows, ++calls) {
        rows = 1 + (int64_t)(random() % 9);
        if (rows > places - at) rows = places - at;
        const int64_t wanted = (int64_t)(random() % (rows + 1));
        std::vector<float> logits(wanted * vocabulary);
        if (tp_decode(&d, tokens.data() + at, rows, at, wanted, logits.data(), 1)) abort();
    }
    if (tp_decode(&d, tokens.data(), 1, places, 1, nullptr, 1) != 1) abort(); // no place left
    for (auto &each : w) free((void *)each.data), free((void *)each.scale);
    return calls;
}

int main(int, char **arguments) {
    tp_limit(atoi(arguments[1]));
    std::mt19937 random(std::random_device{}());
    long calls = 0;
    for (int bits : {2, 3, 4, 8})
        for (int round = 0; round < 6; ++round) {
            const int64_t inputs = 1 + random() % 300, outputs = 1 + random() % 50, group = 32 * (1 + random() % 4);
            const int64_t groups = (inputs + group - 1) / group, blocks = (outputs + TP_LANES - 1) / TP_LANES;
            const size_t word_rows = (inputs * bits + 31) / 32, zero_words = (outputs * bits + 31) / 32;
            std::vector<int32_t> words(word_rows * outputs), zeros(groups * zero_words), of(groups), order(groups * group, -1);
            std::vector<uint16_t> scales(groups * outputs);
            std::vector<float> bias(outputs, 1.0f);
            for (auto &w : words) w = (int32_t)random();
            for (auto &z : zeros) z = (int32_t)random();
            for (auto &s : scales) s = (uint16_t)(random() & 0x7bff);
            for (int64_t g = 0; g < groups; ++g) of[g] = (int32_t)g;
            for (int64_t k = 0; k < inputs; ++k) order[k] = (int32_t)(inputs - 1 - k);
            uint8_t *data = room<uint8_t>(blocks * groups * group * 2 * bits);
            uint16_t *scale = room<uint16_t>(blocks * groups * TP_LANES);
            int16_t *zero = round % 2 ? room<int16_t>(blocks * groups * TP_LANES) : nullptr;
            const tp_weights w = {outputs, inputs, blocks, groups, group, bits, data, scale, zero, round % 3 ? order.data() : nullptr, bias.data()};
            if (tp_pack(&w, words.data(), zeros.data(), scales.data(), of.data(), 1, 1)) return 1;
            for (int64_t rows : {1, 2, 3, 7, 16, 21})
                for (int type : {TP_F32, TP_BF16, TP_F16})
                    for (int mode : {TP_WEIGHT_ONLY, TP_INT8}) {
                        const size_t size = type == TP_F32 ? 4 : 2;
                        std::vector<uint8_t> x(rows * inputs * size), y(rows * outputs * size);
                        for (auto &byte : x) byte = (uint8_t)random(); // any bits: NaN, infinite and all
                        for (int64_t columns : {1, 3, 7})
                            if (rows % columns == 0) {
                                const tp_call call = {&w, x.data(), y.data(), rows, columns * inputs, columns, type, mode, type, 0, nullptr};
                                if (tp_linear(&call, 1)) return 1;
                                ++calls;
                            }
                    }
            free(data), free(scale), free(zero);
        }
    for (int mode : {TP_WEIGHT_ONLY, TP_INT8})
        for (int type : {TP_F32, TP_BF16})
            for (int round = 0; round < 20; ++round) calls += decode(random, mode, type);
    for (int round = 0; round < 20; ++round) calls += sparse(random);
    std::printf("calls %ld with %s\n", calls, tp_instructions());
    return 0;
}
