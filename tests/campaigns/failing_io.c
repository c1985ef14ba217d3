/* Makes calls to the kernel fail, for a process that has this library in LD_PRELOAD.

   The file that FAILING_IO names is mapped, and says which calls: `struct control`. Whoever writes
   it (failing_io.py) sets `call` last. What fails is not done, but for `close`: that has always
   closed its descriptor, whatever it says (close(2)). */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* In the order of CALLS in failing_io.py; 0 is none. */
enum { OPEN = 1, LIST, READ, WRITE, SYNC, TRUNCATE, STAT, LOCK, MAP, RENAME, UNLINK, WATCH, POLL,
       ACCEPT, CLOSE };

static struct control {
    int call, number;      /* which call fails, and with which errno */
    unsigned first, every; /* the first one that fails, from 0 on, and each so many after it */
    unsigned seen, failed; /* how many there were, and how many have failed */
    char paths[232];       /* a pattern of fnmatch(3): on which paths */
} *control;

__attribute__((constructor)) static void attach(void)
{
    const char *path = getenv("FAILING_IO");
    int descriptor = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
    if (descriptor < 0)
        return;
    void *mapped = (void *)syscall(SYS_mmap, NULL, sizeof *control, PROT_READ | PROT_WRITE,
                                   MAP_SHARED, descriptor, 0);
    if (mapped != MAP_FAILED)
        control = mapped;
    syscall(SYS_close, descriptor);
}

static int asked(int call)
{
    return control && __atomic_load_n(&control->call, __ATOMIC_ACQUIRE) == call;
}

static int fails(const char *path)
{
    if (fnmatch(control->paths, path, 0))
        return 0;
    unsigned seen = __atomic_fetch_add(&control->seen, 1, __ATOMIC_RELAXED);
    if (seen < control->first || (seen - control->first) % control->every)
        return 0;
    __atomic_fetch_add(&control->failed, 1, __ATOMIC_RELAXED);
    errno = control->number;
    return 1;
}

/* What a descriptor leads to: a path, or a name such as anon_inode:inotify. */
static void name_of(int descriptor, char *name, size_t size)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, name, size - 1);
    name[length < 0 ? 0 : length] = 0;
}

static int fails_at(int call, int directory, const char *path)
{
    char name[2 * PATH_MAX];
    int kept = errno;
    if (!asked(call))
        return 0;
    if (path && *path == '/')
        return fails(path);
    if (directory == AT_FDCWD && !getcwd(name, PATH_MAX))
        return 0;
    if (directory != AT_FDCWD)
        name_of(directory, name, PATH_MAX);
    if (path && *path) {
        strncat(name, "/", 2);
        strncat(name, path, PATH_MAX - 2);
    }
    errno = kept;
    return fails(name);
}

