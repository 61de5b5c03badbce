// Work in pieces on the threads of the program, and products of several layers with one input.
#pragma once

#include "linear.h"

struct tp_task {
    void (*step)(void *data, int64_t at, float *scratch);
    void *data;
    int64_t count; // pieces
    size_t scratch; // floats for each thread
    int64_t next;
    int failed;
};

// The instruction set in use.
const struct tp_kernels *tp_set(void);

// At most one thread for so many multiply-adds or bytes: waking one, and waiting for it, takes microseconds, and more where others work, too.
extern int64_t tp_worth_a_thread;
inline int tp_threads_for(int64_t work, int threads) {
    return tp_worth_a_thread > 0 && work / tp_worth_a_thread + 1 < threads ? (int)(work / tp_worth_a_thread) + 1 : threads;
}

// Do all pieces of a task. Returns 0, or -1 when memory is short.
int tp_spread(struct tp_task *task, int threads);

// Products with the same x [rows][inputs]: the input is prepared once for all layers that want it alike. At most TP_TOGETHER. Returns as above.
#define TP_TOGETHER 4
int tp_multiply(const struct tp_call *calls, int count, int threads);
