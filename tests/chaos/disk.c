/* Records the file operations of a process and its children, or makes one of them fail. Loaded with LD_PRELOAD.

Nothing happens until `disk_begin`. A record is a line "KIND\tOFFSET\tLENGTH\tPATH\tSECOND PATH\n" and LENGTH bytes.
One lock orders the operations of all threads and processes as they reach the kernel. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct shared { pthread_mutex_t lock; long seen; long failing; };

static struct shared *state;
static char root[PATH_MAX], fault_kind[16];
static int log_fd = -1, with_data, fault_error, fault_short, fault_sticky;
static long fault_nth;

int disk_begin(const char *folder, const char *log, int data, const char *kind, long nth, int error, int is_short,
               int is_sticky) {
    pthread_mutexattr_t attributes;
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (state == MAP_FAILED) return -1;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&state->lock, &attributes);
    int opened = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (opened < 0) return -1;
    log_fd = fcntl(opened, F_DUPFD_CLOEXEC, 900); /* out of the way of the program's own */
    close(opened);
    snprintf(root, sizeof root, "%s", folder);
    snprintf(fault_kind, sizeof fault_kind, "%s", kind);
    with_data = data, fault_nth = nth, fault_error = error, fault_short = is_short, fault_sticky = is_sticky;
    return 0;
}

static void lock(void) {
    if (pthread_mutex_lock(&state->lock) == EOWNERDEAD) pthread_mutex_consistent(&state->lock); /* a killed process */
}

static void unlock(void) { pthread_mutex_unlock(&state->lock); }

long disk_seen(void) { return state->seen; }

static int inside(const char *path) {
    size_t length = strlen(root);
    return state && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static void put(const char *kind, long offset, const char *path, const char *second, const void *data, size_t length) {
    char line[2 * PATH_MAX + 100];
    if (!with_data) length = 0;
    int size = snprintf(line, sizeof line, "%s\t%ld\t%zu\t%s\t%s\n", kind, offset, length, path, second);
    struct iovec parts[2] = {{line, size}, {(void *)data, length}};
    int before = errno;
    if (syscall(SYS_writev, log_fd, parts, length ? 2 : 1) != (long)(size + length)) abort();
    errno = before;
}

void disk_mark(const char *text) {
    if (!state) return;
    lock();
    put("mark", 0, text, "", "", 0);
    unlock();
}

/* The absolute path of a name relative to a folder; "" if it is not inside the root. No link is followed. */
static const char *path_at(int folder, const char *name, char *path) {
    char link[64];
    ssize_t length = 0;
    path[0] = 0;
    if (!state || !name) return path;
    if (name[0] != '/') {
        if (folder == AT_FDCWD) {
            if (!getcwd(path, PATH_MAX)) return path[0] = 0, path;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
            if (length < 0) return path[0] = 0, path;
            path[length] = 0;
        }
        length = strlen(path);
        if (name[0]) snprintf(path + length, PATH_MAX - length, "/%s", name);
    } else {
        snprintf(path, PATH_MAX, "%s", name);
    }
    if (!inside(path)) path[0] = 0;
    return path;
}

static const char *path_of(int fd, char *path) {
    struct stat found;
    int before = errno;
    path_at(fd, "", path);
    if (path[0] && (fstat(fd, &found) || !found.st_nlink)) path[0] = 0; /* removed meanwhile */
    errno = before;
    return path;
}

/* Count an operation. 0: do it; -1: it fails with errno; 1: only half of its bytes. */
static int disturbed(const char *kind, const char *path) {
    if (strcmp(kind, fault_kind) || !fault_nth) return 0;
    long n = ++state->seen;
    int is_first = n == fault_nth;
    if (is_first) put("fault", n, path, "", "", 0);
    if (is_first && fault_short) {
        state->failing = fault_error != 0;
        return 1;
    }
    if (is_first || state->failing || (fault_sticky && n > fault_nth)) {
        state->failing = 0;
        errno = fault_error;
        return -1;
    }
    return 0;
}

static int opened(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    path_at(folder, name, path);
    if (!path[0] || !(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) return syscall(SYS_openat, folder, name, flags, mode);
    lock();
    int is_new = faccessat(folder, name, F_OK, AT_SYMLINK_NOFOLLOW) != 0;
    int fd = -1;
    if (!disturbed("open", path)) {
        fd = syscall(SYS_openat, folder, name, flags, mode);
        if (fd >= 0 && is_new) put("create", 0, path, "", "", 0);
        if (fd >= 0 && !is_new && flags & O_TRUNC) put("truncate", 0, path, "", "", 0);
    }
    unlock();
    return fd;
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest); }

int open(const char *name, int flags, ...) { MODE(flags) return opened(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags) return opened(AT_FDCWD, name, flags, mode); }
int openat(int folder, const char *name, int flags, ...) {
    MODE(flags) return opened(folder, name, flags, mode);
}
int openat64(int folder, const char *name, int flags, ...) {
    MODE(flags) return opened(folder, name, flags, mode);
}

static ssize_t written(int fd, const void *data, size_t length, off_t at) {
    char path[PATH_MAX];
    struct stat found;
    if (state && fd == 1) {
        lock();
        int how = disturbed("print", "standard output");
        unlock();
        if (how < 0) return -1;
        if (how) length /= 2;
    }
    if (!state || !path_of(fd, path)[0])
        return at < 0 ? syscall(SYS_write, fd, data, length) : syscall(SYS_pwrite64, fd, data, length, at);
    lock();
    int how = disturbed("write", path);
    ssize_t done = -1;
    if (how >= 0) {
        off_t offset = at;
        if (fcntl(fd, F_GETFL) & O_APPEND) offset = fstat(fd, &found) ? 0 : found.st_size;
        else if (at < 0) offset = lseek(fd, 0, SEEK_CUR);
        if (how) length /= 2;
        done = at < 0 ? syscall(SYS_write, fd, data, length) : syscall(SYS_pwrite64, fd, data, length, at);
        if (done > 0) put("write", offset, path, "", data, done);
    }
    unlock();
    return done;
}

ssize_t write(int fd, const void *data, size_t length) { return written(fd, data, length, -1); }
ssize_t pwrite(int fd, const void *data, size_t length, off_t at) { return written(fd, data, length, at); }
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t at) { return written(fd, data, length, at); }
ssize_t writev(int fd, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    if (!state || !path_of(fd, path)[0] || !count) return syscall(SYS_writev, fd, parts, count);
    return written(fd, parts[0].iov_base, parts[0].iov_len, -1); /* a short write, which callers continue */
}

