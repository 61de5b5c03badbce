// Calls the kernels on random layers of odd shapes, for AddressSanitizer and UndefinedBehaviorSanitizer to watch.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "linear.h"

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
                        const tp_call call = {&w, x.data(), y.data(), rows, inputs, type, mode};
                        if (tp_linear(&call, 1)) return 1;
                        ++calls;
                    }
            free(data), free(scale), free(zero);
        }
    std::printf("calls %ld with %s\n", calls, tp_instructions());
    return 0;
}
