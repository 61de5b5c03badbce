// The C interface: which instruction set, on whose threads, with what memory.
#include <stdlib.h>
#include <string.h>
#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "work.h"

namespace {

// The pool of threads of the program: GOMP_parallel of the OpenMP that torch brought along. A pool of our own would spin against it.
typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);
parallel_function pool = nullptr;
int pool_process = 0;
int highest = 4;
const struct tp_kernels *known_set = nullptr;

void take(void *pointer) {
    struct tp_task *task = (struct tp_task *)pointer;
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

struct Job {
    const struct tp_call *call;
    struct tp_input in;
    int64_t chunk, chunks;
    int prepared_by; // the job that prepares its input
};

struct Jobs {
    const struct tp_kernels *set;
    struct Job job[TP_TOGETHER];
    int count;
};

// How many int8 are a number of the input; 0 where it is none.
int integers_of(const struct tp_kernels *set, const struct tp_call *call) {
    if (call->w->bits > 8) return 0;
    return call->mode == TP_INT8 ? 1 : call->w->bits <= set->digits ? 2 : 0;
}

// Whether two layers want the same input in the same form.
bool alike(const struct tp_kernels *set, const struct tp_call *a, const struct tp_call *b) {
    const struct tp_weights *v = a->w, *w = b->w;
    const int integers = integers_of(set, a);
    return v->inputs == w->inputs && v->group == w->group && v->groups == w->groups && v->order == w->order &&
           (v->bits == w->bits || integers) && integers == integers_of(set, b);
}

void prepare_tile(void *pointer, int64_t at, float *row) {
    struct Jobs *jobs = (struct Jobs *)pointer;
    for (int i = 0; i < jobs->count; ++i) {
        struct Job *job = &jobs->job[i];
        if (job->prepared_by != i) continue;
        if (at < job->in.tiles) return jobs->set->prepare(job->call, &job->in, at, row);
        at -= job->in.tiles;
    }
}

void work_chunk(void *pointer, int64_t at, float *) {
    struct Jobs *jobs = (struct Jobs *)pointer;
    for (int i = 0; i < jobs->count; ++i) {
        struct Job *job = &jobs->job[i];
        if (at < job->chunks) {
            const int64_t first = at * job->chunk, last = first + job->chunk, blocks = job->call->w->blocks;
            return jobs->set->work(job->call, &jobs->job[job->prepared_by].in, first, last < blocks ? last : blocks);
        }
        at -= job->chunks;
    }
}

int64_t tile_rows(int64_t rows, int64_t most) {
    int64_t tile = 1;
    while (tile < rows && tile < most) tile *= 2;
    return tile;
}

const int64_t PIECE = 1 << 17; // words
const int64_t CHUNKS = 16;     // for each thread: the last to end is waited for

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

// The bytes of a slice's lanes from the words of 2, 4 or 8 bits that hold just its inputs: fields that stand side by side there are strided here.
inline uint32_t slice_word(uint32_t word, int bits) {
    if (bits == 8) return word;
    if (bits == 4) {
        uint32_t part[2] = {word & 0xffffu, word >> 16};
        for (int i = 0; i < 2; ++i) {
            part[i] = (part[i] | part[i] << 8) & 0x00ff00ffu;
            part[i] = (part[i] | part[i] << 4) & 0x0f0f0f0fu;
        }
        return part[0] | part[1] << 4;
    }
    uint32_t out = 0;
    for (int step = 0; step < 4; ++step)
        for (int j = 0; j < 4; ++j) out |= (word >> (8 * step + 2 * j) & 3u) << (8 * j + 2 * step);
    return out;
}

void pack_scales(const struct Source *from, int64_t block) {
    const struct tp_weights *w = from->w;
    const int64_t zero_words = (w->outputs * w->bits + 31) / 32;
    for (int64_t g = 0; g < w->groups; ++g)
        for (int lane = 0; lane < TP_LANES; ++lane) {
            const int64_t n = block * TP_LANES + lane, at = (block * w->groups + g) * TP_LANES + lane, group = from->group_of[g];
            const bool there = n < w->outputs;
            from->scale[at] = there ? from->scales[group * w->outputs + n] : 0;
            if (from->zero)
                from->zero[at] = there ? (int16_t)(field(from->zeros + group * zero_words, 1, n, w->bits) + from->zero_offset) : 0;
        }
}

inline int64_t lanes_of(const struct tp_weights *w, int64_t block) {
    const int64_t left = w->outputs - block * TP_LANES;
    return left < TP_LANES ? left : TP_LANES;
}

// What does not come in whole words: 3 bits, activation order, the inputs behind the last whole slice.
void pack_rest(const struct Source *from, int64_t block, int64_t place, uint8_t *data, int64_t slice, int64_t size) {
    const struct tp_weights *w = from->w;
    const int bits = w->bits;
    const int64_t lanes = lanes_of(w, block);
    for (; place < w->groups * w->group; ++place) {
        const int64_t k = w->order ? w->order[place] : place < w->inputs ? place : -1;
        if (k < 0) continue;
        uint8_t *to = data + place / slice * size;
        const int64_t within = place % slice, step = within / 4, j = within % 4;
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const uint32_t q = field(from->words + block * TP_LANES + lane, w->outputs, k, bits);
            if (bits == 3) {
                const int64_t half = 4 * (step % 2);
                if (step < 6) to[64 * (step / 2) + 4 * lane + j] |= (uint8_t)(q << half);
                else for (int p = 0; p < 3; ++p) to[64 * p + 4 * lane + j] |= (uint8_t)((q >> p & 1) << (3 + half));
            } else to[4 * lane + j] |= (uint8_t)(q << (bits == 8 ? 0 : bits * step));
        }
    }
}