static int fails_on(int call, int descriptor)
{
    return fails_at(call, descriptor, NULL);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* A function whose first arguments say whether it fails; `FAILS` may use all of them. */
#define WRAP(TYPE, NAME, FAILED, FAILS, PARAMETERS, ARGUMENTS) \
    TYPE NAME PARAMETERS \
    { \
        REAL(NAME); \
        return (FAILS) ? (FAILED) : real ARGUMENTS; \
    }

#define WRAP_BOTH(TYPE, NAME, FAILED, FAILS, PARAMETERS, ARGUMENTS) \
    WRAP(TYPE, NAME, FAILED, FAILS, PARAMETERS, ARGUMENTS) \
    WRAP(TYPE, NAME##64, FAILED, FAILS, PARAMETERS, ARGUMENTS)

#define WRAP_OPEN(NAME) \
    int NAME(const char *path, int flags, ...) \
    { \
        va_list rest; \
        REAL(NAME); \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return fails_at(OPEN, AT_FDCWD, path) ? -1 : real(path, flags, mode); \
    }
WRAP_OPEN(open)
WRAP_OPEN(open64)

#define WRAP_OPENAT(NAME) \
    int NAME(int directory, const char *path, int flags, ...) \
    { \
        va_list rest; \
        REAL(NAME); \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return fails_at(OPEN, directory, path) ? -1 : real(directory, path, flags, mode); \
    }
WRAP_OPENAT(openat)
WRAP_OPENAT(openat64)

#define WRAP_LOCK(NAME) \
    int NAME(int descriptor, int command, ...) \
    { \
        va_list rest; \
        REAL(NAME); \
        va_start(rest, command); \
        void *argument = va_arg(rest, void *); \
        va_end(rest); \
        int locks = command == F_SETLK || command == F_SETLKW || command == F_GETLK \
            || command == F_OFD_SETLK || command == F_OFD_SETLKW || command == F_OFD_GETLK; \
        /* The kernel does not fail to unlock; and who cannot is in everybody's way. */ \
        locks = locks && ((struct flock *)argument)->l_type != F_UNLCK; \
        return locks && fails_on(LOCK, descriptor) ? -1 : real(descriptor, command, argument); \
    }
WRAP_LOCK(fcntl)
WRAP_LOCK(fcntl64)

WRAP(DIR *, opendir, NULL, fails_at(LIST, AT_FDCWD, path), (const char *path), (path))
WRAP(DIR *, fdopendir, NULL, fails_on(LIST, descriptor), (int descriptor), (descriptor))
WRAP(struct dirent *, readdir, NULL, fails_on(LIST, dirfd(listing)), (DIR *listing), (listing))
WRAP(struct dirent64 *, readdir64, NULL, fails_on(LIST, dirfd(listing)), (DIR *listing), (listing))

WRAP(ssize_t, read, -1, fails_on(READ, fd), (int fd, void *to, size_t size), (fd, to, size))
WRAP_BOTH(ssize_t, pread, -1, fails_on(READ, fd),
          (int fd, void *to, size_t size, off_t at), (fd, to, size, at))
WRAP(ssize_t, write, -1, fails_on(WRITE, fd), (int fd, const void *from, size_t size),
     (fd, from, size))
WRAP_BOTH(ssize_t, pwrite, -1, fails_on(WRITE, fd),
          (int fd, const void *from, size_t size, off_t at), (fd, from, size, at))
WRAP(int, fsync, -1, fails_on(SYNC, fd), (int fd), (fd))
WRAP(int, fdatasync, -1, fails_on(SYNC, fd), (int fd), (fd))
WRAP_BOTH(int, ftruncate, -1, fails_on(TRUNCATE, fd), (int fd, off_t size), (fd, size))

WRAP(int, stat, -1, fails_at(STAT, AT_FDCWD, path), (const char *path, struct stat *to), (path, to))
WRAP(int, lstat, -1, fails_at(STAT, AT_FDCWD, path), (const char *path, struct stat *to),
     (path, to))
WRAP(int, fstat, -1, fails_on(STAT, fd), (int fd, struct stat *to), (fd, to))
WRAP(int, fstatat, -1, fails_at(STAT, fd, path),
     (int fd, const char *path, struct stat *to, int flags), (fd, path, to, flags))
WRAP(int, stat64, -1, fails_at(STAT, AT_FDCWD, path), (const char *path, struct stat64 *to),
     (path, to))
WRAP(int, lstat64, -1, fails_at(STAT, AT_FDCWD, path), (const char *path, struct stat64 *to),
     (path, to))
WRAP(int, fstat64, -1, fails_on(STAT, fd), (int fd, struct stat64 *to), (fd, to))
WRAP(int, fstatat64, -1, fails_at(STAT, fd, path),
     (int fd, const char *path, struct stat64 *to, int flags), (fd, path, to, flags))
WRAP(int, access, -1, fails_at(STAT, AT_FDCWD, path), (const char *path, int mode), (path, mode))

WRAP_BOTH(void *, mmap, MAP_FAILED, !(flags & MAP_ANONYMOUS) && fails_on(MAP, fd),
          (void *at, size_t size, int protection, int flags, int fd, off_t offset),
          (at, size, protection, flags, fd, offset))

WRAP(int, rename, -1, fails_at(RENAME, AT_FDCWD, new), (const char *old, const char *new),
     (old, new))
WRAP(int, renameat, -1, fails_at(RENAME, directory, new),
     (int from, const char *old, int directory, const char *new), (from, old, directory, new))
WRAP(int, unlink, -1, fails_at(UNLINK, AT_FDCWD, path), (const char *path), (path))
WRAP(int, unlinkat, -1, fails_at(UNLINK, fd, path), (int fd, const char *path, int flags),
     (fd, path, flags))

/* They have no path of their own: `init` stands for the new instance. */
int inotify_init(void);
int inotify_add_watch(int instance, const char *path, uint32_t mask);
WRAP(int, inotify_init, -1, asked(WATCH) && fails("init"), (void), ())
WRAP(int, inotify_add_watch, -1, fails_at(WATCH, AT_FDCWD, path),
     (int instance, const char *path, uint32_t mask), (instance, path, mask))

WRAP(int, poll, -1, asked(POLL) && fails("poll"), (struct pollfd *all, nfds_t count, int timeout),
     (all, count, timeout))
WRAP(int, epoll_wait, -1, asked(POLL) && fails("epoll"),
     (int fd, struct epoll_event *events, int most, int timeout), (fd, events, most, timeout))
WRAP(int, accept, -1, fails_on(ACCEPT, fd),
     (int fd, struct sockaddr *peer, socklen_t *size), (fd, peer, size))
WRAP(int, accept4, -1, fails_on(ACCEPT, fd),
     (int fd, struct sockaddr *peer, socklen_t *size, int flags), (fd, peer, size, flags))

int close(int descriptor)
{
    REAL(close);
    int failed = fails_on(CLOSE, descriptor), number = errno;
    int closed = real(descriptor);
    if (failed)
        errno = number;
    return failed ? -1 : closed;
}
