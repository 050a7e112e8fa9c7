"""A process that has imported this repository and forks a copy of itself for each command, in milliseconds.

A test that starts `python main.py` in a new interpreter waits seven seconds for its imports, longer than the run itself
takes. `Popen` here is `subprocess.Popen`, except that it forks the warm process for scripts, tools and torchrun. A
command starts as usual if it changes a variable that is read while an interpreter starts, or with `cold=True`.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import types
from itertools import chain
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHERS = ("torch.distributed.run", "torch.distributed.launch")
ROOM = "TEST_ENVIRONMENT"  # a variable of that many characters, into which a fork writes its own environment
CHARACTERS = 100_000  # Linux allows 128 KiB
STARTUP = ("OMP_", "MKL_", "LD_", "MALLOC_", "PYTHON", "TMP", "TORCH_", "HF_", "XDG_", "HOME", "LANG", "LC_")
LENGTH, PID = struct.Struct("!Q"), struct.Struct("!i")
SET_CHILD_SUBREAPER = 36  # of prctl(2)


def at_startup(environment):
    """Return the variables that Python or libraries read while importing.

    Not PYTHONFAULTHANDLER, which harms nobody: a warm process always has it.
    """
    return {k: v for k, v in environment.items() if k.startswith(STARTUP) and k != "PYTHONFAULTHANDLER"}


def receive(connection, length):
    """Receive this many bytes; b"" at the end."""
    content = b""
    while len(content) < length:
        part = connection.recv(length - len(content))
        if not part:
            return b""
        content += part
    return content


STANDARD = at_startup(os.environ | {"OMP_NUM_THREADS": "1"})


# -- the side of the tests ---------------------------------------------------------------------------------------------


class Server:
    """The process that forks."""

    def __init__(self):
        self.socket, other = socket.socketpair()
        with other:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())],
                cwd=REPOSITORY,
                env={**STANDARD, "PYTHONFAULTHANDLER": "1", "PATH": os.environ["PATH"], ROOM: "-" * CHARACTERS},
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        atexit.register(self.close)

    def fork(self, request, streams):
        """Fork a child that runs the request; return its process id."""
        prctl = ctypes.CDLL(None).prctl
        content = json.dumps(request).encode()
        socket.send_fds(self.socket, [LENGTH.pack(len(content))], streams)
        prctl(SET_CHILD_SUBREAPER, 1)  # the fork of a fork that ends becomes a child of this process
        try:
            self.socket.sendall(content)
            (pid,) = PID.unpack(receive(self.socket, PID.size))
            receive(self.socket, 1)
        finally:
            prctl(SET_CHILD_SUBREAPER, 0)
        return pid

    def close(self):
        self.socket.close()
        self.process.wait()


@functools.cache
def server():
    return Server()


class Popen(subprocess.Popen):
    """`subprocess.Popen` that forks a process with everything imported, if the command is one of this repository."""

    def __init__(self, *args, cold=False, **kwargs):
        self.cold = cold
        super().__init__(*args, **kwargs)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        env = dict(os.environ) if env is None else env
        words = list(args)[1:] if args[0] == sys.executable and not (pass_fds or self.cold) else []
        modules = (*LAUNCHERS, "tools.")
        is_ours = words and (words[0].endswith(".py") or (words[0] == "-m" and words[1].startswith(modules)))
        fits = sum(map(len, chain.from_iterable(env.items()))) < CHARACTERS // 2
        if not is_ours or not fits or at_startup(env) != STANDARD:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        pipes = rest[3:9]
        request = {"words": words, "cwd": str(cwd), "environment": env, "new_session": rest[-2]}
        self.pid = server().fork(request, streams_of(pipes))
        self._child_created = True
        self._close_pipe_fds(*pipes)


def streams_of(pipes):
    """Return the child's ends of subprocess's six pipe descriptors, by number 0 to 2."""
    given = pipes[0], pipes[3], pipes[5]
    return [number if stream == -1 else stream for number, stream in enumerate(given)]


# -- the side of the server --------------------------------------------------------------------------------------------


def serve(connection):
    """Fork for each request until none are left; return only in a fork, with the request and its streams."""
    while True:
        length, streams, *_ = socket.recv_fds(connection, LENGTH.size, 3)
        if not length:
            os._exit(0)
        request = json.loads(receive(connection, *LENGTH.unpack(length)))
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                return request, streams
            connection.sendall(PID.pack(pid))
            os._exit(0)
        for stream in streams:
            os.close(stream)
        os.waitpid(between, 0)
        connection.sendall(b"!")


class ForkOfALauncher(subprocess.Popen):
    """A rank that torchrun starts, as a fork of torchrun, which has everything imported."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        words = [word for word in args[1:] if word != "-u"]
        request = {"words": words, "cwd": cwd or os.getcwd(), "environment": env, "new_session": rest[-2]}
        pipes = rest[3:9]
        self.pid = os.fork()
        if self.pid == 0:
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGINT}:
                with contextlib.suppress(OSError):  # glibc's own
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            end_with(request, streams_of(pipes))
        self._child_created = True
        self._close_pipe_fds(*pipes)


def end_with(request, streams):
    """Run a request and end like an interpreter, but leave its memory to the system, which saves a second or two."""
    status = 1
    try:
        run(request, streams)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def show(environment):
    """Overwrite the environment in /proc/PID/environ, which is that of the server."""
    content = b"\0".join(os.fsencode(f"{key}={value}") for key, value in environment.items())
    if len(content) >= CHARACTERS - 2:
        raise RuntimeError(f"an environment of {len(content)} bytes does not fit")
    ctypes.memmove(WHERE, (b"\0" + content).ljust(CHARACTERS, b"\0"), CHARACTERS)


def run(request, streams):
    """Do what `python WORDS` does in this environment."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    # like an interpreter; the server's may be seekable files
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    if request["new_session"]:
        os.setsid()
    show(request["environment"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    first, *words = request["words"]
    if first == "-m":
        subprocess_handler.Popen = ForkOfALauncher
        sys.path[0], sys.argv = os.getcwd(), words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(first).resolve().parent), [first, *words]
        sys.modules["__main__"] = script = types.ModuleType("__main__")
        script.__file__ = first
        exec(compile(Path(first).read_bytes(), first, "exec"), script.__dict__)


if __name__ == "__main__":
    sys.path.insert(1, str(REPOSITORY))
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    import main  # noqa: F401

    del sys.path[1]
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    WHERE = getenv(ROOM.encode())
    gc.freeze()
    end_with(*serve(socket.socket(fileno=int(sys.argv[1]))))
