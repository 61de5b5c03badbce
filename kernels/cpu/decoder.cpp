// A whole decoder of the Llama family, one call for the tokens that are new: embeddings, blocks with their keys and values kept, logits.
#include <stdlib.h>
#include <string.h>

#include "decoder.h"
#include "work.h"

namespace {

// Keys lie in tiles of 16 places.
int64_t kept_places(const struct tp_decoder *d) { return (d->places + TP_LANES - 1) / TP_LANES * TP_LANES; }

struct Pass {
    const struct tp_decoder *d;
    const struct tp_vector *vector;
    int64_t rows, first; // new tokens, and the place of the first
    int64_t size;        // bytes of a number of type d->type
    int threads;
    float *state, *query, *key, *value, *gate, *up; // [rows][...]
    char *x;                                        // [rows][heads of queries], of d->type
    // of the step that runs
    const struct tp_block *block;
    const float *weight;
    int64_t skipped, width, together; // rows of queries that are worked on at once
};

// A row of what a sublayer starts from: the norm of the state.
void fill_norm(const void *pointer, int64_t row, float *to) {
    const struct Pass *p = (const struct Pass *)pointer;
    const int64_t hidden = p->d->hidden;
    p->vector->norm(p->state + (row + p->skipped) * hidden, p->weight, hidden, p->d->epsilon, p->d->type, to);
}

void fill_activation(const void *pointer, int64_t row, float *to) {
    const struct Pass *p = (const struct Pass *)pointer;
    p->vector->activate(p->gate + row * p->width, p->up + row * p->width, p->width, p->d->activation, p->d->type, to);
}

// Rotate the row's queries and key, and keep its key and value.
void place_row(void *pointer, int64_t row, float *) {
    struct Pass *p = (struct Pass *)pointer;
    const struct tp_decoder *d = p->d;
    const struct tp_block *b = p->block;
    const int64_t place = p->first + row, head = d->head;
    const float *cosine = d->cosine + place * head, *sine = d->sine + place * head;
    float *query = p->query + row * b->heads * head, *key = p->key + row * b->shared * head;
    p->vector->rotate(query, b->heads, head, b->query_norm, d->epsilon, cosine, sine);
    p->vector->rotate(key, b->shared, head, b->key_norm, d->epsilon, cosine, sine);
    for (int64_t g = 0; g < b->shared; ++g) {
        const int64_t of_group = g * kept_places(d) * head;
        p->vector->keep(key + g * head, head, (char *)b->keys + (of_group + place / TP_LANES * TP_LANES * head + place % TP_LANES) * p->size,
                        TP_LANES, d->type);
        p->vector->keep(p->value + (row * b->shared + g) * head, head, (char *)b->values + (of_group + place * head) * p->size, 1, d->type);
    }
}

void attend_rows(void *pointer, int64_t at, float *scratch) {
    struct Pass *p = (struct Pass *)pointer;
    const struct tp_decoder *d = p->d;
    const struct tp_block *b = p->block;
    const int64_t tiles = (p->rows + p->together - 1) / p->together;
    const int64_t row = (tiles - 1 - at / b->shared) * p->together, g = at % b->shared, each = b->heads / b->shared; // the longest first
    const int64_t kept = g * kept_places(d) * d->head * p->size, query = (row * b->heads + g * each) * d->head;
    const int64_t rows = p->rows - row < p->together ? p->rows - row : p->together;
    const struct tp_attention a = {p->query + query, (char *)b->keys + kept, (char *)b->values + kept, p->x + query * p->size, scratch, rows,
                                   each, b->heads * d->head, d->head, p->first + row, d->scale, d->type};
    p->vector->attend(&a);
}

// `work` is what one of them takes
int each_row(struct Pass *p, void (*step)(void *, int64_t, float *), int64_t count, int64_t work, size_t scratch) {
    struct tp_task task = {step, p, count, scratch, 0, 0};
    return tp_spread(&task, tp_threads_for(count * work, p->threads));
}

// y[i] = x w[i]^T for several layers of one input, which `fill` makes
int multiply(const struct Pass *p, int64_t rows, int count, const struct tp_weights *const *w, float *const *y,
             void (*fill)(const void *, int64_t, float *), bool adds) {
    struct tp_call calls[TP_TOGETHER];
    for (int i = 0; i < count; ++i)
        calls[i] = {w[i], fill ? (const void *)p : p->x, y[i], rows, w[i]->inputs, 1, p->d->type, p->d->mode, TP_F32, adds, fill};
    return tp_multiply(calls, count, p->threads);
}

int attention(struct Pass *p) {
    const struct tp_block *b = p->block;
    const struct tp_weights *in[3] = {b->q, b->k, b->v};
    float *const to[3] = {p->query, p->key, p->value};
    const int64_t each = b->heads / b->shared, places = p->first + p->rows, head = p->d->head;
    p->weight = b->attention_norm;
    p->together = each < 8 ? 8 / each : 1;
    const int64_t tiles = (p->rows + p->together - 1) / p->together;
    return multiply(p, p->rows, 3, in, to, fill_norm, false) || each_row(p, place_row, p->rows, 2 * b->heads * head, 0) ||
           each_row(p, attend_rows, tiles * b->shared, 2 * p->together * each * places * head, (size_t)(4 * (places + TP_LANES))) ||
           multiply(p, p->rows, 1, &b->o, &p->state, nullptr, true);
}

int feed_forward(struct Pass *p) {
    const struct tp_block *b = p->block;
    const struct tp_weights *in[2] = {b->gate, b->up};
    float *const to[2] = {p->gate, p->up};
    p->weight = b->feed_forward_norm;
    p->width = b->gate->outputs;
    return multiply(p, p->rows, 2, in, to, fill_norm, false) || multiply(p, p->rows, 1, &b->down, &p->state, fill_activation, true);
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t aligned(int64_t bytes) { return (bytes + TP_ALIGN - 1) / TP_ALIGN * TP_ALIGN; }

// Give each array its place in `room`, if there is one; returns the bytes of all.
int64_t lay_out(struct Pass *p, char *room) {
    const struct tp_decoder *d = p->d;
    int64_t heads = 0, shared = 0, width = 0;
    for (int64_t i = 0; i < d->blocks; ++i) {
        const struct tp_block *b = &d->block[i];
        if (b->attention_norm) heads = larger(heads, b->heads), shared = larger(shared, b->shared);
        if (b->feed_forward_norm) width = larger(width, b->gate->outputs);
    }
    const int64_t sizes[] = {d->hidden, heads * d->head, shared * d->head, shared * d->head, width, width};
    float **const arrays[] = {&p->state, &p->query, &p->key, &p->value, &p->gate, &p->up};
    int64_t at = 0;
    for (int i = 0; i < 6; ++i) {
        *arrays[i] = room ? (float *)(room + at) : nullptr;
        at += aligned(p->rows * sizes[i] * 4);
    }
    p->x = room ? room + at : nullptr;
    return at + aligned(p->rows * heads * d->head * p->size);
}

void embed(const struct Pass *p, const int64_t *tokens) {
    const struct tp_decoder *d = p->d;
    for (int64_t r = 0; r < p->rows; ++r) {
        float *to = p->state + r * d->hidden;
        if (d->embedding_type == TP_F32) {
            memcpy(to, (const float *)d->embedding + tokens[r] * d->hidden, (size_t)d->hidden * 4);
            continue;
        }
        const uint16_t *from = (const uint16_t *)d->embedding + tokens[r] * d->hidden; // bf16
        for (int64_t k = 0; k < d->hidden; ++k) {
            const uint32_t bits = (uint32_t)from[k] << 16;
            memcpy(to + k, &bits, 4);
        }
    }
}

} // namespace

extern "C" int tp_decode(const struct tp_decoder *d, const int64_t *tokens, int64_t rows, int64_t first, int64_t wanted, float *logits, int threads) {
    if (rows < 1 || wanted > rows || first < 0 || first + rows > d->places) return 1;
    for (int64_t r = 0; r < rows; ++r)
        if (tokens[r] < 0 || tokens[r] >= d->vocabulary) return 1;
    struct Pass pass = {};
    pass.d = d;
    pass.vector = tp_set()->vector;
    pass.rows = rows;
    pass.first = first;
    pass.size = d->type == TP_F32 ? 4 : 2;
    pass.threads = threads;
    char *room = nullptr;
    if (posix_memalign((void **)&room, TP_ALIGN, (size_t)lay_out(&pass, nullptr))) return -1;
    lay_out(&pass, room);
    embed(&pass, tokens);
    int problem = 0;
    for (int64_t i = 0; i < d->blocks && !problem; ++i) {
        pass.block = &d->block[i];
        if (pass.block->attention_norm) problem = attention(&pass);
        if (pass.block->feed_forward_norm && !problem) problem = feed_forward(&pass);
    }
    if (!problem && wanted > 0) {
        pass.weight = d->norm;
        pass.skipped = rows - wanted;
        problem = multiply(&pass, wanted, 1, &d->top, &logits, fill_norm, false);
    }
    free(room);
    return problem ? -1 : 0;
}
