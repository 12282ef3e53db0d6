/* A few threads that share a loop's iterations. */
#ifndef NATIVE_POOL_H
#define NATIVE_POOL_H

#include <stdint.h>

struct pool;

/* Work on iterations [begin, end). `worker` counts from 0 (the caller) and tells scratch memory apart. */
typedef void pool_work(void *argument, int32_t begin, int32_t end, int32_t worker);

/* `threads` counts the caller. NULL where a thread cannot be had. */
struct pool *pool_new(int32_t threads);
void pool_free(struct pool *pool);

/* Runs all `count` iterations, in pieces of at least `grain`, and returns when the last has ended. Which thread
 * runs what is left to chance: nothing that is computed may depend on it. */
void pool_run(struct pool *pool, pool_work *work, void *argument, int32_t count, int32_t grain);

#endif
