// Any processor.
#include "linear.h"
#define TP_UNROLL 

namespace {
#include "floats.inc"
#include "lanes.inc"
using Set = Lanes;
#include "inputs.inc"
#include "loops.inc"
#include "dispatch.inc"
Lanes::Float Lanes::halves_to_float(const uint16_t *half) {
    Float out;
    for (int i = 0; i < TP_LANES; ++i) out.lane[i] = half_to_float(half[i]);
    return out;
}
} // namespace

extern "C" const struct tp_kernels tp_portable = {"portable", sizeof(Set::Pair), Set::most_rows, false, Set::digits, prepare, work, &vector};
