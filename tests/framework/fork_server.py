"""Forks services that start at once: it has imported one already. `forks` starts it and asks it.

`python -m tests.framework.fork_server SERVICE FD`. For each message on the socket FD one child, which becomes
`python -m services.SERVICE` with its own environment and output, and ends as that would. This process
stays single: a fork of one with threads would not be whole.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
from pathlib import Path

from deploy.dev.guard import PR_SET_PDEATHSIG
from tests.framework.forks import COLLECT, MAX_MESSAGE_BYTES, STACKS, STATUS


def main() -> None:
    service, link = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    importlib.import_module(f"services.{service}.app")
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        sys.exit(f"importing services.{service}.app starts a thread, which a fork would not have")
    gc.freeze()  # what is shared stays shared
    born = _serve(link)
    if born is not None:
        environment, output = born
        _become(environment, output)
        # as a start of its own does: ends with the interpreter, by SystemExit or otherwise
        runpy.run_module(f"services.{service}", run_name="__main__", alter_sys=True)


def _serve(link: socket.socket) -> tuple[dict[str, str], int] | None:
    """Forks on demand, and says of each child when it ended. Returns in each child what it is to become, and
    in this process None when nobody asks any more."""
    parent, children = os.getpid(), dict[int, socket.socket]()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([link, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _reap(children)
        if link not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(link, MAX_MESSAGE_BYTES, 2)
        if not message:
            return None
        output, status = descriptors[0], socket.socket(fileno=descriptors[1])
        pid = os.fork()
        if pid == 0:
            _separate(parent)
            for end in (link, status, *children.values()):
                end.close()
            os.close(woken)
            os.close(wake)
            return json.loads(message), output
        os.close(output)
        children[pid] = status
        status.send(STATUS.pack(pid))


def _reap(children: dict[int, socket.socket]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with children.pop(pid) as told:
            told.send(STATUS.pack(os.waitstatus_to_exitcode(status)))


def _separate(parent: int) -> None:
    """A group of its own, no life after its parent's, and the signals of a new process."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(COLLECT, lambda *_: gc.collect())


def _become(environment: dict[str, str], output: int) -> None:
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[attr-defined]
    # The threads' stacks come from within the handler in C, so also where the interpreter hangs.
    signal.signal(STACKS, lambda *_: _print_tasks())
    faulthandler.register(STACKS, all_threads=True, chain=True)
    sys.argv = ["service"]


def _print_tasks() -> None:
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:
        return  # no event loop runs
    for task in tasks:
        task.print_stack(file=sys.stderr)


if __name__ == "__main__":
    main()
