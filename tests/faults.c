/* Preloaded by tests: file systems that lack flock, that cannot fsync a directory, or that are full; and a program that
   has set the handler of a signal before it starts Python. */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

int flock(int fd, int operation) {
    const char *fault = getenv("FAULT_FLOCK");
    if (fault && *fault) {
        errno = atoi(fault);
        return -1;
    }
    return syscall(SYS_flock, fd, operation);
}

int fsync(int fd) {
    const char *fault = getenv("FAULT_DIRECTORY_FSYNC");
    struct stat found;
    if (fstat(fd, &found) == 0 && !S_ISDIR(found.st_mode))
        fault = getenv("FAULT_FSYNC");
    if (fault && *fault) {
        errno = atoi(fault);
        return -1;
    }
    return syscall(SYS_fsync, fd);
}

static void say(int number) {
    (void)!write(2, "handled outside Python\n", 23);
}

__attribute__((constructor)) static void before_python(void) {
    const char *number = getenv("FAULT_HANDLER");
    if (number && *number)
        signal(atoi(number), say);
}
