// A whole decoder of the Llama family, one call for the tokens that are new: embeddings, blocks with their keys and values kept, logits.
#include <stdlib.h>
#include <string.h>

#include "decoder.h"
#include "work.h"

namespace {

struct Pass {
    const struct tp_decoder *d;
    const struct tp_vector *vector;
    int64_t rows, first; // new tokens, and the place of the first
    int64_t size;        // bytes of a number of type d->type
    int threads;
    float *state, *added, *query, *key, *value, *gate, *up; // [rows][...]
    char *x;                                                // [rows][widest input], of d->type
    // of the step that runs
    const struct tp_block *block;
    const float *weight;
    int64_t skipped, width;
    bool adds;
};

void norm_row(void *pointer, int64_t at, float *) {
    struct Pass *p = (struct Pass *)pointer;
    const int64_t row = at + p->skipped, hidden = p->d->hidden;
    p->vector->norm(p->state + row * hidden, p->adds ? p->added + row * hidden : nullptr, p->weight, hidden, p->d->epsilon,
                    p->x + at * hidden * p->size, p->d->type);
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
        const int64_t to = (g * d->places + place) * head * p->size;
        p->vector->keep(key + g * head, head, (char *)b->keys + to, d->type);
        p->vector->keep(p->value + (row * b->shared + g) * head, head, (char *)b->values + to, d->type);
    }
}

void attend_head(void *pointer, int64_t at, float *scratch) {
    struct Pass *p = (struct Pass *)pointer;
    const struct tp_decoder *d = p->d;
    const struct tp_block *b = p->block;
    const int64_t row = p->rows - 1 - at / b->shared, g = at % b->shared, each = b->heads / b->shared; // the longest first
    const int64_t kept = g * d->places * d->head * p->size, query = (row * b->heads + g * each) * d->head;
    const struct tp_attention a = {p->query + query, (char *)b->keys + kept, (char *)b->values + kept, p->x + query * p->size, scratch,
                                   each, d->head, p->first + row + 1, d->scale, d->type};
    p->vector->attend(&a);
}

void activate_row(void *pointer, int64_t row, float *) {
    struct Pass *p = (struct Pass *)pointer;
    const int64_t width = p->width;
    p->vector->activate(p->gate + row * width, p->up + row * width, width, p->d->activation, p->x + row * width * p->size, p->d->type);
}

// `work` is what one row takes
int each_row(struct Pass *p, void (*step)(void *, int64_t, float *), int64_t count, int64_t work, size_t scratch) {
    struct tp_task task = {step, p, count, scratch, 0, 0};
    return tp_spread(&task, tp_threads_for(count * work, p->threads));
}

// state += what the last sublayer gave; x = the norm of the rows from `skipped` on
int norm_all(struct Pass *p, const float *weight, int64_t skipped) {
    p->weight = weight;
    p->skipped = skipped;
    const int problem = each_row(p, norm_row, p->rows - skipped, 2 * p->d->hidden, 0);
    p->adds = false;
    return problem;
}

// y[i] = x w[i]^T for several layers of one input
int multiply(const struct Pass *p, int64_t rows, int count, const struct tp_weights *const *w, float *const *y) {
    struct tp_call calls[TP_TOGETHER];
    for (int i = 0; i < count; ++i) calls[i] = {w[i], p->x, y[i], rows, w[i]->inputs, p->d->type, p->d->mode, TP_F32};
    return tp_multiply(calls, count, p->threads);
}

int attention(struct Pass *p) {
    const struct tp_block *b = p->block;
    const struct tp_weights *in[3] = {b->q, b->k, b->v};
    float *const to[3] = {p->query, p->key, p->value};
    const size_t scores = (size_t)(b->heads / b->shared) * (size_t)(p->first + p->rows);
    return norm_all(p, b->attention_norm, 0) || multiply(p, p->rows, 3, in, to) || each_row(p, place_row, p->rows, 2 * b->heads * p->d->head, 0) ||
           each_row(p, attend_head, p->rows * b->shared, 2 * (int64_t)scores * p->d->head, scores) || multiply(p, p->rows, 1, &b->o, &p->added);
}

int feed_forward(struct Pass *p) {
    const struct tp_block *b = p->block;
    const struct tp_weights *in[2] = {b->gate, b->up};
    float *const to[2] = {p->gate, p->up};
    p->width = b->gate->outputs;
    return norm_all(p, b->feed_forward_norm, 0) || multiply(p, p->rows, 2, in, to) || each_row(p, activate_row, p->rows, 8 * p->width, 0) ||
           multiply(p, p->rows, 1, &b->down, &p->added);
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
    const int64_t sizes[] = {d->hidden, d->hidden, heads * d->head, shared * d->head, shared * d->head, width, width};
    float **const arrays[] = {&p->state, &p->added, &p->query, &p->key, &p->value, &p->gate, &p->up};
    int64_t at = 0;
    for (int i = 0; i < 7; ++i) {
        *arrays[i] = room ? (float *)(room + at) : nullptr;
        at += aligned(p->rows * sizes[i] * 4);
    }
    p->x = room ? room + at : nullptr;
    return at + aligned(p->rows * larger(larger(d->hidden, heads * d->head), width) * p->size);
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
        if (pass.block->attention_norm) {
            problem = attention(&pass);
            pass.adds = true;
        }
        if (pass.block->feed_forward_norm && !problem) {
            problem = feed_forward(&pass);
            pass.adds = true;
        }
    }
    if (!problem && wanted > 0)
        problem = norm_all(&pass, d->norm, rows - wanted) || multiply(&pass, wanted, 1, &d->top, &logits);
    free(room);
    return problem ? -1 : 0;
}
