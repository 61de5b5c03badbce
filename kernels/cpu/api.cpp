// The C interface: which instruction set, on whose threads, with what memory.
#include <stdlib.h>
#include <string.h>
#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "linear.h"

namespace {

// The pool of threads of the program: GOMP_parallel of the OpenMP that torch brought along. A pool of our own would spin against it.
typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);
parallel_function pool = nullptr;
int pool_process = 0;
int highest = 2;

const struct tp_kernels *kernels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (highest >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
        return &tp_avx512;
    if (highest >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &tp_avx2;
#endif
    return &tp_portable;
}

struct Task {
    void (*step)(void *, int64_t, float *);
    void *data;
    int64_t count, next;
    size_t scratch; // floats for each thread
    int failed;
};

void take(void *pointer) {
    struct Task *task = (struct Task *)pointer;
    float *room = nullptr;
    if (task->scratch && posix_memalign((void **)&room, TP_ALIGN, task->scratch * sizeof(float))) {
        __atomic_store_n(&task->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (;;) {
        const int64_t at = __atomic_fetch_add(&task->next, 1, __ATOMIC_RELAXED);
        if (at >= task->count) break;
        task->step(task->data, at, room);
    }
    free(room);
}

// Work on `count` pieces. A process that was forked has none of its parent's threads: it works alone.
int spread(struct Task *task, int threads) {
    if (threads > task->count) threads = (int)task->count;
    if (threads > 1 && pool && pool_process == (int)getpid()) pool(take, task, (unsigned)threads, 0);
    else take(task);
    return task->failed && task->next < task->count ? -1 : 0;
}

struct Job {
    const struct tp_kernels *set;
    const struct tp_call *call;
    struct tp_input in;
    int64_t chunk;
};

void prepare_tile(void *pointer, int64_t tile, float *row) {
    struct Job *job = (struct Job *)pointer;
    job->set->prepare(job->call, &job->in, tile, row);
}

void work_chunk(void *pointer, int64_t at, float *) {
    struct Job *job = (struct Job *)pointer;
    const int64_t first = at * job->chunk, blocks = job->call->w->blocks;
    job->set->work(job->call, &job->in, first, first + job->chunk < blocks ? first + job->chunk : blocks);
}

int64_t tile_rows(int64_t rows, int64_t most) {
    int64_t tile = 1;
    while (tile < rows && tile < most) tile *= 2;
    return tile;
}

const int64_t PIECE = 1 << 17; // words

struct Reading {
    const uint64_t *words;
    int64_t count;
    uint64_t sum;
};

void read_piece(void *pointer, int64_t at, float *) {
    struct Reading *reading = (struct Reading *)pointer;
    const int64_t last = (at + 1) * PIECE < reading->count ? (at + 1) * PIECE : reading->count;
    uint64_t sum[16] = {0};
    int64_t i = at * PIECE;
    for (; i + 16 <= last; i += 16)
        for (int j = 0; j < 16; ++j) sum[j] += reading->words[i + j];
    uint64_t total = 0;
    for (; i < last; ++i) total += reading->words[i];
    for (int j = 0; j < 16; ++j) total += sum[j];
    __atomic_fetch_add(&reading->sum, total, __ATOMIC_RELAXED);
}

struct Source {
    const struct tp_weights *w;
    const int32_t *words;   // [ceil(inputs * bits / 32)][outputs]
    const int32_t *zeros;   // [layer groups][ceil(outputs * bits / 32)]
    const uint16_t *scales; // [layer groups][outputs]
    const int32_t *group_of; // [groups]: the layer's group of each group here
    uint8_t *data;
    int16_t *zero;
    uint16_t *scale;
    int32_t zero_offset;
};

inline uint32_t field(const int32_t *stream, int64_t stride, int64_t at, int bits) {
    const int64_t first = at * bits, word = first >> 5;
    const int offset = (int)(first & 31);
    uint64_t value = (uint32_t)stream[word * stride];
    if (offset + bits > 32) value |= (uint64_t)(uint32_t)stream[(word + 1) * stride] << 32;
    return (uint32_t)(value >> offset) & ((1u << bits) - 1u);
}

void pack_block(void *pointer, int64_t block, float *) {
    const struct Source *from = (const struct Source *)pointer;
    const struct tp_weights *w = from->w;
    const int bits = w->bits;
    const int64_t slice = bits == 8 ? 4 : bits == 4 ? 8 : bits == 2 ? 16 : 32, size = bits == 3 ? 192 : 64;
    const int64_t zero_words = (w->outputs * bits + 31) / 32;
    uint8_t *data = from->data + block * w->groups * (w->group / slice) * size;
    memset(data, 0, (size_t)(w->groups * (w->group / slice) * size));
    for (int64_t g = 0; g < w->groups; ++g)
        for (int lane = 0; lane < TP_LANES; ++lane) {
            const int64_t n = block * TP_LANES + lane, at = (block * w->groups + g) * TP_LANES + lane, group = from->group_of[g];
            const bool there = n < w->outputs;
            from->scale[at] = there ? from->scales[group * w->outputs + n] : 0;
            if (from->zero)
                from->zero[at] = there ? (int16_t)(field(from->zeros + group * zero_words, 1, n, bits) + from->zero_offset) : 0;
        }
    const int64_t lanes = w->outputs - block * TP_LANES < TP_LANES ? w->outputs - block * TP_LANES : TP_LANES;
    for (int64_t place = 0; place < w->groups * w->group; ++place) {
        const int64_t k = w->order ? w->order[place] : place < w->inputs ? place : -1;
        if (k < 0) continue;
        uint8_t *to = data + place / slice * size;
        const int64_t within = place % slice, step = within / 4, j = within % 4;
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const uint32_t q = field(from->words + block * TP_LANES + lane, w->outputs, k, bits);
            if (bits == 3) {
                to[64 * (step / 4) + 4 * lane + j] |= (uint8_t)((q & 3) << (2 * (step % 4)));
                to[128 + 4 * lane + j] |= (uint8_t)((q >> 2) << step);
            } else to[4 * lane + j] |= (uint8_t)(q << (bits == 8 ? 0 : bits * step));
        }
    }
}

} // namespace

extern "C" {

// Name the threads to use; null for none.
void tp_use_pool(void *parallel) {
    pool = (parallel_function)parallel;
    pool_process = (int)getpid();
}

// Read memory on the same threads, for the bandwidth that a product could have at most; returns a sum, so that nothing is left out.
uint64_t tp_read(const void *data, int64_t bytes, int threads) {
    struct Reading reading = {(const uint64_t *)data, bytes / 8, 0};
    struct Task task = {read_piece, &reading, (bytes / 8 + PIECE - 1) / PIECE, 0, 0, 0};
    spread(&task, threads);
    return reading.sum;
}

// The highest instruction set to use, for tests: 0 portable, 1 AVX2, 2 AVX-512.
void tp_limit(int level) { highest = level; }

const char *tp_instructions(void) { return kernels()->name; }

// Pack a layer in the GPTQ layout; `w` has its arrays to be filled. Returns 0.
int tp_pack(const struct tp_weights *w, const int32_t *words, const int32_t *zeros, const uint16_t *scales, const int32_t *group_of,
            int32_t zero_offset, int threads) {
    struct Source from = {w, words, zeros, scales, group_of, (uint8_t *)w->data, (int16_t *)w->zero, (uint16_t *)w->scale, zero_offset};
    struct Task task = {pack_block, &from, w->blocks, 0, 0, 0};
    return spread(&task, threads);
}

// y = x W^T + b. Returns 0, or -1 when memory is short.
int tp_linear(const struct tp_call *call, int threads) {
    const struct tp_weights *w = call->w;
    if (call->rows < 1 || w->outputs < 1) return 0;
    struct Job job;
    job.set = kernels();
    job.call = call;
    job.in.parts = job.set->is_bf16 && call->mode == TP_WEIGHT_ONLY && call->type != TP_BF16 ? 2 : 1;
    const int64_t rows = call->rows * job.in.parts, places = w->groups * w->group;
    const int64_t tile = tile_rows(rows, job.set->most_rows), tiles = (rows + tile - 1) / tile;
    job.in.tile = tile;
    job.in.tiles = tiles;
    job.in.bytes_per_tile = (size_t)(call->mode == TP_INT8 ? places * tile : places / 2 * tile * (int64_t)job.set->pair_bytes);
    const size_t values = job.in.bytes_per_tile * (size_t)tiles, each = (size_t)(tiles * tile * w->groups) * 4;
    char *room = nullptr;
    if (posix_memalign((void **)&room, TP_ALIGN, values + 2 * each + 2 * TP_ALIGN)) return -1;
    job.in.values = room;
    job.in.scale = (float *)(room + values);
    job.in.sum = room + values + each;
    struct Task first = {prepare_tile, &job, tiles, 0, (size_t)places, 0};
    int problem = spread(&first, threads);
    if (!problem) {
        job.chunk = w->blocks / (4 * (int64_t)threads);
        if (job.chunk < 1) job.chunk = 1;
        struct Task second = {work_chunk, &job, (w->blocks + job.chunk - 1) / job.chunk, 0, 0, 0};
        problem = spread(&second, threads);
    }
    free(room);
    return problem;
}
}
