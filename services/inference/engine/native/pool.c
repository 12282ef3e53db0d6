/* Threads take pieces of a loop by compare-and-swap on one ticket: the loop's number and the next iteration.
 *
 * A loop ends when all its iterations have, not when all threads have come by: a thread that the system did not
 * schedule delays nobody unless it holds a piece. Waiting spins for some microseconds, since a step is hundreds of
 * short loops, then sleeps, since the cores are shared with other processes. */
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

enum { SPINS = 2000, NEXT_BITS = 24 };
static const uint64_t NEXT = ((uint64_t)1 << NEXT_BITS) - 1;

struct pool {
    int32_t threads; /* with the caller */
    pthread_t *workers;
    int32_t started;

    /* The loop: written while the ticket is closed, with NEXT as next iteration. */
    _Atomic(pool_work *) work;
    _Atomic(void *) argument;
    _Atomic int32_t count, grain;
    _Alignas(64) _Atomic uint64_t ticket; /* the loop's number << NEXT_BITS | the next iteration */
    _Alignas(64) _Atomic int32_t left;    /* iterations that have not ended */

    _Alignas(64) pthread_mutex_t lock;
    pthread_cond_t more, ended;
    _Atomic int32_t sleepers; /* workers that sleep or are about to */
    _Atomic bool caller_sleeps, stop;
};

struct worker {
    struct pool *pool;
    int32_t index;
};

static inline void breathe(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Takes pieces of the loop in `ticket` until none is left. */
static void take_part(struct pool *pool, uint64_t ticket, int32_t worker)
{
    const uint64_t loop = ticket >> NEXT_BITS;
    while (ticket >> NEXT_BITS == loop) {
        const int32_t begin = (int32_t)(ticket & NEXT), count = pool->count, grain = pool->grain;
        pool_work *work = pool->work;
        void *argument = pool->argument;
        if (begin >= count)
            return;
        /* Large pieces first, small ones last, so that the threads end together. */
        int32_t piece = (count - begin) / (2 * pool->threads);
        piece = piece < grain ? grain : piece;
        piece = piece > count - begin ? count - begin : piece;
        /* Where this succeeds, what was read belongs to this loop: it cannot end without this piece, and the
         * ticket is closed before the next one is written. */
        if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + (uint32_t)piece))
            continue;
        work(argument, begin, begin + piece, worker);
        if (atomic_fetch_sub(&pool->left, piece) == piece && pool->caller_sleeps) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->ended);
            pthread_mutex_unlock(&pool->lock);
        }
        ticket = pool->ticket;
    }
}

static uint64_t wait_for_loop(struct pool *pool, uint64_t seen)
{
    for (int spin = 0; spin < SPINS; spin++) {
        const uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
        if (ticket >> NEXT_BITS != seen)
            return ticket;
        breathe();
    }
    pthread_mutex_lock(&pool->lock);
    pool->sleepers++;
    uint64_t ticket;
    while ((ticket = pool->ticket) >> NEXT_BITS == seen && !pool->stop)
        pthread_cond_wait(&pool->more, &pool->lock);
    pool->sleepers--;
    pthread_mutex_unlock(&pool->lock);
    return ticket;
}

static void *run_worker(void *argument)
{
    const struct worker self = *(struct worker *)argument;
    free(argument);
    uint64_t seen = 0;
    while (!self.pool->stop) {
        const uint64_t ticket = wait_for_loop(self.pool, seen);
        seen = ticket >> NEXT_BITS;
        take_part(self.pool, ticket, self.index);
    }
    return NULL;
}

struct pool *pool_new(int32_t threads)
{
    struct pool *pool = NULL;
    if (posix_memalign((void **)&pool, 64, sizeof *pool))
        return NULL;
    *pool = (struct pool){.threads = threads, .workers = calloc((size_t)threads, sizeof(pthread_t))};
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->more, NULL);
    pthread_cond_init(&pool->ended, NULL);
    for (int32_t i = 1; i < threads; i++) {
        struct worker *worker = malloc(sizeof *worker);
        if (!pool->workers || !worker) {
            free(worker);
            pool_free(pool);
            return NULL;
        }
        *worker = (struct worker){pool, i};
        if (pthread_create(&pool->workers[pool->started], NULL, run_worker, worker)) {
            free(worker);
            pool_free(pool);
            return NULL;
        }
        pool->started++;
    }
    return pool;
}

void pool_free(struct pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->more);
    pthread_mutex_unlock(&pool->lock);
    for (int32_t i = 0; i < pool->started; i++)
        pthread_join(pool->workers[i], NULL);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->more);
    pthread_cond_destroy(&pool->ended);
    free(pool->workers);
    free(pool);
}

void pool_run(struct pool *pool, pool_work *work, void *argument, int32_t count, int32_t grain)
{
    if (count <= grain || pool->threads == 1) {
        if (count > 0)
            work(argument, 0, count, 0);
        return;
    }
    const uint64_t last = pool->ticket >> NEXT_BITS;
    pool->ticket = (last + 1) << NEXT_BITS | NEXT; /* closed: nobody takes the new fields for the old loop's */
    pool->work = work;
    pool->argument = argument;
    pool->count = count;
    pool->grain = grain;
    pool->left = count;
    const uint64_t ticket = (last + 2) << NEXT_BITS;
    pool->ticket = ticket;
    if (pool->sleepers) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->more);
        pthread_mutex_unlock(&pool->lock);
    }
    take_part(pool, ticket, 0);
    for (int spin = 0; spin < SPINS; spin++) {
        if (!atomic_load_explicit(&pool->left, memory_order_acquire))
            return;
        breathe();
    }
    pthread_mutex_lock(&pool->lock);
    pool->caller_sleeps = true;
    while (pool->left)
        pthread_cond_wait(&pool->ended, &pool->lock);
    pool->caller_sleeps = false;
    pthread_mutex_unlock(&pool->lock);
}
