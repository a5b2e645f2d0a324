"""Walls around a process that judges: what the kernel gives without root, and which of them stand here.

``python -m rollout_workers.judging.walls`` prints them as JSON, after building them around itself. On Linux: Landlock
(files, TCP, signals), user and network namespaces, seccomp by way of libseccomp, resource limits. Elsewhere the
resource limits alone.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

LINUX = sys.platform == "linux"
NEEDED = ("system calls",)
"""Without these a judge may start programs or open sockets, so nothing that evaluates is run."""
NETWORK_ERROR, PROCESS_ERROR = errno.ENETDOWN, errno.EPERM
"""What a user's function meets at the walls that its settings can take away."""

# Numbers of linux/landlock.h, linux/prctl.h, linux/sched.h and linux/seccomp.h; Landlock's system calls have one number
# everywhere.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""By ABI version, the number of rights on files."""
_SET_PDEATHSIG, _SET_SECCOMP, _SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS, _FILTER = 1, 22, 36, 38, 2
_NEWUSER, _NEWNET, _CLONE_THREAD = 0x10000000, 0x40000000, 0x00010000
_SYSTEM = (
    *("/usr/lib", "/usr/lib64", "/lib", "/lib64"),
    *("/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache"),
)
_libc = ctypes.CDLL(None, use_errno=True)

# Of the parent of the forks, and of each fork. What is on neither list is answered with EPERM.
ALLOWED = (
    "read readv pread64 write close fstat newfstatat stat lstat statx lseek mmap munmap mremap mprotect madvise brk "
    "rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack futex clock_gettime clock_getres clock_nanosleep nanosleep "
    "gettimeofday time getpid gettid getppid getuid geteuid getgid getegid getrandom getrusage getrlimit sysinfo uname "
    "times sched_yield sched_getaffinity getcpu exit exit_group restart_syscall poll ppoll select pselect6 access "
    "faccessat faccessat2 readlink readlinkat getcwd getdents getdents64 rseq set_robust_list membarrier getpriority "
    "prctl seccomp prlimit64 setrlimit pipe pipe2 wait4 waitid kill"
)
DEADLY = (
    "execve execveat socket socketpair connect bind listen accept accept4 sendto sendmsg ptrace process_vm_readv "
    "process_vm_writev pidfd_open pidfd_getfd pidfd_send_signal rt_sigqueueinfo rt_tgsigqueueinfo mount umount2 "
    "pivot_root chroot unshare setns bpf keyctl add_key request_key io_uring_setup io_uring_enter io_uring_register "
    "perf_event_open userfaultfd init_module finit_module kexec_load open_by_handle_at creat unlink unlinkat rename "
    "renameat renameat2 mkdir mkdirat rmdir link linkat symlink symlinkat truncate ftruncate chmod fchmod fchmodat "
    "chown fchown lchown fchownat mknod mknodat setsid setpgid memfd_create shmget shmat msgget semget mq_open"
)
"""The process ends: nothing that judges a text has a use for them."""
FORBIDDEN_IN_FORKS = ("clone", "fork", "vfork", "kill", "tkill", "tgkill")
"""What the parent alone may do: the forks end at these."""
_WRITING = (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND)
# F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC: the others can have signals sent to other processes
_FCNTL = (1, 2, 3, 1030)


