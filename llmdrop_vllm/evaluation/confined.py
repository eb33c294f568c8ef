"""Runs a program that nobody has read, in a process that can compute and nothing else; started by `sandbox.py`.

    python -I confined.py SECONDS MEMORY_BYTES < secret line, then the program

The secret goes to the standard output once the program has come to its end. This file stands alone: what it imports is
there for the program to find. The kernel refuses every call that is not in the list below, so there is no network, no
other process, no signal and no file that could be written; files can be read, and nobody is there to tell.
"""

import errno
import os
import resource
import sys

import pyseccomp as seccomp

# What an interpreter needs to import, compute, allocate and end; on some processors a few have other names.
ALLOWED = """
    read pread64 readv write writev close lseek fstat stat lstat newfstatat statx fstatfs statfs access faccessat
    faccessat2 readlink readlinkat getdents64 getcwd dup dup2 dup3 fcntl pipe2 ioctl poll ppoll select pselect6
    epoll_create1 epoll_ctl epoll_wait epoll_pwait mmap mremap munmap mprotect madvise brk membarrier rseq
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack futex set_robust_list set_tid_address arch_prctl
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrandom getpid gettid getppid getuid
    geteuid getgid getegid getpgrp getrusage sysinfo uname sched_yield sched_getaffinity getcpu exit exit_group
"""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CLONE_THREAD = 0x10000


def confine(seconds: int, memory_bytes: int) -> None:
    """Leave this process nothing but time and memory, and bounds on both."""
    for name, bound in {"CPU": seconds, "AS": memory_bytes, "FSIZE": 0, "CORE": 0, "NOFILE": 64}.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (bound, bound))
    calls = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    reading = (seccomp.MASKED_EQ, WRITING, 0)
    for name, *conditions in (
        *([name] for name in ALLOWED.split()),
        ["open", seccomp.Arg(1, *reading)],
        ["openat", seccomp.Arg(2, *reading)],
        ["clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD, CLONE_THREAD)],
    ):
        if seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) >= 0:
            calls.add_rule(seccomp.ALLOW, name, *conditions)
    # The C library tries the older call, whose flags can be looked at, only where this one is unknown.
    calls.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    calls.load()


def main() -> None:
    """Exit without the secret whatever way the program ends but at its end."""
    secret, program = sys.stdin.readline(), sys.stdin.read()
    answer = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    confine(int(sys.argv[1]), int(sys.argv[2]))
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    os.write(answer, secret.encode())
    os._exit(0)  # what the program has left to run at exit is nobody's concern


if __name__ == "__main__":
    main()
