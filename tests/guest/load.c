/* A load that verifies itself: every block written carries its own number and a generation, every read is checked.
 *
 *   load [options] PATH              random writes, reads, flushes, discards and zeroes against a model kept in memory
 *   load --sweep [options] PATH      whole rounds over the area: round r gives every block generation r, then flushes
 *                                    and says so in the kernel log (or --report=FILE); what was said must survive
 *                                    whatever comes next
 *   load --check=A[,B...] PATH       after a crash: every block belongs to its place, is whole, and is of a generation
 *                                    not below its thread's last reported round (A for the first thread, B ...), and
 *                                    not above the second round after it (its report may have been cut off)
 *   load --against=FILE PATH         every block holds what a random load that has ended knew of it (its --model=FILE)
 *
 * With --continue the random load begins with what its --model=FILE holds, as an earlier one left it (all zero: a blank
 * disk), so that it knows every block. With --read-back it reads each write again at once. The end of every load says
 * how long the slowest of its operations took.
 *
 * Each thread owns a part of its own, so that many requests are in flight and no write races with another.
 * Exit status: 0 all was as it should be, 1 a block was wrong, 2 usage, 3 an I/O error that was not expected.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { THREADS_MAX = 64, WORDS_OF_HEAD = 3 };
enum { WRONG = 1, USAGE = 2, IO_ERROR = 3 };
enum on_error { ERROR_FAILS, ERROR_IS_NOTED, ERROR_ENDS };

static const uint64_t MAGIC = 0x76686f7374757365; /* "vhostuse" */
static const uint32_t ZEROED = 0, ANYTHING = UINT32_MAX, FIRST = 1;

struct counters {
    uint64_t writes, write_bytes, reads, read_bytes, flushes, discards, zeroes, errors, mismatches, rounds, unknown;
};

struct part { /* what one thread owns */
    pthread_t thread;
    int number, fd;
    uint64_t first, blocks, floor;
    uint32_t *model; /* generation of each block; ZEROED and ANYTHING are special */
    unsigned char *buffer;
    uint64_t random;
    uint32_t generation;
    struct counters seen;
    double slowest; /* seconds */
};

static struct {
    const char *path, *report, *model, *against;
    size_t block, largest;
    uint64_t offset, size, seed;
    double seconds;
    int threads, direct, sweep, check, discard, is_device, read_back, goes_on;
    enum on_error on_error;
    uint64_t floors[THREADS_MAX];
} options = {.block = 512, .largest = 1 << 20, .threads = 4, .seed = 1, .seconds = 1e9, .report = "/dev/kmsg"};

static atomic_int stop_asked, gone, mismatches_shown;

static void stop_on_signal(int number) {
    (void)number;
    atomic_store(&stop_asked, 1);
}

__attribute__((noreturn, format(printf, 2, 3))) static void fail(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stdout);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
    exit(status);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static uint64_t mixed(uint64_t value) { /* splitmix64 */
    value += 0x9e3779b97f4a7c15;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
    value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
    return value ^ (value >> 31);
}

static uint64_t drawn(struct part *part, uint64_t below) {
    part->random = mixed(part->random);
    return part->random % below;
}

static void fill(uint64_t *words, uint64_t number, uint32_t generation) {
    uint64_t step = mixed(number ^ ((uint64_t)generation << 40)) | 1, value = step;
    words[0] = MAGIC;
    words[1] = number;
    words[2] = generation;
    for (size_t i = WORDS_OF_HEAD; i < options.block / 8; i++)
        words[i] = value += step;
}

/* What a block holds: the generation it was written with when it is whole and in its place, ZEROED when it is all
 * zeroes, ANYTHING when it is neither. */