const int64_t BESIDE = 8; // blocks that are packed together: their words lie side by side

void pack_blocks(void *pointer, int64_t at, float *) {
    const struct Source *from = (const struct Source *)pointer;
    const struct tp_weights *w = from->w;
    const int bits = w->bits;
    const int64_t slice = bits == 8 ? 4 : bits == 4 ? 8 : bits == 2 ? 16 : 32, size = bits == 3 ? 192 : 64;
    const int64_t bytes = w->groups * w->group / slice * size, first = at * BESIDE;
    const int64_t last = first + BESIDE < w->blocks ? first + BESIDE : w->blocks;
    const int64_t whole = w->order || bits == 3 ? 0 : w->inputs / slice; // slices that are a row of words
    for (int64_t s = 0; s < whole; ++s)
        for (int64_t block = first; block < last; ++block) {
            const int32_t *words = from->words + s * w->outputs + block * TP_LANES;
            uint32_t out[TP_LANES] = {0};
            for (int64_t lane = 0; lane < lanes_of(w, block); ++lane) out[lane] = slice_word((uint32_t)words[lane], bits);
            memcpy(from->data + block * bytes + s * size, out, sizeof out);
        }
    for (int64_t block = first; block < last; ++block) {
        uint8_t *data = from->data + block * bytes;
        memset(data + whole * size, 0, (size_t)(bytes - whole * size));
        pack_rest(from, block, whole * slice, data, slice, size);
        pack_scales(from, block);
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
    struct tp_task task = {read_piece, &reading, (bytes / 8 + PIECE - 1) / PIECE, 0, 0, 0};
    tp_spread(&task, threads);
    return reading.sum;
}

// What is worth a thread, for tests: 0 uses all threads for everything.
void tp_limit_threads(int64_t work) { tp_worth_a_thread = work; }

// The highest instruction set to use, for tests: 0 portable, 1 AVX2, 2 AVX-VNNI, 3 AVX-512 with VNNI, 4 with BF16, too.
void tp_limit(int level) {
    highest = level;
    __atomic_store_n(&known_set, nullptr, __ATOMIC_RELAXED);
}

const char *tp_instructions(void) { return tp_set()->name; }

// Pack a layer in the GPTQ layout; `w` has its arrays to be filled. Returns 0.
int tp_pack(const struct tp_weights *w, const int32_t *words, const int32_t *zeros, const uint16_t *scales, const int32_t *group_of,
            int32_t zero_offset, int threads) {
    struct Source from = {w, words, zeros, scales, group_of, (uint8_t *)w->data, (int16_t *)w->zero, (uint16_t *)w->scale, zero_offset};
    struct tp_task task = {pack_blocks, &from, (w->blocks + BESIDE - 1) / BESIDE, 0, 0, 0};
    return tp_spread(&task, threads);
}

// y = x W^T + b. Returns 0, or -1 when memory is short.
int tp_linear(const struct tp_call *call, int threads) { return tp_multiply(call, 1, threads); }

// The same by numbers alone, which are quicker to hand over than a structure.
int tp_product(const struct tp_weights *w, const void *x, void *y, int64_t rows, int64_t stride, int64_t columns, int type, int mode, int threads) {
    const struct tp_call call = {w, x, y, rows, stride, columns, type, mode, type, 0, nullptr};
    return tp_multiply(&call, 1, threads);
}
}

int64_t tp_worth_a_thread = (int64_t)1 << 18;

#if defined(TP_EMULATED)
#define TP_HAS(feature) true
#else
#define TP_HAS(feature) __builtin_cpu_supports(feature)
#endif

#if defined(__x86_64__)
// Features that compilers learned to ask for late: bits of CPUID leaf 7.1, EAX.
static bool has_late(int bit) {
#if defined(TP_EMULATED)
    return bit >= 0;
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> bit & 1);
#endif
}
#endif

