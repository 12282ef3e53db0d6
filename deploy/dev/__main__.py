"""`python -m deploy.dev up|down|demo|certs|client`: the mesh on this machine. See `make help`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from deploy.dev import certs, demo, environment, ports
from deploy.dev.environment import ROOT
from deploy.dev.mesh import Mesh
from deploy.dev.state import CannotStart, State

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
MODEL = "smollm2-135m-instruct"
"""What inference serves unless it is told otherwise."""
DOWN_TIMEOUT_S = 120
DEFAULT_STATE = ROOT / ".state"


def main() -> int:
    args = _parser().parse_args()
    try:
        match args.command:
            case "up":
                with _terminal():
                    return asyncio.run(up(args))
            case "demo":
                with _terminal():
                    return asyncio.run(demo.demo(args.state / "demo", models=_models(args), dist=_dist(args)))
            case "down":
                stopped = State(args.state).stop_recorded(DOWN_TIMEOUT_S)
                _say("Stopped." if stopped else "No mesh runs here.")
            case "certs":
                folder = args.state / "certs"
                made = certs.ensure_all(folder)
                _say(f"{folder}: {', '.join(made) if made else 'all there, and good for a while'}")
            case "client":
                client(args)
    except CannotStart as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    return EXIT_OK


async def up(args: argparse.Namespace) -> int:
    """Runs the mesh until a signal; returns the exit code."""
    printing = threading.Lock()

    def on_line(name: str, line: str) -> None:
        with printing:
            print(f"{name:<10} | {line}", flush=True)

    reservations = ports.PortReservations()  # held until the process ends
    mesh = Mesh(
        State(args.state),
        mesh_ports=(
            reservations.take(list(ports.DEFAULTS))
            if args.free_ports
            else ports.with_offset(args.port_offset)
        ),
        bootstrap=os.environ.get("LLMOS_KAFKA_BOOTSTRAP_SERVERS"),
        dist=_dist(args),
        models=_models(args),
        tls=args.tls,
        settings=environment.settings_of_this_shell(),
        say=_say,
        on_line=None if args.quiet else on_line,
    )
    stop = _stop_on_signals(mesh)
    starting = asyncio.ensure_future(mesh.start())
    stopping = asyncio.ensure_future(stop.wait())
    code = EXIT_OK
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            await starting
            _say(_next_steps(mesh, args))
            crash = asyncio.ensure_future(mesh.wait_crash())
            await asyncio.wait({crash, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                _say(crash.result())
                code = EXIT_FAILED
            crash.cancel()
    finally:
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, CannotStart):
            await starting
        clean = await mesh.drain()
    if code == EXIT_OK and not clean:
        return EXIT_FAILED
    return code


def client(args: argparse.Namespace) -> NoReturn:
    """Becomes the `llmos` command, pointed at the mesh that runs here, with its administrator key."""
    variables = State(args.state).client_variables()
    arguments = [argument for argument in args.arguments if argument != "--"]
    os.execvpe(sys.executable, [sys.executable, "-m", "llmos_client.cli", *arguments], os.environ | variables)


def _stop_on_signals(mesh: Mesh) -> asyncio.Event:
    """The first SIGINT or SIGTERM asks for the drain, the second ends everything."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            _say("Ending everything at once.")
            mesh.kill()
        else:
            _say("Draining. Again, to end everything at once.")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


def _next_steps(mesh: Mesh, args: argparse.Namespace) -> str:
    environment_file, key_file = _shown(mesh.state.client_env), _shown(mesh.state.admin_key)
    url, tls = f"http://{ports.HOST}:{mesh.ports['gateway http']}", ""
    if mesh.certs is not None:
        url = url.replace("http", "https", 1)
        tls = '--cacert "$LLMOS_TLS_CA_FILE" --cert "$LLMOS_TLS_CERT_FILE" --key "$LLMOS_TLS_KEY_FILE" '
    return f"""
The mesh is ready. In another terminal:

  make chat

or, for everything else:

  . {environment_file}
  .venv/bin/llmos models
  .venv/bin/llmos audit tail
  clients/examples/go/build.sh && clients/examples/go/bin/llmos-stream "Why is the sky blue?"
  curl {tls}{url}/v1/chat/completions \\
    -H "authorization: Bearer $(cat {key_file})" -H "content-type: application/json" \\
    -d '{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

Logs are in {_shown(mesh.state.logs)}. Ctrl-C drains and stops.
"""


@contextlib.contextmanager
def _terminal() -> Iterator[None]:
    """Ctrl-C is for this process: otherwise make gets it too, and calls a clean stop a failure."""
    if not sys.stdin.isatty() or os.getpgrp() == os.getpid():
        yield
        return
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    before = os.tcgetpgrp(sys.stdin.fileno())
    os.setpgid(0, 0)
    os.tcsetpgrp(sys.stdin.fileno(), os.getpgrp())
    try:
        yield
    finally:
        os.tcsetpgrp(sys.stdin.fileno(), before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.dev", description=__doc__)
    parser.add_argument(
        "--state", type=Path, default=DEFAULT_STATE, help="the state folder (default: .state)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("up", help="run the mesh until Ctrl-C")
    running.add_argument(
        "--tls", action="store_true", help="mTLS on every hop, with development certificates"
    )
    running.add_argument("--port-offset", type=int, default=0, help="add this to every port")
    running.add_argument("--free-ports", action="store_true", help="use ports that are free just now")
    running.add_argument("--quiet", action="store_true", help="logs go to their files only")
    commands.add_parser("down", help="stop the mesh that runs in the state folder")
    commands.add_parser("demo", help="one request from the client to its audit record")
    commands.add_parser("certs", help="make development certificates")
    using = commands.add_parser("client", help="the llmos command, with the key of the mesh that runs here")
    using.add_argument("arguments", nargs=argparse.REMAINDER, help="-- and the arguments of llmos")
    return parser


def _dist(args: argparse.Namespace) -> Path:
    """Where Kafka's jars are kept: LLMOS_KAFKA_DIST, so that several checkouts can share them."""
    return Path(os.environ.get("LLMOS_KAFKA_DIST") or args.state / "kafka-dist").absolute()


def _models(args: argparse.Namespace) -> Path:
    """Where model files are kept: LLMOS_MODELS_DIR, so that several checkouts can share them."""
    return Path(os.environ.get("LLMOS_MODELS_DIR") or args.state / "models").absolute()


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