static uint32_t held(const uint64_t *words, uint64_t number) {
    if (words[0] == MAGIC && words[1] == number && words[2] >= FIRST && words[2] < ANYTHING) {
        uint64_t step = mixed(number ^ (words[2] << 40)) | 1, value = step, wrong = 0;
        for (size_t i = WORDS_OF_HEAD; i < options.block / 8; i++)
            wrong |= words[i] ^ (value += step);
        return wrong ? ANYTHING : (uint32_t)words[2];
    }
    uint64_t any = 0;
    for (size_t i = 0; i < options.block / 8; i++)
        any |= words[i];
    return any ? ANYTHING : ZEROED;
}

static void mismatch(struct part *part, uint64_t number, const char *wanted, uint32_t generation, const uint64_t *words) {
    part->seen.mismatches++;
    if (atomic_fetch_add(&mismatches_shown, 1) < 10)
        printf("load: MISMATCH block %llu (byte %llu): wanted %s %u, found magic %016llx number %llu generation %llu\n",
               (unsigned long long)number, (unsigned long long)(number * options.block), wanted, generation,
               (unsigned long long)words[0], (unsigned long long)words[1], (unsigned long long)words[2]);
}

static void took(struct part *part, double since) {
    double seconds = now() - since;
    if (seconds > part->slowest)
        part->slowest = seconds;
}

/* Moves `length` bytes at `offset`; returns 0, or -1 with errno when that cannot be done. */
static int move(struct part *part, int writing, uint64_t offset, size_t length) {
    double start = now();
    for (size_t done = 0; done < length;) {
        ssize_t moved = writing ? pwrite(part->fd, part->buffer + done, length - done, options.offset + offset + done)
                                : pread(part->fd, part->buffer + done, length - done, options.offset + offset + done);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0) {
            errno = moved ? errno : ENOSPC;
            return -1;
        }
        done += moved;
    }
    took(part, start);
    return 0;
}

/* An operation failed: what that means was said on the command line. */
static void failed(struct part *part, const char *what, uint64_t first, uint64_t count, int changes) {
    int error = errno;
    part->seen.errors++;
    if (options.on_error == ERROR_FAILS)
        fail(IO_ERROR, "%s of %llu blocks at %llu failed: %s", what, (unsigned long long)count, (unsigned long long)first,
             strerror(error));
    if (options.on_error == ERROR_ENDS) {
        atomic_store(&gone, 1);
        atomic_store(&stop_asked, 1);
    }
    for (uint64_t i = 0; changes && i < count; i++)
        part->model[first - part->first + i] = ANYTHING;
}

static void write_blocks(struct part *part, uint64_t first, uint64_t count, uint32_t generation) {
    for (uint64_t i = 0; i < count; i++)
        fill((uint64_t *)(part->buffer + i * options.block), first + i, generation);
    if (move(part, 1, first * options.block, count * options.block)) {
        failed(part, "write", first, count, 1);
        return;
    }
    for (uint64_t i = 0; i < count; i++)
        part->model[first - part->first + i] = generation;
    part->seen.writes++;
    part->seen.write_bytes += count * options.block;
}

static void verify_blocks(struct part *part, uint64_t first, uint64_t count) {
    if (move(part, 0, first * options.block, count * options.block)) {
        failed(part, "read", first, count, 0);
        return;
    }
    part->seen.reads++;
    part->seen.read_bytes += count * options.block;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t *words = (uint64_t *)(part->buffer + i * options.block);
        uint32_t wanted = part->model[first - part->first + i];
        if (wanted == ANYTHING)
            part->seen.unknown++;
        else if (held(words, first + i) != wanted)
            mismatch(part, first + i, wanted == ZEROED ? "zeroes, generation" : "generation", wanted, words);
    }
}

static void flush(struct part *part) {
    double start = now();
    if (fdatasync(part->fd))
        failed(part, "flush", part->first, 0, 0);
    took(part, start);
    part->seen.flushes++;
}

static void clear_blocks(struct part *part, uint64_t first, uint64_t count, int zeroing) {
    uint64_t range[2] = {options.offset + first * options.block, count * options.block};
    if (ioctl(part->fd, zeroing ? BLKZEROOUT : BLKDISCARD, range)) {
        failed(part, zeroing ? "zeroing" : "discard", first, count, 1);
        return;
    }
    for (uint64_t i = 0; i < count; i++)
        part->model[first - part->first + i] = zeroing ? ZEROED : ANYTHING;
    if (zeroing)
        part->seen.zeroes++;
    else
        part->seen.discards++;
}