static const struct tp_kernels *best_set(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool vnni = TP_HAS("avx512f") && TP_HAS("avx512bw") && TP_HAS("avx512dq") && TP_HAS("avx512vl") && TP_HAS("avx512vnni");
    const bool avx2 = TP_HAS("avx2") && TP_HAS("fma");
#if defined(TP_KNOWS_BF16)
    if (highest >= 4 && vnni && has_late(5)) return &tp_avx512;
#endif
    if (highest >= 3 && vnni) return &tp_avx512vl;
#if defined(TP_KNOWS_AVXVNNI)
    if (highest >= 2 && avx2 && has_late(4)) return &tp_avxvnni;
#endif
    if (highest >= 1 && avx2) return &tp_avx2;
#endif
    return &tp_portable;
}

// Asked once: CPUID leaves a virtual machine, which takes as long as a small product.
const struct tp_kernels *tp_set(void) {
    const struct tp_kernels *set = __atomic_load_n(&known_set, __ATOMIC_RELAXED);
    if (!set) __atomic_store_n(&known_set, set = best_set(), __ATOMIC_RELAXED);
    return set;
}

// A process that was forked has none of its parent's threads: it works alone.
int tp_spread(struct tp_task *task, int threads) {
    if (threads > task->count) threads = (int)task->count;
    if (threads > 1 && pool && pool_process == (int)getpid()) pool(take, task, (unsigned)threads, 0);
    else take(task);
    return task->failed && task->next < task->count ? -1 : 0;
}

int tp_multiply(const struct tp_call *calls, int count, int threads) {
    struct Jobs jobs;
    jobs.set = tp_set();
    jobs.count = 0;
    size_t size = 0, scratch = 0;
    int64_t blocks = 0, tiles = 0, work = 0;
    for (int i = 0; i < count; ++i) {
        const struct tp_call *call = &calls[i];
        const struct tp_weights *w = call->w;
        if (call->rows < 1 || w->outputs < 1) continue;
        struct Job *job = &jobs.job[jobs.count];
        struct tp_input *in = &job->in;
        job->call = call;
        blocks += w->blocks;
        work += w->blocks * TP_LANES * w->groups * w->group / 4 * (3 + call->rows);
        for (job->prepared_by = 0; job->prepared_by < jobs.count; ++job->prepared_by)
            if (alike(jobs.set, call, jobs.job[job->prepared_by].call)) break;
        if (job->prepared_by == jobs.count++) {
            const bool sparse = w->bits == TP_SPARSE;
            const int integers = integers_of(jobs.set, call);
            in->integers = integers > 0;
            in->parts = integers ? integers : jobs.set->is_bf16 && !sparse && call->type != TP_BF16 ? 2 : 1;
            const int64_t rows = call->rows * in->parts, places = w->groups * w->group;
            in->tile = tile_rows(rows, sparse ? TP_SPARSE_ROWS : jobs.set->most_rows);
            in->tiles = (rows + in->tile - 1) / in->tile;
            in->bytes_per_tile = (size_t)(integers ? places * in->tile : sparse ? 4 * places * in->tile : places / 2 * in->tile * (int64_t)jobs.set->pair_bytes);
            tiles += in->tiles;
            size += in->bytes_per_tile * (size_t)in->tiles + 2 * (size_t)(in->tiles * in->tile * w->groups) * 4 + 3 * TP_ALIGN;
            const size_t row = (size_t)(places + (call->fill && w->order ? w->inputs : 0));
            scratch = scratch < row ? row : scratch;
        }
    }
    if (!jobs.count) return 0;
    threads = tp_threads_for(work, threads);
    char *room = nullptr;
    if (posix_memalign((void **)&room, TP_ALIGN, size)) return -1;
    int64_t chunks = 0;
    size_t at = 0;
    for (int i = 0; i < jobs.count; ++i) {
        struct Job *job = &jobs.job[i];
        struct tp_input *in = &job->in;
        if (job->prepared_by == i) {
            const size_t values = in->bytes_per_tile * (size_t)in->tiles, each = (size_t)(in->tiles * in->tile * job->call->w->groups) * 4;
            in->values = room + at;
            in->scale = (float *)(room + at + values);
            in->sum = room + at + values + each;
            at += (values + 2 * each + TP_ALIGN - 1) / TP_ALIGN * TP_ALIGN;
        }
        job->chunk = blocks / (CHUNKS * (int64_t)threads);
        if (job->chunk < 1) job->chunk = 1;
        job->chunks = (job->call->w->blocks + job->chunk - 1) / job->chunk;
        chunks += job->chunks;
    }
    struct tp_task first = {prepare_tile, &jobs, tiles, scratch, 0, 0};
    int problem = tp_spread(&first, threads);
    if (!problem) {
        struct tp_task second = {work_chunk, &jobs, chunks, 0, 0, 0};
        problem = tp_spread(&second, threads);
    }
    free(room);
    return problem;
}
