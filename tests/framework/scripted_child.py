"""An engine's process that says what its requests ask for: the parent's side is tested without a model.

`python -m tests.framework.scripted_child FD PARENT_PID`, in the place of `services.inference.engine.child`.
The prompt is the script: `answer` is answered with one token, `hang` is begun and never ended.
"""

from __future__ import annotations

import socket
import sys

from services.inference.engine import frames
from services.inference.engine.frames import EngineState, StepReport
from services.inference.engine.port import ModelInfo

MODEL_ID = "scripted"
PROMPT_TOKENS, CACHED_TOKENS, KV_PAGES = 5, 3, 10


def state(requests: int) -> EngineState:
    """After the step that began a request; its counters grow with each."""
    return EngineState(
        waiting_tokens=7,
        kv_pages_used=2,
        kv_pages=KV_PAGES,
        step_sequences=1,
        step_tokens=PROMPT_TOKENS,
        step_s=0.02 * requests,
        prefix_tokens=PROMPT_TOKENS * requests,
        prefix_hit_tokens=CACHED_TOKENS * requests,
        preemptions=requests,
    )


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as sock, sock.makefile("rb") as stream:

        def say(frame: frames.Frame) -> None:
            sock.sendall(frames.encode(frame))

        requests = 0
        hanging: set[int] = set()
        while header := stream.read(frames.HEADER.size):
            match frames.decode_command(stream.read(frames.body_bytes(header))):
                case frames.Configure(model_id):
                    say(frames.Ready(ModelInfo(model_id, "rev", 512, (), "numbers", True), 8))
                case frames.Ping():
                    say(frames.Pong())
                case frames.Cancel(job) if job in hanging:
                    hanging.remove(job)
                    say(StepReport((frames.JobCancelled(job),), 0, 0, state(requests)))
                case frames.Submit(job, request):
                    requests += 1
                    started = frames.JobStarted(job, PROMPT_TOKENS, CACHED_TOKENS)
                    say(StepReport((started,), 1, 0, state(requests)))
                    if request.prompt.text == "hang":
                        hanging.add(job)
                    else:
                        delta = frames.JobDelta(job, 0, "a", (1,), ())
                        ended = frames.JobFinished(job, ("length",), PROMPT_TOKENS, 1, CACHED_TOKENS)
                        say(StepReport((delta, ended), 0, 0, state(requests)))


if __name__ == "__main__":
    main()