/* A run of blocks: sizes spread evenly over the powers of two, at any block. */
static uint64_t choose(struct part *part, uint64_t *count) {
    uint64_t most = options.largest / options.block, limit = 1;
    int powers = 64 - __builtin_clzll(most);
    limit <<= drawn(part, powers);
    *count = 1 + drawn(part, limit);
    if (drawn(part, 16) == 0)
        *count = most;
    if (*count > most)
        *count = most;
    if (*count > part->blocks)
        *count = part->blocks;
    return part->first + drawn(part, part->blocks - *count + 1);
}

static void verify_all(struct part *part) {
    uint64_t most = options.largest / options.block;
    for (uint64_t at = 0; at < part->blocks && !atomic_load(&gone); at += most)
        verify_blocks(part, part->first + at, part->blocks - at < most ? part->blocks - at : most);
}

static void run_random(struct part *part, double end) {
    for (uint64_t i = 0; i < part->blocks; i++)
        if (!options.goes_on)
            part->model[i] = ANYTHING;
        else if (part->model[i] != ANYTHING && part->model[i] >= part->generation)
            part->generation = part->model[i] + 1;
    while (!atomic_load(&stop_asked) && now() < end) {
        uint64_t count, first = choose(part, &count), kind = drawn(part, 100);
        if (kind < 50) {
            write_blocks(part, first, count, part->generation++);
            if (options.read_back && !atomic_load(&gone))
                verify_blocks(part, first, count);
        } else if (kind < 92 || (!options.discard && kind < 98))
            verify_blocks(part, first, count);
        else if (kind >= 98 || !options.discard)
            flush(part);
        else
            clear_blocks(part, first, count, kind & 1);
    }
    verify_all(part);
}

