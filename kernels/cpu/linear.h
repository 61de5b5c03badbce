// y = x W^T + b with W of 2, 3, 4 or 8 bits: what the C interface passes around, and what each instruction set provides.
//
// Layout of the weights. Outputs are taken 16 at a time (a block, one per 32-bit lane), inputs in groups that share a scale, padded to
// a multiple of 32. Of each block and group the inputs follow one another in slices; a slice is 64 bytes for each of its planes:
//   8 bits: 4 inputs,  byte j of a lane is input j;
//   4 bits: 8 inputs,  byte j holds inputs j (low half) and 4 + j;
//   2 bits: 16 inputs, byte j holds inputs j, 4 + j, 8 + j, 12 + j, from the lowest bits up;
//   3 bits: 32 inputs in three planes of 4 bits, which hold inputs 0 to 23, 8 each, as above; the fourth bits of plane p, which those do
//           not use, are the p-th of inputs 24 + j and 28 + j;
//   16 bits: no integers but bf16, 4 inputs in two planes: inputs 0 and 2 of each lane, inputs 1 and 3;
//   TP_SPARSE: see sparse.inc.
// So four inputs side by side are the four bytes of a lane after one shift and one mask, which is what vpdpbusd multiplies; and two
// inputs that stand two apart are the halves of a lane, which is what vdpbf16ps multiplies.
#pragma once

// Compilers that are older do without the instruction set.
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define TP_KNOWS_AVXVNNI
#endif
#if (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10)
#define TP_KNOWS_BF16
#endif

#include <stddef.h>
#include <stdint.h>

#define TP_LANES 16
#define TP_ALIGN 64
#define TP_SPARSE_ROWS 4 // of the input that are worked on at once with those
#define TP_SPARSE 9 // bits of a weight of 2:4 sparsity in bf16: two of 16 and two places of 2 for four

enum tp_mode { TP_WEIGHT_ONLY = 0, TP_INT8 = 1 };
enum tp_activation { TP_SILU = 0, TP_GELU_TANH = 1 };
enum tp_type { TP_F32 = 0, TP_BF16 = 1, TP_F16 = 2 };

// Weights of one layer, all arrays aligned to 64 bytes. `group` is a multiple of 32; inputs beyond those that are there are zero.
struct tp_weights {
    int64_t outputs, inputs; // of the layer
    int64_t blocks, groups, group;
    int32_t bits;
    const uint8_t *data;   // [blocks][groups][group / 32][32 * 16 * bits / 8]
    const uint16_t *scale; // fp16 [blocks][groups][16]
    const int16_t *zero;   // [blocks][groups][16]; null where all are 2^(bits-1)
    const int32_t *order;  // [groups * group] the input at each place, -1 for none; null where place k is input k
    const float *bias;     // [outputs] or null
};

struct tp_call {
    const struct tp_weights *w;
    const void *x; // [rows][inputs], row stride in elements; or what `fill` works on
    void *y;       // [rows][outputs], contiguous
    int64_t rows, stride;
    int64_t columns; // at least 1; beyond that x is [rows / columns][inputs][columns], y [rows / columns][outputs][columns], `stride` from one matrix to the next
    int32_t type, mode;
    int32_t out;  // type of y
    int32_t adds; // to y, which is fp32 then
    void (*fill)(const void *x, int64_t row, float *to); // makes a row [inputs] of the input; null where it lies in memory
};

// The input as the kernel of a mode wants it. Where the kernel multiplies bf16 and the input is finer, a row is two here: what bf16 has of
// it, and the rest. Where it multiplies bytes faster than floats, a row of weight-only mode is two of int8, the upper and the lower half of
// 16-bit integers. Tiles of `tile` such rows, each [groups * group / 4][tile] words of four inputs (int8), or
// [groups * group / 2][tile] pairs (2:4 sparsity: [groups * group / 4][tile] fours), then one scale and one sum for each group and row.
struct tp_input {
    bool integers;
    int64_t parts, tile, tiles; // parts of a row: 1 or 2
    void *values;
    float *scale; // [tiles][groups][tile], integers alone
    void *sum;    // [tiles][groups][tile] int32 (integers) or float
    size_t bytes_per_tile;
};

// What an instruction set provides.
struct tp_kernels {
    const char *name;
    size_t pair_bytes; // of two inputs in weight-only mode
    int most_rows;     // of the input that are worked on at once
    bool is_bf16;      // what weight-only mode multiplies, else floats
    int digits;        // of weights, up to which it multiplies two int8 for an input
    void (*prepare)(const struct tp_call *, const struct tp_input *, int64_t tile, float *row);
    void (*work)(const struct tp_call *, const struct tp_input *, int64_t first_block, int64_t last_block);
    const struct tp_vector *vector;
};

// Queries of some rows, `each` of a row, that share keys and values, which are of `type`: keys [places / 16][head][16], values [places][head].
// A row sees what lies before it, and itself; the place of the first is `first`. Rows of queries and of the result are `stride` apart.
struct tp_attention {
    const float *query; // [rows][each][head]
    const void *keys, *values;
    void *out;     // as the queries, of `type`
    float *scores; // room for four times all places, up to a multiple of 16
    int64_t rows, each, stride, head, first;
    float scale;
    int32_t type;
};

// What lies between the linear layers of a decoder. Numbers are rounded to `type`.
struct tp_vector {
    // to = weight * state / root of the mean of its squares
    void (*norm)(const float *state, const float *weight, int64_t count, float epsilon, int type, float *to);
    // each head: normalised (if weight), then its halves rotated
    void (*rotate)(float *heads, int64_t count, int64_t head, const float *weight, float epsilon, const float *cosine, const float *sine);
    void (*attend)(const struct tp_attention *);
    // to = activation(gate) * up
    void (*activate)(const float *gate, const float *up, int64_t count, int kind, int type, float *to);
    // with `apart` numbers between one and the next
    void (*keep)(const float *x, int64_t count, void *out, int64_t apart, int type);
};

extern "C" {
extern const struct tp_kernels tp_portable;
#if defined(__x86_64__)
extern const struct tp_kernels tp_avx2;
extern const struct tp_kernels tp_avxvnni;
extern const struct tp_kernels tp_avx512vl;
extern const struct tp_kernels tp_avx512;
#endif
}
