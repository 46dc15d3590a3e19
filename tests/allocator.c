/* Another allocator, for a process that preloads it: blocks of powers of two, without any header that glibc would know.

   What is in front of a block is nonsense to glibc, so a program that looks there, or hands glibc's functions a block of
   its own, comes to grief. Freed blocks are used again. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define ALIGN 64
#define NONSENSE 0xa5a5a5a5a5a5a5a5ull
#define POOL (1ull << 38) /* addresses only; pages come when they are touched */

typedef struct { uint64_t start, order, size, nonsense[5]; } Head; /* ALIGN bytes in front of a block */

static volatile int lock;
static char *pool;
static uint64_t used;
static void *freed[40];

static void *take(uint64_t order) {
    while (__sync_lock_test_and_set(&lock, 1)) {
    }
    void *block = freed[order];
    if (block) {
        freed[order] = *(void **)block;
    } else {
        if (!pool) pool = mmap(0, POOL, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (pool != MAP_FAILED && used + (1ull << order) <= POOL) block = pool + used, used += 1ull << order;
    }
    __sync_lock_release(&lock);
    return block;
}

void *memalign(size_t align, size_t size) {
    uint64_t order = 7;
    if (align < ALIGN) align = ALIGN;
    while ((1ull << order) < size + align + sizeof(Head)) order++;
    char *block = order < 38 ? take(order) : 0;
    if (!block) {
        errno = ENOMEM;
        return 0;
    }
    char *given = (char *)(((uintptr_t)block + sizeof(Head) + align - 1) / align * align);
    Head *head = (Head *)given - 1;
    memset(head, 0xa5, sizeof *head);
    head->start = (uint64_t)block, head->order = order, head->size = size;
    return given;
}

void free(void *given) {
    if (!given) return;
    Head *head = (Head *)given - 1;
    void *block = (void *)head->start;
    uint64_t order = head->order;
    if (head->nonsense[4] != NONSENSE) __builtin_trap();
    while (__sync_lock_test_and_set(&lock, 1)) {
    }
    *(void **)block = freed[order];
    freed[order] = block;
    __sync_lock_release(&lock);
}

void *malloc(size_t size) { return memalign(ALIGN, size); }
void *aligned_alloc(size_t align, size_t size) { return memalign(align, size); }
void *valloc(size_t size) { return memalign(4096, size); }
size_t malloc_usable_size(void *given) { return given ? ((Head *)given - 1)->size : 0; }

int posix_memalign(void **out, size_t align, size_t size) {
    void *given = memalign(align, size);
    if (given) *out = given;
    return given ? 0 : ENOMEM;
}

void *calloc(size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) return 0;
    void *given = malloc(count * size);
    return given ? memset(given, 0, count * size) : 0;
}

void *realloc(void *given, size_t size) {
    void *moved = malloc(size);
    if (given && moved) {
        size_t held = malloc_usable_size(given);
        memcpy(moved, given, held < size ? held : size);
        free(given);
    }
    return moved;
}