static void report_round(const struct part *part, uint64_t round) {
    char line[200];
    int length = snprintf(line, sizeof line, "load: thread %d flushed round %llu of %s\n", part->number,
                          (unsigned long long)round, options.path);
    int log = open(options.report, O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (log < 0 || write(log, line, length) != length)
        fail(USAGE, "cannot write to %s: %s", options.report, strerror(errno));
    close(log);
}

static void run_sweep(struct part *part, double end) {
    uint64_t most = options.largest / options.block;
    for (uint32_t round = part->floor + 1; !atomic_load(&stop_asked) && now() < end; round++) {
        for (uint64_t at = 0; at < part->blocks && !atomic_load(&stop_asked);) {
            uint64_t count = 1 + drawn(part, most), left = part->blocks - at;
            count = count > left ? left : count;
            write_blocks(part, part->first + at, count, round);
            at += count;
            if (drawn(part, 8) == 0 && !atomic_load(&stop_asked)) /* what this round has written must be there already */
                verify_blocks(part, part->first + at - count, count);
        }
        if (atomic_load(&stop_asked))
            break;
        flush(part);
        if (!atomic_load(&stop_asked)) {
            report_round(part, round);
            part->seen.rounds++;
        }
    }
}

static void run_check(struct part *part) {
    uint64_t most = options.largest / options.block;
    for (uint64_t at = 0; at < part->blocks; at += most) {
        uint64_t first = part->first + at, count = part->blocks - at < most ? part->blocks - at : most;
        if (move(part, 0, first * options.block, count * options.block))
            failed(part, "read", first, count, 0);
        part->seen.reads++;
        part->seen.read_bytes += count * options.block;
        for (uint64_t i = 0; i < count; i++) {
            const uint64_t *words = (uint64_t *)(part->buffer + i * options.block);
            uint32_t found = held(words, first + i);
            if (found == ANYTHING || found < part->floor || found > part->floor + 2)
                mismatch(part, first + i, "at least generation", (uint32_t)part->floor, words);
        }
    }
}

static void *run(void *argument) {
    struct part *part = argument;
    double end = now() + options.seconds;
    if (options.against)
        verify_all(part);
    else if (options.check)
        run_check(part);
    else if (options.sweep)
        run_sweep(part, end);
    else
        run_random(part, end);
    return NULL;
}

static uint64_t number_of(const char *text) {
    char *end;
    uint64_t value = strtoull(text, &end, 0);
    int shift = *end == 'K' ? 10 : *end == 'M' ? 20 : *end == 'G' ? 30 : 0;
    if (end == text || (shift ? end[1] : end[0]))
        fail(USAGE, "`%s` is not a number", text);
    return value << shift;
}

static void parse(int count, char **words) {
    static const struct option known[] = {
        {"block", 1, 0, 'b'},     {"largest", 1, 0, 'l'}, {"offset", 1, 0, 'o'}, {"size", 1, 0, 's'},
        {"seconds", 1, 0, 't'},   {"threads", 1, 0, 'n'}, {"seed", 1, 0, 'r'},   {"direct", 0, 0, 'd'},
        {"discard", 0, 0, 'x'},   {"sweep", 0, 0, 'w'},   {"check", 1, 0, 'c'},  {"from", 1, 0, 'f'},
        {"on-error", 1, 0, 'e'},  {"report", 1, 0, 'p'}, {"model", 1, 0, 'm'}, {"against", 1, 0, 'a'},
        {"read-back", 0, 0, 'k'}, {"continue", 0, 0, 'g'}, {0, 0, 0, 0},
    };
    for (int option; (option = getopt_long(count, words, "", known, NULL)) != -1;) {
        switch (option) {
        case 'b': options.block = number_of(optarg); break;
        case 'l': options.largest = number_of(optarg); break;
        case 'p': options.report = optarg; break;
        case 'o': options.offset = number_of(optarg); break;
        case 's': options.size = number_of(optarg); break;
        case 't': options.seconds = strtod(optarg, NULL); break;
        case 'n': options.threads = (int)number_of(optarg); break;
        case 'r': options.seed = number_of(optarg); break;
        case 'd': options.direct = 1; break;
        case 'x': options.discard = 1; break;
        case 'w': options.sweep = 1; break;
        case 'm': options.model = optarg; break;
        case 'a': options.against = optarg; break;
        case 'k': options.read_back = 1; break;
        case 'g': options.goes_on = 1; break;
        case 'c':
            options.check = 1; /* fall through */
        case 'f':
            options.threads = 0;
            for (char *word = strtok(optarg, ","); word && options.threads < THREADS_MAX; word = strtok(NULL, ","))
                options.floors[options.threads++] = number_of(word);
            break;
        case 'e':
            options.on_error = !strcmp(optarg, "note") ? ERROR_IS_NOTED : !strcmp(optarg, "end") ? ERROR_ENDS : ERROR_FAILS;
            break;
        default: exit(USAGE);
        }
    }
    if (optind != count - 1 || options.threads < 1 || options.threads > THREADS_MAX || options.block < 512 ||
        options.block % 512 || options.largest < options.block || (options.goes_on && !options.model))
        fail(USAGE, "usage: load [--block=N] [--largest=N] [--offset=N] [--size=N] [--seconds=N] [--threads=N] [--seed=N] "
                    "[--direct] [--discard] [--on-error=fail|note|end] [--read-back] [--model=FILE [--continue]] "
                    "[--sweep [--from=A,...] [--report=FILE] | --check=A,... | --against=FILE] PATH");
    options.path = words[optind];
}

static int opened(void) {
    int fd = open(options.path, O_RDWR | O_CLOEXEC | (options.direct ? O_DIRECT : 0));
    struct stat status;
    if (fd < 0 || fstat(fd, &status))
        fail(IO_ERROR, "cannot open %s: %s", options.path, strerror(errno));
    uint64_t size = status.st_size;
    options.is_device = S_ISBLK(status.st_mode);
    if (options.is_device && ioctl(fd, BLKGETSIZE64, &size))
        fail(IO_ERROR, "%s does not tell its size: %s", options.path, strerror(errno));
    if (options.offset >= size)
        fail(USAGE, "%s has %llu bytes", options.path, (unsigned long long)size);
    if (!options.size)
        options.size = size - options.offset;
    if (options.discard && !options.is_device)
        fail(USAGE, "%s is no block device: nothing to discard", options.path);
    return fd;
}

/* Writes the models of all parts to a file, in the order of their blocks, or reads them from it. */
static void keep_models(struct part *parts, const char *path, int writing) {
    FILE *file = fopen(path, writing ? "w" : "r");
    for (int i = 0; file && i < options.threads; i++) {
        size_t blocks = parts[i].blocks;
        if ((writing ? fwrite(parts[i].model, sizeof(uint32_t), blocks, file)
                     : fread(parts[i].model, sizeof(uint32_t), blocks, file)) != blocks)
            fail(USAGE, "%s does not hold the model of %zu blocks", path, blocks * options.threads);
    }
    if (!file || fclose(file))
        fail(USAGE, "cannot use %s: %s", path, strerror(errno));
}

int main(int count, char **words) {
    static struct part parts[THREADS_MAX];
    struct counters sum = {0};
    parse(count, words);
    int fd = opened();
    uint64_t each = options.size / options.block / options.threads;
    if (!each)
        fail(USAGE, "%llu bytes are too few for %d threads", (unsigned long long)options.size, options.threads);
    signal(SIGTERM, stop_on_signal);
    signal(SIGINT, stop_on_signal);
    double start = now();
    for (int i = 0; i < options.threads; i++) {
        struct part *part = &parts[i];
        part->number = i;
        part->fd = fd;
        part->first = i * each;
        part->blocks = each;
        part->floor = options.floors[i];
        part->generation = FIRST;
        part->random = mixed(options.seed * THREADS_MAX + i);
        part->model = calloc(each, sizeof *part->model);
        part->buffer = aligned_alloc(4096, (options.largest + 4095) / 4096 * 4096);
        if (!part->model || !part->buffer)
            fail(USAGE, "no memory for the model of %llu blocks", (unsigned long long)each);
    }
    if (options.against)
        keep_models(parts, options.against, 0);
    if (options.goes_on)
        keep_models(parts, options.model, 0);
    for (int i = 0; i < options.threads; i++)
        if (pthread_create(&parts[i].thread, NULL, run, &parts[i]))
            fail(USAGE, "cannot start a thread");
    double slowest = 0;
    for (int i = 0; i < options.threads; i++) {
        pthread_join(parts[i].thread, NULL);
        const uint64_t *from = (const uint64_t *)&parts[i].seen;
        uint64_t *to = (uint64_t *)&sum;
        for (size_t word = 0; word < sizeof sum / sizeof *to; word++)
            to[word] += from[word];
        if (parts[i].slowest > slowest)
            slowest = parts[i].slowest;
    }
    close(fd);
    if (options.model)
        keep_models(parts, options.model, 1);
    printf("load: %s seconds=%.1f writes=%llu write_bytes=%llu reads=%llu read_bytes=%llu flushes=%llu discards=%llu "
           "zeroes=%llu rounds=%llu unknown=%llu slowest=%.3f errors=%llu mismatches=%llu\n",
           sum.mismatches ? "WRONG" : atomic_load(&gone) ? "gone" : "ok", now() - start, (unsigned long long)sum.writes,
           (unsigned long long)sum.write_bytes, (unsigned long long)sum.reads, (unsigned long long)sum.read_bytes,
           (unsigned long long)sum.flushes, (unsigned long long)sum.discards, (unsigned long long)sum.zeroes,
           (unsigned long long)sum.rounds, (unsigned long long)sum.unknown, slowest, (unsigned long long)sum.errors, (unsigned long long)sum.mismatches);
    return sum.mismatches ? WRONG : 0;
}