static ssize_t got(int fd, void *data, size_t length, off_t at) {
    char path[PATH_MAX];
    int how = 0;
    if (state && !strcmp(fault_kind, "read") && path_of(fd, path)[0]) {
        lock();
        how = disturbed("read", path);
        unlock();
    }
    if (how < 0) return -1;
    if (how && length > 1) length /= 2;
    return at < 0 ? syscall(SYS_read, fd, data, length) : syscall(SYS_pread64, fd, data, length, at);
}

ssize_t read(int fd, void *data, size_t length) { return got(fd, data, length, -1); }
ssize_t pread(int fd, void *data, size_t length, off_t at) { return got(fd, data, length, at); }
ssize_t pread64(int fd, void *data, size_t length, off64_t at) { return got(fd, data, length, at); }

static int synced(int fd, int number) {
    char path[PATH_MAX];
    if (!state || !path_of(fd, path)[0]) return syscall(number, fd);
    lock();
    int done = disturbed("fsync", path); /* the kernel's own is left out: this harness loses nothing that was written */
    if (!done) put("fsync", 0, path, "", "", 0);
    unlock();
    return done;
}

int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

static int truncated(int fd, off_t size) {
    char path[PATH_MAX];
    if (!state || !path_of(fd, path)[0]) return syscall(SYS_ftruncate, fd, size);
    lock();
    int done = disturbed("truncate", path);
    if (!done && !(done = syscall(SYS_ftruncate, fd, size))) put("truncate", size, path, "", "", 0);
    unlock();
    return done;
}

int ftruncate(int fd, off_t size) { return truncated(fd, size); }
int ftruncate64(int fd, off64_t size) { return truncated(fd, size); }

static int changed(const char *kind, long number, int folder, const char *name, int other, const char *to, int flags) {
    char path[PATH_MAX], second[PATH_MAX];
    path_at(folder, name, path), path_at(other, to, second);
    int is_inside = path[0] || second[0], done = 0;
    if (is_inside) lock(), done = disturbed(kind, path);
    if (!done && number == SYS_renameat2) done = syscall(number, folder, name, other, to, flags);
    else if (!done) done = syscall(number, folder, name, flags);
    if (!done && is_inside) put(kind, 0, path, second, "", 0);
    if (is_inside) unlock();
    return done;
}

int rename(const char *name, const char *to) {
    return changed("rename", SYS_renameat2, AT_FDCWD, name, AT_FDCWD, to, 0);
}
int renameat(int folder, const char *name, int other, const char *to) {
    return changed("rename", SYS_renameat2, folder, name, other, to, 0);
}
int renameat2(int folder, const char *name, int other, const char *to, unsigned flags) {
    return changed("rename", SYS_renameat2, folder, name, other, to, flags);
}
int unlink(const char *name) { return changed("unlink", SYS_unlinkat, AT_FDCWD, name, AT_FDCWD, NULL, 0); }
int rmdir(const char *name) { return changed("unlink", SYS_unlinkat, AT_FDCWD, name, AT_FDCWD, NULL, AT_REMOVEDIR); }
int unlinkat(int folder, const char *name, int flags) {
    return changed("unlink", SYS_unlinkat, folder, name, AT_FDCWD, NULL, flags);
}
int mkdir(const char *name, mode_t mode) {
    return changed("mkdir", SYS_mkdirat, AT_FDCWD, name, AT_FDCWD, NULL, mode);
}
int mkdirat(int folder, const char *name, mode_t mode) {
    return changed("mkdir", SYS_mkdirat, folder, name, AT_FDCWD, NULL, mode);
}

/* Copies in the kernel: the caller falls back to reads and writes, which are recorded. */
ssize_t sendfile(int out, int in, off_t *offset, size_t count) {
    char path[PATH_MAX];
    if (state && path_of(out, path)[0]) return errno = ENOTSOCK, -1;
    return syscall(SYS_sendfile, out, in, offset, count);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t count, unsigned flags) {
    char path[PATH_MAX];
    if (state && path_of(out, path)[0]) return errno = EXDEV, -1;
    return syscall(SYS_copy_file_range, in, from, out, to, count, flags);
}
