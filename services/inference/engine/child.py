"""The engine's process: `python -m services.inference.engine.child FD PARENT_PID`.

Two threads. The main one loads the model and runs the loop: take commands, step, report. The reader takes
frames from the socket; it answers pings even while a long step runs, and ends the process at once where the
parent is gone. There is no other way in or out: no listener, no pickle, and what is printed goes to the
parent's log.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading

from services.inference.engine import frames
from services.inference.engine.loading import load
from services.inference.engine.loop import EngineLoop
from services.inference.engine.scheduler import ScheduleLimits
from services.mesh.clock import SystemClock

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
EXIT_PARENT_GONE = 3
EXIT_PROTOCOL = 4
EXIT_LOAD_FAILED = 5


class Link:
    """The socket to the parent. Both threads send."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._stream = sock.makefile("rb")
        self._sending = threading.Lock()

    def send(self, frame: frames.Frame) -> None:
        data = frames.encode(frame)
        with self._sending:
            self._socket.sendall(data)

    def receive(self) -> frames.Command | None:
        """The next command; None at the end. Raises FrameError."""
        header = self._stream.read(frames.HEADER.size)
        if len(header) < frames.HEADER.size:
            return None
        length = frames.body_bytes(header)
        body = self._stream.read(length)
        return frames.decode_command(body) if len(body) == length else None


class Inbox:
    """Commands on their way from the reader to the loop.

    The parent bounds what can be under way: each job it has admitted gives at most two commands. More than
    that breaks the protocol.
    """

    def __init__(self, link: Link, max_commands: int) -> None:
        self._link = link
        self._queue: queue.Queue[frames.Command] = queue.Queue(max_commands)

    def read_forever(self) -> None:
        """The reader thread. Ends the process where the parent is gone, whatever the loop is doing."""
        try:
            while (command := self._link.receive()) is not None:
                if isinstance(command, frames.Ping):
                    self._link.send(frames.Pong())
                else:
                    self._queue.put_nowait(command)
        except OSError:
            pass
        except (frames.FrameError, queue.Full):
            logger.exception("the parent broke the protocol")
            os._exit(EXIT_PROTOCOL)
        os._exit(EXIT_PARENT_GONE)

    def take(self, *, wait: bool) -> list[frames.Command]:
        """All commands that are there; with `wait`, at least one."""
        commands = [self._queue.get()] if wait else []
        with contextlib.suppress(queue.Empty):
            while True:
                commands.append(self._queue.get_nowait())
        return commands


def die_with(parent_pid: int) -> None:
    """Asks the kernel to kill this process with its parent, where it knows how (Linux).

    The end of the socket tells the same; this also works while the interpreter is busy in a long call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(EXIT_PARENT_GONE)


def serve(loop: EngineLoop, link: Link, inbox: Inbox) -> None:
    """Runs until the process ends."""
    while True:
        for command in inbox.take(wait=loop.idle):
            match command:
                case frames.Submit(job, request):
                    loop.submit(job, request)
                case frames.Cancel(job):
                    loop.cancel(job)
                case frames.Count(job, prompt):
                    loop.count(job, prompt)
                case _:
                    raise frames.FrameError(f"{type(command).__name__} does not belong here")
        events = tuple(loop.step())
        link.send(frames.StepReport(events, loop.running, loop.waiting, loop.state))


def run(link: Link) -> int:
    configure = link.receive()
    if not isinstance(configure, frames.Configure):
        return EXIT_PROTOCOL
    inbox = Inbox(link, max_commands=4 * (configure.max_running + configure.max_waiting) + 16)
    threading.Thread(target=inbox.read_forever, name="reader", daemon=True).start()
    try:
        model = load(configure, lambda text: link.send(frames.Progress(text)))
    except Exception as error:
        logger.exception("the model cannot be loaded")
        link.send(frames.LoadFailed(f"{type(error).__name__}: {error}"[:2000]))
        return EXIT_LOAD_FAILED
    limits = ScheduleLimits(
        max_running=configure.max_running,
        max_prefill_tokens=configure.max_prefill_tokens,
        step_target_s=configure.step_target_ms / 1000,
        # A guess changes nothing only where a token does not depend on what is computed beside it.
        lookup_tokens=configure.prompt_lookup_tokens if model.info.exact_replay else 0,
    )
    loop = EngineLoop(
        model,
        limits,
        SystemClock().monotonic,
        max_output_tokens=configure.max_output_tokens,
        keep_prefixes=configure.prefix_cache,
    )
    link.send(frames.Ready(model.info, model.tokenizer.table.longest_bytes))
    serve(loop, link, inbox)
    return 0


def main() -> None:
    fd, parent_pid = (int(argument) for argument in sys.argv[1:3])
    die_with(parent_pid)
    # The parent decides about the end; a Ctrl-C at the terminal is meant for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with socket.socket(fileno=fd) as sock:
        status = run(Link(sock))
        # What was sent last must reach the parent; the reader thread must not decide the exit status.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        os._exit(status)


if __name__ == "__main__":
    main()
