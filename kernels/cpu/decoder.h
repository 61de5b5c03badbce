// What a decoder of the Llama family is made of.
#pragma once

#include "linear.h"

// A sublayer without its norm was removed. `shared` heads of keys and values serve `heads` of queries.
struct tp_block {
    const float *attention_norm, *feed_forward_norm; // [hidden]
    const struct tp_weights *q, *k, *v, *o, *gate, *up, *down;
    const float *query_norm, *key_norm; // [head] or null
    int64_t heads, shared;
    void *keys, *values; // [shared][places / 16][head][16] and [shared][places][head], of the decoder's type; places up to a multiple of 16
};

struct tp_decoder {
    int64_t hidden, head, vocabulary, places, blocks;
    const struct tp_block *block;
    const void *embedding; // [vocabulary][hidden], fp32 or bf16
    const float *norm;     // [hidden]
    const struct tp_weights *top;
    const float *cosine, *sine; // [places][head]
    float epsilon, scale;
    int32_t embedding_type, activation, mode;
    int32_t type; // of what goes into linear layers and of what is kept: fp32 or bf16
};

// Take `rows` new tokens, of which the first has place `first`; what came before is kept. Writes the logits of the last `wanted` of them,
// fp32 [wanted][vocabulary]. Returns 0, 1 for tokens or places that there are not, -1 when memory is short.
extern "C" int tp_decode(const struct tp_decoder *, const int64_t *tokens, int64_t rows, int64_t first, int64_t wanted, float *logits, int threads);