@dataclass(frozen=True, slots=True)
class Filter:
    """A seccomp program, made once and installed by one system call in each fork."""

    program: bytes

    def install(self) -> bool:
        """From here on, for this thread and what it starts; whether the kernel takes it."""
        held = ctypes.create_string_buffer(self.program, len(self.program))
        head = struct.pack("HxxxxxxP", len(self.program) // 8, ctypes.addressof(held))
        return bool(_libc.prctl(_SET_SECCOMP, _FILTER, head, 0, 0) == 0)


def forbid_privileges() -> None:
    """No program started from here gains rights; Landlock and seccomp ask for this."""
    if LINUX:
        _libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that forked it ends."""
    if LINUX:
        _libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """Processes whose parents are gone become children of this one, so that it can end them."""
    if LINUX:
        _libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def cut_network() -> bool:
    """Leave the network for an empty one, by way of a user namespace where there is no root. Whether that was
    possible."""
    if not LINUX:
        return False
    return any(not _libc.unshare(flags) for flags in (_NEWUSER | _NEWNET, _NEWNET))


def read_only(folders: Iterable[Path]) -> int:
    """Only these can be read from here on, nothing written, no signal sent outside. Landlock's version, 0 where there
    is none."""
    version = _libc.syscall(_CREATE_RULESET, None, 0, 1) if LINUX else 0
    if version < 1:
        return 0
    rights = (1 << max(bits for since, bits in _FILE_RIGHTS.items() if version >= since)) - 1
    # binding and connecting; abstract sockets and signals
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("QQQ", rights, network, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        return 0
    for folder in folders:
        try:
            place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not for this user: then there is nothing to allow
            continue
        allowed = _READ_FILE | (_READ_DIR if folder.is_dir() else 0)
        _libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    held = _libc.syscall(_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return int(version) if held else 0


def what_python_reads() -> list[Path]:
    """The interpreter's folders, those of the packages loaded by now, the system's libraries and time zones."""
    home = Path.home().resolve()
    found = {
        Path(sys.prefix),
        *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    }
    files = (getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if "." not in name)
    found |= {Path(file).parent for file in files if file}
    found |= set(map(Path, _SYSTEM))
    # A package that lies right in the home folder must not open all of it.
    return sorted(p for p in found if p.exists() and not home.is_relative_to(p.resolve()))


def limit(*, megabytes: int, seconds: float | None = None, writes: bool = True) -> None:
    """Bounds of this process: memory, no core files; CPU seconds and, without ``writes``, no bytes to any file."""
    wanted = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, megabytes * 2**20)]
    if seconds is not None:
        wanted.append((resource.RLIMIT_CPU, int(seconds) + 1))
    if not writes:
        wanted += [(resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_NPROC, 0)]
    for kind, value in wanted:
        hard = resource.getrlimit(kind)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # A second more of CPU to the hard limit, at which the kernel kills without saying why.
        last = hard if writes else bound + (kind == resource.RLIMIT_CPU)
        try:
            resource.setrlimit(kind, (bound, last if hard == resource.RLIM_INFINITY else min(last, hard)))
        except (ValueError, OSError):
            if LINUX:  # macOS knows some of these by name only
                raise


def judging_filters() -> tuple[Filter, Filter] | None:
    """For the parent of the forks: reading, memory, time and forks; and what each fork adds, which is short, for it
    costs time.

    ``None`` where there is no libseccomp.
    """
    if (seccomp := _seccomp()) is None:
        return None
    made = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    for name in ALLOWED.split():
        _rule(seccomp, made, seccomp.ALLOW, name)
    for name in DEADLY.split():
        _rule(seccomp, made, seccomp.KILL_PROCESS, name)
    # their flags lie where no filter can read them; the C library then takes clone and openat
    for name in ("clone3", "openat2"):
        _rule(seccomp, made, seccomp.ERRNO(errno.ENOSYS), name)
    _rule(seccomp, made, seccomp.ALLOW, "fork")
    _rule(seccomp, made, seccomp.ALLOW, "clone", (0, seccomp.MASKED_EQ, _CLONE_THREAD, 0))  # processes, no threads
    # Python asks every file that it opens whether it is a terminal
    _rule(seccomp, made, seccomp.ERRNO(errno.ENOTTY), "ioctl")
    for command in _FCNTL:
        _rule(seccomp, made, seccomp.ALLOW, "fcntl", (1, seccomp.EQ, command))
    writing = 0
    for flag in _WRITING:
        writing |= flag
    for name, place in (("open", 1), ("openat", 2)):
        _rule(seccomp, made, seccomp.ALLOW, name, (place, seccomp.MASKED_EQ, writing, 0))
        for flag in _WRITING:
            _rule(seccomp, made, seccomp.KILL_PROCESS, name, (place, seccomp.MASKED_EQ, flag, flag))
    last = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in FORBIDDEN_IN_FORKS:
        _rule(seccomp, last, seccomp.KILL_PROCESS, name)
    _rule(seccomp, last, seccomp.ERRNO(errno.EPERM), "prctl")
    return _compiled(made), _compiled(last)


def function_filter(*, network: bool, processes: bool) -> Filter | None:
    """For a user's function: no sockets but local ones without ``network``, no other programs without ``processes``."""
    if (network and processes) or (seccomp := _seccomp()) is None:
        return None
    made = seccomp.SyscallFilter(seccomp.ALLOW)
    refused = seccomp.ERRNO(PROCESS_ERROR)
    if not network:
        _rule(seccomp, made, seccomp.ERRNO(NETWORK_ERROR), "socket", (0, seccomp.NE, 1))
        _rule(seccomp, made, seccomp.ERRNO(errno.ENOSYS), "io_uring_setup")
    if not processes:
        for name in ("fork", "vfork", "execve", "execveat"):
            _rule(seccomp, made, refused, name)
        _rule(seccomp, made, seccomp.ERRNO(errno.ENOSYS), "clone3")
        _rule(seccomp, made, refused, "clone", (0, seccomp.MASKED_EQ, _CLONE_THREAD, 0))
    return _compiled(made)


def _seccomp():  # type: ignore[no-untyped-def]
    """The binding, where it and libseccomp are installed."""
    if not LINUX:
        return None
    try:
        import pyseccomp
    except (ImportError, RuntimeError):  # it says RuntimeError when the library is not there
        return None
    return pyseccomp


def _rule(seccomp, made, action: int, name: str, *arguments: Sequence[int]) -> None:  # type: ignore[no-untyped-def]
    number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)
    if number >= 0:  # else this processor has none of that name, or the library is older than it
        made.add_rule(action, number, *(seccomp.Arg(*argument) for argument in arguments))


def _compiled(made) -> Filter:  # type: ignore[no-untyped-def]
    with tempfile.TemporaryFile() as file:
        made.export_bpf(file)
        file.seek(0)
        return Filter(file.read())


def missing(standing: Sequence[str]) -> str:
    """What has to stand before anything that evaluates is run and does not, or nothing."""
    return ", ".join(name for name in NEEDED if name not in standing)


def build(folders: Iterable[Path]) -> tuple[list[str], Filter | None]:
    """Build the walls that are inherited around this process, which must have one thread.

    Returns the names of those that stand, and the filter of system calls that each fork adds for itself.
    """
    forbid_privileges()
    made = judging_filters()  # first: the binding looks for its library with programs and temporary files
    standing = ["network (namespace)"] if cut_network() else []
    standing += [f"files (Landlock {version})" for version in [read_only(folders)] if version]
    if made is None or not made[0].install():
        return [*standing, "limits"], None
    return [*standing, "system calls", "limits"], made[1]


if __name__ == "__main__":
    print(json.dumps(build(what_python_reads())[0]))
