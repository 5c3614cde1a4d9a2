/* A library that is preloaded into the tool and makes its file operations fail: FAULTS="<operations>:<what>:<when>,…".
 *
 * operations  letters: R reads, W writes, S operations that make writes last (fsync, rename, unlink, truncate), L hard links,
 *             D fsync of directories, K locks, M mappings of files
 * what        count   nothing fails; at the end the number of operations is printed
 *             kill    the process dies, as by kill -9, before the operation
 *             eof     this read and all later ones find the end of the file
 *             short   the operation moves a third of the bytes, at least one
 *             else    the name of an error in the table below: the operation returns it
 * when        the number of the operation, from 1; 0 means every operation
 *
 * Reads and writes count only on plain files and folders outside of /proc and /sys. The first rule that fits an operation
 * applies. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

struct rule {
    char operations[8], what[16];
    int when;
    atomic_int seen;
};

static struct rule rules[4];
static int num_rules;

static const struct { const char *name; int value; } ERRORS[] = {
    {"enospc", ENOSPC}, {"eio", EIO}, {"erofs", EROFS}, {"exdev", EXDEV}, {"eintr", EINTR},
    {"enosys", ENOSYS}, {"enolck", ENOLCK}, {"ebadf", EBADF}, {"einval", EINVAL}, {"eperm", EPERM},
    {"eopnotsupp", EOPNOTSUPP}, {"enodev", ENODEV}, {"eacces", EACCES}, {"emlink", EMLINK}, {"enotty", ENOTTY},
};

__attribute__((constructor)) static void parse(void) {
    const char *text = getenv("FAULTS");
    while (text && *text && num_rules < 4) {
        struct rule *rule = &rules[num_rules];
        if (sscanf(text, "%7[RWSLDKM]:%15[a-z]:%d", rule->operations, rule->what, &rule->when) != 3) abort();
        num_rules++;
        text = strchr(text, ',');
        if (text) text++;
    }
}

__attribute__((destructor)) static void report(void) {
    for (int i = 0; i < num_rules; i++)
        if (!strcmp(rules[i].what, "count")) fprintf(stderr, "operations: %d\n", atomic_load(&rules[i].seen));
}

static int is_plain(int fd) {
    struct stat stat;
    struct statfs fs;
    if (fstat(fd, &stat) || !(S_ISREG(stat.st_mode) || S_ISDIR(stat.st_mode)) || fstatfs(fd, &fs)) return 0;
    return fs.f_type != 0x9fa0 /* proc */ && fs.f_type != 0x62656572 /* sysfs */ && fs.f_type != 0x63677270 /* cgroup2 */;
}

/* What happens to an operation: nothing (0), an error (above 0), or one of these. */
enum { END = -1, SHORT = -2 };

static int fault(char operation) {
    for (int i = 0; i < num_rules; i++) {
        struct rule *rule = &rules[i];
        if (!strchr(rule->operations, operation)) continue;
        int n = atomic_fetch_add(&rule->seen, 1) + 1;
        int is_end = !strcmp(rule->what, "eof");
        if (rule->when && (is_end ? n < rule->when : n != rule->when)) continue;
        if (is_end) return END;
        if (!strcmp(rule->what, "short")) return SHORT;
        if (!strcmp(rule->what, "kill")) kill(getpid(), SIGKILL);
        for (size_t e = 0; e < sizeof ERRORS / sizeof *ERRORS; e++)
            if (!strcmp(rule->what, ERRORS[e].name)) return ERRORS[e].value;
    }
    return 0;
}

#define REAL(type, name, ...)                                            \
    static type (*real)(__VA_ARGS__);                                    \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define MOVE(operation, fd, size)                                        \
    int f = is_plain(fd) ? fault(operation) : 0;                         \
    if (f > 0) return errno = f, -1;                                     \
    if (f == END) return 0;                                              \
    if (f == SHORT && size > 1) size = (size + 2) / 3

ssize_t read(int fd, void *buffer, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    MOVE('R', fd, size);
    return real(fd, buffer, size);
}

ssize_t pread64(int fd, void *buffer, size_t size, off64_t at) {
    REAL(ssize_t, "pread64", int, void *, size_t, off64_t);
    MOVE('R', fd, size);
    return real(fd, buffer, size, at);
}

ssize_t write(int fd, const void *buffer, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    MOVE('W', fd, size);
    return real(fd, buffer, size);
}

ssize_t pwrite64(int fd, const void *buffer, size_t size, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    MOVE('W', fd, size);
    return real(fd, buffer, size, at);
}

#define FAIL(operation)                                                  \
    int f = fault(operation);                                            \
    if (f > 0) return errno = f, -1

int fsync(int fd) {
    REAL(int, "fsync", int);
    struct stat stat;
    if (!fstat(fd, &stat) && S_ISDIR(stat.st_mode)) {
        FAIL('D');
    }
    FAIL('S');
    return real(fd);
}

int flock(int fd, int operation) {
    REAL(int, "flock", int, int);
    FAIL('K');
    return real(fd, operation);
}

void *mmap64(void *at, size_t size, int access, int flags, int fd, off64_t from) {
    REAL(void *, "mmap64", void *, size_t, int, int, int, off64_t);
    int f = fd >= 0 && is_plain(fd) ? fault('M') : 0;
    if (f > 0) return errno = f, MAP_FAILED;
    return real(at, size, access, flags, fd, from);
}

void *mmap(void *at, size_t size, int access, int flags, int fd, off_t from) {
    return mmap64(at, size, access, flags, fd, from);
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    FAIL('S');
    return real(fd);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    FAIL('S');
    return real(from, to);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    FAIL('S');
    return real(path);
}

int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    FAIL('S');
    return real(fd, size);
}

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    REAL(int, "linkat", int, const char *, int, const char *, int);
    FAIL('L');
    return real(from_dir, from, to_dir, to, flags);
}
