/* LD_PRELOAD: makes the file system below the folder of poor_disk() a poor one, for every library in the process.

   drive: as a Google Drive mount may be. No locks (flock, fcntl), no links, no chmod, no shared memory maps, no fsync of a
   folder, no rename of a folder onto one that exists.
   at: the number, from 0, of the one call that fails with `error` among all that write; half of a write is done first. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int drive, error, at = -1, calls;
static int refused[3]; /* locks, syncs of a folder, others */

void poor_disk(const char *path, int like_drive, int fail_at, int with) {
    snprintf(folder, sizeof folder, "%s", path);
    drive = like_drive, at = fail_at, error = with, calls = 0;
}

int poor_disk_calls(void) { return calls; }
int poor_disk_refused(int what) { return refused[what]; }

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(condition, number) do { if (condition) { errno = number; return -1; } } while (0)
#define REFUSE(what, condition, number) FAIL((drive && (condition)) ? ++refused[what] : 0, number)
enum { LOCKS, SYNCS, OTHERS };

static int below(const char *path) { return *folder && path && !strncmp(path, folder, strlen(folder)); }

static int below_at(int dir, const char *path) {
    char where[64], base[PATH_MAX];
    if (!*folder || !path) return 0;
    if (*path == '/' || dir == AT_FDCWD) return below(path);
    snprintf(where, sizeof where, "/proc/self/fd/%d", dir);
    ssize_t size = readlink(where, base, sizeof base - 1);
    if (size < 0) return 0;
    base[size] = 0;
    return below(base);
}

static int open_below(int fd) { return below_at(fd, ""); }

static int is_folder(int fd) { struct stat s; return !fstat(fd, &s) && S_ISDIR(s.st_mode); }

static int failing(int here) { return here && at >= -1 && calls++ == at; }

#define WRITES(here) FAIL(failing(here), error)

int flock(int fd, int how) { REAL(flock); REFUSE(LOCKS, open_below(fd), ENOTSUP); return real(fd, how); }

static int lock_command(int what) {
    return what == F_SETLK || what == F_SETLKW || what == F_GETLK || what == F_OFD_SETLK || what == F_OFD_SETLKW || what == F_OFD_GETLK;
}
#define FCNTL(name) int name(int fd, int what, ...) { \
    REAL(name); va_list rest; va_start(rest, what); void *value = va_arg(rest, void *); va_end(rest); \
    REFUSE(LOCKS, lock_command(what) && open_below(fd), ENOTSUP); return real(fd, what, value); }
FCNTL(fcntl)
FCNTL(fcntl64)

#define MMAP(name, offset) void *name(void *place, size_t size, int may, int how, int fd, offset start) { \
    REAL(name); if (drive && (how & MAP_SHARED) && (may & PROT_WRITE) && open_below(fd)) { errno = ENODEV; return MAP_FAILED; } \
    return real(place, size, may, how, fd, start); }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

int link(const char *a, const char *b) { REAL(link); REFUSE(OTHERS, below(b), ENOTSUP); return real(a, b); }
int linkat(int d, const char *a, int e, const char *b, int f) { REAL(linkat); REFUSE(OTHERS, below_at(e, b), ENOTSUP); return real(d, a, e, b, f); }
int symlink(const char *a, const char *b) { REAL(symlink); REFUSE(OTHERS, below(b), ENOTSUP); return real(a, b); }
int symlinkat(const char *a, int e, const char *b) { REAL(symlinkat); REFUSE(OTHERS, below_at(e, b), ENOTSUP); return real(a, e, b); }
int chmod(const char *a, mode_t m) { REAL(chmod); REFUSE(OTHERS, below(a), EPERM); return real(a, m); }
int fchmod(int fd, mode_t m) { REAL(fchmod); REFUSE(OTHERS, open_below(fd), EPERM); return real(fd, m); }
int fchmodat(int d, const char *a, mode_t m, int f) { REAL(fchmodat); REFUSE(OTHERS, below_at(d, a), EPERM); return real(d, a, m, f); }

int fsync(int fd) { REAL(fsync); REFUSE(SYNCS, open_below(fd) && is_folder(fd), ENOTSUP); WRITES(open_below(fd)); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); WRITES(open_below(fd)); return real(fd); }

static int onto_a_folder(const char *a, const char *b) { struct stat s; return !stat(a, &s) && S_ISDIR(s.st_mode) && !stat(b, &s); }
int rename(const char *a, const char *b) { REAL(rename); REFUSE(OTHERS, below(b) && onto_a_folder(a, b), EEXIST); WRITES(below(b)); return real(a, b); }
int renameat(int d, const char *a, int e, const char *b) { REAL(renameat); WRITES(below_at(e, b)); return real(d, a, e, b); }
int mkdir(const char *a, mode_t m) { REAL(mkdir); WRITES(below(a)); return real(a, m); }
int mkdirat(int d, const char *a, mode_t m) { REAL(mkdirat); WRITES(below_at(d, a)); return real(d, a, m); }

#define OPEN(name) int name(const char *path, int how, ...) { \
    REAL(name); va_list rest; va_start(rest, how); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    WRITES((how & O_ACCMODE) != O_RDONLY && below(path)); return real(path, how, mode); }
OPEN(open)
OPEN(open64)
#define OPENAT(name) int name(int dir, const char *path, int how, ...) { \
    REAL(name); va_list rest; va_start(rest, how); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    WRITES((how & O_ACCMODE) != O_RDONLY && below_at(dir, path)); return real(dir, path, how, mode); }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (failing(open_below(fd))) { if (real(fd, data, size / 2) < 0) return -1; errno = error; return -1; }
    return real(fd, data, size);
}
#define PWRITE(name, offset) ssize_t name(int fd, const void *data, size_t size, offset start) { \
    REAL(name); if (failing(open_below(fd))) { if (real(fd, data, size / 2, start) < 0) return -1; errno = error; return -1; } \
    return real(fd, data, size, start); }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
ssize_t writev(int fd, const struct iovec *parts, int n) { REAL(writev); WRITES(open_below(fd)); return real(fd, parts, n); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); WRITES(open_below(fd)); return real(fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); WRITES(open_below(fd)); return real(fd, size); }
