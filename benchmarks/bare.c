/*
 * The bare loop: the least that a vhost-user-blk back-end can do for a request, as the mark to measure others against.
 *
 *   bare --socket PATH --engine pread|mapped|uring|null [--direct] [--poll-us N] IMAGE
 *
 * One thread, one queue, one front-end at a time. IMAGE is a file; for `null`, a number of bytes. It prints `listening`
 * once it listens, and ends on SIGTERM.
 *
 * It believes everything: addresses, lengths and chains of the guest are used as they are, nothing is tracked, logged,
 * limited or counted. It must never serve a guest that matters.
 *
 * The loop looks at the ring without asking for notifications while there is work and --poll-us microseconds after it,
 * then asks for them, looks once more and sleeps. Used entries are published by fours, so that a front-end that looks
 * gets the first answers of a batch early; it is notified at most once per batch.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/vhost_types.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { PUBLISH_EVERY = 4, MOST_REGIONS = 32, MOST_SEGMENTS = 260, RING_MOST = 1024, LOOK_AT_SOCKET_EVERY = 4096 };

#define load_acquire(place) __atomic_load_n(place, __ATOMIC_ACQUIRE)
#define store_release(place, value) __atomic_store_n(place, value, __ATOMIC_RELEASE)
#define full_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)

static void fail(const char *what)
{
    fprintf(stderr, "bare: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* -- options and storage ------------------------------------------------------------------------------------------- */

static enum { PREAD, MAPPED, URING, NOTHING } engine;
static const char *socket_path;
static uint64_t poll_ns = 50000;
static int image = -1;
static uint64_t image_size;
static char *image_bytes;

/* -- guest memory -------------------------------------------------------------------------------------------------- */

static struct region {
    uint64_t gpa, size, uva;
    char *host; /* of its first byte */
    char *mapped;
    size_t mapped_size;
} regions[MOST_REGIONS];
static unsigned num_regions, last_region;

static inline void *of_gpa(uint64_t gpa)
{
    struct region *region = &regions[last_region];
    if (gpa - region->gpa < region->size)
        return region->host + (gpa - region->gpa);
    for (unsigned i = 0; i < num_regions; i++) {
        region = &regions[i];
        if (gpa - region->gpa < region->size) {
            last_region = i;
            return region->host + (gpa - region->gpa);
        }
    }
    errno = EFAULT;
    fail("guest memory");
    return NULL;
}

static void *of_uva(uint64_t uva)
{
    for (unsigned i = 0; i < num_regions; i++)
        if (uva - regions[i].uva < regions[i].size)
            return regions[i].host + (uva - regions[i].uva);
    errno = EFAULT;
    fail("a ring");
    return NULL;
}

/* -- the ring ------------------------------------------------------------------------------------------------------ */

static struct {
    uint16_t size, last_avail, used_idx, published, signalled;
    uint64_t desc_uva, avail_uva, used_uva;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    int kick, call;
    bool enabled, running, quiet;
} ring = {.kick = -1, .call = -1};

static uint64_t features;
static bool event_idx;

static inline uint16_t *used_event(void) { return &ring.avail->ring[ring.size]; }
static inline uint16_t *avail_event(void) { return (uint16_t *)&ring.used->ring[ring.size]; }

/* With EVENT_IDX being quiet costs nothing: the index stays behind, and the driver passes it once in 65536 requests. */
static void ask_for_notifications(bool wanted)
{
    ring.quiet = !wanted;
    if (event_idx) {
        if (wanted)
            store_release(avail_event(), ring.last_avail);
    } else {
        store_release(&ring.used->flags, wanted ? 0 : VRING_USED_F_NO_NOTIFY);
    }
    if (wanted)
        full_fence();
}

static inline void publish(void)
{
    if (ring.published != ring.used_idx) {
        store_release(&ring.used->idx, ring.used_idx);
        ring.published = ring.used_idx;
    }
}

static inline void complete(uint16_t head, uint32_t length)
{
    struct vring_used_elem *element = &ring.used->ring[ring.used_idx & (ring.size - 1)];
    element->id = head;
    element->len = length;
    ring.used_idx++;
    if ((uint16_t)(ring.used_idx - ring.published) >= PUBLISH_EVERY)
        publish();
}

static void notify(void)
{
    publish();
    uint16_t before = ring.signalled;
    if (before == ring.used_idx)
        return;
    full_fence();
    ring.signalled = ring.used_idx;
    bool wanted = event_idx ? vring_need_event(load_acquire(used_event()), ring.used_idx, before)
                            : !(load_acquire(&ring.avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
    if (wanted && ring.call >= 0) {
        uint64_t one = 1;
        if (write(ring.call, &one, sizeof one) != sizeof one && errno != EAGAIN)
            fail("notify");
    }
}

/* -- io_uring, by its system calls --------------------------------------------------------------------------------- */

static struct slot {
    uint8_t *status;
    uint32_t length;
    uint32_t expected;
    struct iovec segments[MOST_SEGMENTS];
} *slots; /* by head */

static struct {
    int fd;
    unsigned *sq_head, *sq_tail, *sq_flags, *cq_head, *cq_tail, sq_mask, cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    unsigned tail, queued, in_flight;
    bool fixed; /* guest memory is registered, region by region */
} uring = {.fd = -1};

static void uring_open(void)
{
    struct io_uring_params params = {.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN |
                                              IORING_SETUP_TASKRUN_FLAG};
    uring.fd = (int)syscall(SYS_io_uring_setup, RING_MOST, &params);
    if (uring.fd < 0)
        fail("io_uring_setup");
    size_t sq_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t cq_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    char *rings = mmap(NULL, sq_size > cq_size ? sq_size : cq_size, protection, flags, uring.fd, IORING_OFF_SQ_RING);
    uring.sqes = mmap(NULL, params.sq_entries * sizeof(struct io_uring_sqe), protection, flags, uring.fd,
                      IORING_OFF_SQES);
    if (rings == MAP_FAILED || uring.sqes == MAP_FAILED || !(params.features & IORING_FEAT_SINGLE_MMAP))
        fail("io_uring");
    uring.sq_head = (unsigned *)(rings + params.sq_off.head);
    uring.sq_tail = (unsigned *)(rings + params.sq_off.tail);
    uring.sq_flags = (unsigned *)(rings + params.sq_off.flags);
    uring.sq_mask = params.sq_entries - 1;
    uring.cq_head = (unsigned *)(rings + params.cq_off.head);
    uring.cq_tail = (unsigned *)(rings + params.cq_off.tail);
    uring.cq_mask = params.cq_entries - 1;
    uring.cqes = (struct io_uring_cqe *)(rings + params.cq_off.cqes);
    unsigned *array = (unsigned *)(rings + params.sq_off.array);
    for (unsigned i = 0; i < params.sq_entries; i++)
        array[i] = i;
    if (syscall(SYS_io_uring_register, uring.fd, IORING_REGISTER_FILES, &image, 1) < 0)
        fail("io_uring_register");
    slots = calloc(RING_MOST, sizeof *slots);
}

/* Saves the kernel from looking its pages up for every request; where it is refused, all goes on without. */
static void uring_register_memory(void)
{
    struct iovec buffers[MOST_REGIONS];
    if (uring.fixed)
        syscall(SYS_io_uring_register, uring.fd, IORING_UNREGISTER_BUFFERS, NULL, 0);
    for (unsigned i = 0; i < num_regions; i++)
        buffers[i] = (struct iovec){regions[i].host, regions[i].size};
    uring.fixed =
        num_regions && syscall(SYS_io_uring_register, uring.fd, IORING_REGISTER_BUFFERS, buffers, num_regions) == 0;
}

static void uring_enter(unsigned submit, unsigned flags)
{
    long taken;
    do
        taken = syscall(SYS_io_uring_enter, uring.fd, submit, 0, flags, NULL, 0);
    while (taken < 0 && errno == EINTR);
    if (taken != (long)submit)
        fail("io_uring_enter");
}

static void uring_submit(void)
{
    if (!uring.queued)
        return;
    store_release(uring.sq_tail, uring.tail);
    uring_enter(uring.queued, 0);
    uring.in_flight += uring.queued;
    uring.queued = 0;
}

static uint16_t region_of(const char *place)
{
    unsigned i = last_region;
    if ((uint64_t)(place - regions[i].host) >= regions[i].size)
        for (i = 0; i + 1 < num_regions && (uint64_t)(place - regions[i].host) >= regions[i].size;)
            i++;
    return (uint16_t)i;
}

static void uring_queue(uint16_t head, uint32_t type, uint64_t offset, const struct iovec *data, int count)
{
    struct io_uring_sqe *sqe = &uring.sqes[uring.tail & uring.sq_mask];
    memset(sqe, 0, sizeof *sqe);
    sqe->flags = IOSQE_FIXED_FILE;
    sqe->user_data = head;
    sqe->off = offset;
    if (type == VIRTIO_BLK_T_FLUSH) {
        sqe->opcode = IORING_OP_FSYNC;
        sqe->fsync_flags = IORING_FSYNC_DATASYNC;
        sqe->off = 0;
    } else if (count == 1) {
        bool in = type == VIRTIO_BLK_T_IN;
        sqe->opcode = uring.fixed ? (in ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED)
                                  : (in ? IORING_OP_READ : IORING_OP_WRITE);
        sqe->addr = (uintptr_t)data->iov_base;
        sqe->len = (uint32_t)data->iov_len;
        sqe->buf_index = uring.fixed ? region_of(data->iov_base) : 0;
    } else {
        sqe->opcode = type == VIRTIO_BLK_T_IN ? IORING_OP_READV : IORING_OP_WRITEV;
        sqe->addr = (uintptr_t)data;
        sqe->len = (uint32_t)count;
    }
    uring.tail++;
    uring.queued++;
}

static bool uring_reap(void)
{
    if (__atomic_load_n(uring.sq_flags, __ATOMIC_RELAXED) & IORING_SQ_TASKRUN)
        uring_enter(0, IORING_ENTER_GETEVENTS);
    unsigned head = *uring.cq_head, tail = load_acquire(uring.cq_tail);
    if (head == tail)
        return false;
    for (; head != tail; head++) {
        struct io_uring_cqe *cqe = &uring.cqes[head & uring.cq_mask];
        struct slot *slot = &slots[cqe->user_data];
        *slot->status = cqe->res == (int)slot->expected ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
        complete((uint16_t)cqe->user_data, slot->length);
        uring.in_flight--;
    }
    store_release(uring.cq_head, head);
    return true;
}

/* -- requests ------------------------------------------------------------------------------------------------------ */

static bool move_mapped(bool in, uint64_t offset, const struct iovec *data, int count)
{
    for (int i = 0; i < count; i++) {
        char *place = image_bytes + offset;
        if (in)
            memcpy(data[i].iov_base, place, data[i].iov_len);
        else
            memcpy(place, data[i].iov_base, data[i].iov_len);
        offset += data[i].iov_len;
    }
    return true;
}

static bool move(bool in, uint64_t offset, const struct iovec *data, int count, uint32_t bytes)
{
    if (engine == NOTHING)
        return true;
    if (engine == MAPPED)
        return move_mapped(in, offset, data, count);
    ssize_t moved;
    if (count == 1)
        moved = in ? pread(image, data->iov_base, data->iov_len, (off_t)offset)
                   : pwrite(image, data->iov_base, data->iov_len, (off_t)offset);
    else
        moved = in ? preadv(image, data, count, (off_t)offset) : pwritev(image, data, count, (off_t)offset);
    return moved == (ssize_t)bytes;
}

static void serve(uint16_t head)
{
    static struct iovec own[MOST_SEGMENTS];
    struct iovec *data = engine == URING ? slots[head].segments : own;
    struct vring_desc *table = ring.desc, *desc = &table[head];
    if (desc->flags & VRING_DESC_F_INDIRECT) {
        table = of_gpa(desc->addr);
        desc = table;
    }
    const struct virtio_blk_outhdr *header = of_gpa(desc->addr);
    uint32_t skip = sizeof *header, bytes = 0, in_bytes = 0;
    int count = 0;
    for (;;) { /* the header is the first 16 bytes of the first piece, the status the last byte of the last */
        if (desc->len > skip) {
            data[count].iov_base = (char *)of_gpa(desc->addr) + skip;
            data[count].iov_len = desc->len - skip;
            bytes += desc->len - skip;
            in_bytes += desc->flags & VRING_DESC_F_WRITE ? desc->len - skip : 0;
            count++;
        }
        skip = 0;
        if (!(desc->flags & VRING_DESC_F_NEXT) || count == MOST_SEGMENTS)
            break;
        desc = &table[desc->next];
    }
    struct iovec *last = &data[count - 1];
    uint8_t *status = (uint8_t *)last->iov_base + last->iov_len - 1;
    bytes--;
    if (--last->iov_len == 0)
        count--;
    uint32_t type = header->type;
    uint64_t offset = header->sector << 9;
    bool done = true;
    switch (type) {
    case VIRTIO_BLK_T_IN:
    case VIRTIO_BLK_T_OUT:
        if (offset + bytes > image_size) { /* a front-end that probes behind the end gets its error, as anywhere */
            done = false;
            break;
        }
        if (engine == URING) {
            slots[head].status = status;
            slots[head].length = in_bytes ? in_bytes : 1;
            slots[head].expected = bytes;
            uring_queue(head, type, offset, data, count);
            return;
        }
        done = move(type == VIRTIO_BLK_T_IN, offset, data, count, bytes);
        break;
    case VIRTIO_BLK_T_FLUSH:
        if (engine == URING) {
            slots[head].status = status;
            slots[head].length = 1;
            slots[head].expected = 0;
            uring_queue(head, type, 0, NULL, 0);
            return;
        }
        done = engine == NOTHING || fdatasync(image) == 0;
        break;
    case VIRTIO_BLK_T_GET_ID:
        strncpy(data[0].iov_base, "bare", data[0].iov_len);
        break;
    default:
        *status = VIRTIO_BLK_S_UNSUPP;
        complete(head, in_bytes);
        return;
    }
    *status = done ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
    complete(head, in_bytes);
}

/* Takes what is there now and answers what can be answered; whether there was anything. */
static bool work(void)
{
    bool some = false;
    uint16_t avail = load_acquire(&ring.avail->idx);
    if (avail != ring.last_avail) {
        some = true;
        if (!ring.quiet)
            ask_for_notifications(false);
        while (ring.last_avail != avail) {
            uint16_t head = ring.avail->ring[ring.last_avail & (ring.size - 1)];
            ring.last_avail++;
            serve(head);
        }
    }
    if (engine == URING) {
        uring_submit();
        if (uring.in_flight && uring_reap())
            some = true;
    }
    notify();
    return some;
}

/* -- the protocol -------------------------------------------------------------------------------------------------- */

/* The numbers of the vhost-user specification; no kernel header has them. */
enum request {
    GET_FEATURES = 1, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE,
    SET_VRING_NUM = 8, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR,
    GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE,
    GET_CONFIG = 24, SET_CONFIG,
    GET_MAX_MEM_SLOTS = 36, ADD_MEM_REG, REM_MEM_REG,
};
enum { F_PROTOCOL_FEATURES = 30, P_MQ = 0, P_REPLY_ACK = 3, P_CONFIG = 9, P_MEM_SLOTS = 15, REPLY = 4, NEED_REPLY = 8, NO_FD = 256 };

struct header { uint32_t request, flags, size; };
struct wire_region { uint64_t gpa, size, uva, offset; };

static union {
    uint64_t u64;
    struct { uint32_t index, num; } state;
    struct { uint32_t index, flags; uint64_t desc, used, avail, log; } addr;
    struct { uint32_t num, padding; struct wire_region regions[MOST_REGIONS]; } memory;
    struct { uint64_t padding; struct wire_region region; } region;
    struct { uint32_t offset, size, flags; uint8_t data[256]; } config;
    uint8_t bytes[4096];
} payload;

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void start_ring(void)
{
    bool enabled = ring.enabled || !(features & 1ull << F_PROTOCOL_FEATURES);
    ring.running = ring.kick >= 0 && enabled && ring.size && num_regions && ring.desc_uva;
    if (!ring.running)
        return;
    event_idx = features & 1ull << VIRTIO_RING_F_EVENT_IDX;
    ring.desc = of_uva(ring.desc_uva);
    ring.avail = of_uva(ring.avail_uva);
    ring.used = of_uva(ring.used_uva);
    ring.used_idx = ring.published = ring.signalled = ring.used->idx;
    ring.quiet = false;
}

static void stop_ring(void)
{
    while (ring.running && uring.in_flight)
        uring_reap();
    if (ring.running)
        notify();
    ring.running = false;
}

static void forget_memory(void)
{
    for (unsigned i = 0; i < num_regions; i++)
        munmap(regions[i].mapped, regions[i].mapped_size);
    num_regions = last_region = 0;
}

static void add_region(const struct wire_region *told, int fd)
{
    struct region *region = &regions[num_regions];
    if (num_regions == MOST_REGIONS)
        return;
    region->gpa = told->gpa;
    region->size = told->size;
    region->uva = told->uva;
    region->mapped_size = told->size + told->offset;
    region->mapped = mmap(NULL, region->mapped_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (region->mapped == MAP_FAILED)
        fail("mmap of guest memory");
    region->host = region->mapped + told->offset;
    num_regions++;
}

static void remove_region(const struct wire_region *told)
{
    for (unsigned i = 0; i < num_regions; i++)
        if (regions[i].gpa == told->gpa && regions[i].uva == told->uva) {
            munmap(regions[i].mapped, regions[i].mapped_size);
            regions[i] = regions[--num_regions];
            last_region = 0;
            return;
        }
}

static void change_memory(uint32_t request, int *fds)
{
    bool was = ring.running;
    stop_ring();
    if (request == SET_MEM_TABLE) {
        forget_memory();
        for (unsigned i = 0; i < payload.memory.num && i < MOST_REGIONS; i++)
            add_region(&payload.memory.regions[i], fds[i]);
    } else if (request == ADD_MEM_REG) {
        add_region(&payload.region.region, fds[0]);
    } else {
        remove_region(&payload.region.region);
    }
    if (engine == URING)
        uring_register_memory();
    if (was)
        start_ring();
}

static void fill_config(void)
{
    struct virtio_blk_config config = {.capacity = image_size >> 9, .seg_max = 126, .blk_size = 512, .num_queues = 1};
    uint32_t offset = payload.config.offset, size = payload.config.size;
    memset(payload.config.data, 0, sizeof payload.config.data);
    if (offset < sizeof config && size <= sizeof payload.config.data)
        memcpy(payload.config.data, (char *)&config + offset,
               size < sizeof config - offset ? size : sizeof config - offset);
}

/* Does what one message says; returns the size of its answer in `payload`, or -1 for none. */
static int carry_out(uint32_t request, int *fds)
{
    bool has_fd = !(payload.u64 & NO_FD);
    switch (request) {
    case GET_FEATURES:
        payload.u64 = 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_RING_F_EVENT_IDX |
                      1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << F_PROTOCOL_FEATURES | 1ull << VIRTIO_BLK_F_SEG_MAX |
                      1ull << VIRTIO_BLK_F_BLK_SIZE | 1ull << VIRTIO_BLK_F_FLUSH;
        return 8;
    case SET_FEATURES:
        features = payload.u64;
        break;
    case GET_PROTOCOL_FEATURES:
        payload.u64 = 1ull << P_MQ | 1ull << P_REPLY_ACK | 1ull << P_CONFIG | 1ull << P_MEM_SLOTS;
        return 8;
    case GET_QUEUE_NUM:
        payload.u64 = 1;
        return 8;
    case GET_CONFIG:
        fill_config();
        return 12 + (int)payload.config.size;
    case SET_MEM_TABLE:
    case ADD_MEM_REG:
    case REM_MEM_REG:
        change_memory(request, fds);
        break;
    case GET_MAX_MEM_SLOTS:
        payload.u64 = MOST_REGIONS;
        return 8;
    case SET_VRING_NUM:
        ring.size = (uint16_t)payload.state.num;
        if (ring.size > RING_MOST)
            ring.size = 0;
        break;
    case SET_VRING_ADDR:
        ring.desc_uva = payload.addr.desc;
        ring.avail_uva = payload.addr.avail;
        ring.used_uva = payload.addr.used;
        break;
    case SET_VRING_BASE:
        ring.last_avail = (uint16_t)payload.state.num;
        break;
    case GET_VRING_BASE:
        stop_ring();
        close_fd(&ring.kick);
        close_fd(&ring.call);
        payload.state.num = ring.last_avail;
        return 8;
    case SET_VRING_KICK:
        close_fd(&ring.kick);
        ring.kick = has_fd ? dup(fds[0]) : -1;
        start_ring();
        break;
    case SET_VRING_CALL:
        close_fd(&ring.call);
        ring.call = has_fd ? dup(fds[0]) : -1;
        break;
    case SET_VRING_ENABLE:
        ring.enabled = payload.state.num;
        if (!ring.enabled)
            stop_ring();
        else if (!ring.running)
            start_ring();
        break;
    default:
        break;
    }
    return -1;
}

/* One message; false when the front-end has hung up. */
static bool converse(int conn)
{
    struct header header;
    char control[CMSG_SPACE(sizeof(int) * MOST_REGIONS)];
    struct iovec piece = {&header, sizeof header};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    int fds[MOST_REGIONS], num_fds = 0;
    if (recvmsg(conn, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL) != sizeof header)
        return false;
    struct cmsghdr *attached = CMSG_FIRSTHDR(&message);
    if (attached && attached->cmsg_type == SCM_RIGHTS) {
        num_fds = (int)((attached->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(attached), (size_t)num_fds * sizeof(int));
    }
    memset(&payload, 0, 64);
    if (header.size > sizeof payload ||
        (header.size && recv(conn, &payload, header.size, MSG_WAITALL) != (ssize_t)header.size))
        return false;
    int size = carry_out(header.request, fds);
    for (int i = 0; i < num_fds; i++)
        close(fds[i]);
    if (size < 0 && header.flags & NEED_REPLY) {
        payload.u64 = 0;
        size = 8;
    }
    if (size < 0)
        return true;
    struct header answer = {header.request, 1 | REPLY, (uint32_t)size};
    struct iovec pieces[] = {{&answer, sizeof answer}, {&payload, (size_t)size}};
    return writev(conn, pieces, 2) == (ssize_t)sizeof answer + size;
}

/* -- the loop ------------------------------------------------------------------------------------------------------ */

static void serve_front_end(int conn)
{
    uint64_t quiet_since = now_ns();
    unsigned turn = 0;
    for (;;) {
        int wait = -1;
        if (ring.running) {
            if (work())
                quiet_since = 0;
            else if (!quiet_since)
                quiet_since = now_ns();
            bool look = uring.in_flight || !quiet_since || (turn % 8 ? ring.quiet : now_ns() - quiet_since < poll_ns);
            if (look) {
                relax();
                if (++turn % LOOK_AT_SOCKET_EVERY)
                    continue;
                wait = 0;
            } else if (ring.quiet) {
                turn++;
                ask_for_notifications(true);
                continue; /* look once more */
            }
        }
        struct pollfd places[] = {{conn, POLLIN, 0}, {ring.running ? ring.kick : -1, POLLIN, 0}};
        if (poll(places, 2, wait) < 0 && errno != EINTR)
            fail("poll");
        if (places[1].revents && wait) {
            uint64_t count;
            if (read(ring.kick, &count, sizeof count) < 0 && errno != EAGAIN)
                fail("kick");
        }
        if (places[0].revents && !converse(conn))
            return;
    }
}

static void end(int signal)
{
    (void)signal;
    unlink(socket_path);
    _exit(0);
}

static void open_image(const char *name, bool direct)
{
    struct stat facts;
    if (engine == NOTHING) {
        image_size = strtoull(name, NULL, 0);
        return;
    }
    image = open(name, O_RDWR | O_CLOEXEC | (direct ? O_DIRECT : 0));
    if (image < 0 || fstat(image, &facts) < 0)
        fail(name);
    image_size = (uint64_t)facts.st_size;
    if (engine == MAPPED) {
        image_bytes = mmap(NULL, image_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, image, 0);
        if (image_bytes == MAP_FAILED)
            fail(name);
    }
    if (engine == URING)
        uring_open();
}

static void usage(void)
{
    fputs("usage: bare --socket PATH --engine pread|mapped|uring|null [--direct] [--poll-us N] IMAGE\n", stderr);
    exit(2);
}

int main(int argc, char **argv)
{
    static const char *const engines[] = {"pread", "mapped", "uring", "null"};
    const char *name = NULL, *place = NULL;
    bool direct = false;
    for (int i = 1; i < argc; i++) {
        bool more = i + 1 < argc;
        if (!strcmp(argv[i], "--socket") && more) {
            socket_path = argv[++i];
        } else if (!strcmp(argv[i], "--engine") && more) {
            name = argv[++i];
        } else if (!strcmp(argv[i], "--poll-us") && more) {
            poll_ns = strtoull(argv[++i], NULL, 0) * 1000;
        } else if (!strcmp(argv[i], "--direct")) {
            direct = true;
        } else if (argv[i][0] == '-' || place) {
            usage();
        } else {
            place = argv[i];
        }
    }
    unsigned which = 0;
    while (which < 4 && (!name || strcmp(name, engines[which])))
        which++;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (which == 4 || !place || !socket_path || strlen(socket_path) >= sizeof address.sun_path)
        usage();
    engine = which;
    open_image(place, direct);
    strcpy(address.sun_path, socket_path);
    unlink(socket_path);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1))
        fail(socket_path);
    signal(SIGTERM, end);
    signal(SIGPIPE, SIG_IGN);
    puts("listening");
    fflush(stdout);
    for (;;) {
        int conn = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (conn < 0)
            fail("accept");
        serve_front_end(conn);
        close(conn);
        stop_ring();
        forget_memory();
        close_fd(&ring.kick);
        close_fd(&ring.call);
        memset(&ring, 0, sizeof ring);
        ring.kick = ring.call = -1;
        features = 0;
    }
}
