"""The engine: from a request to a stream of tokens.

`port` is what the service sees. The other modules stand on two sides of a process border:

- the service's process: `process` starts and ends the child, `watchdog` watches it, `mailbox` and
  `health_state` carry what comes from it to readers. No torch, no numpy.
- the child (`child`): `loading` makes a model and `choosing` its step; `loop` runs jobs (`sequence`) as
  `scheduler` says, with `kv_cache` for the books of its pages (`kv_memory` says how many) and `step_cost` for
  what steps take. Prompt to ids (`tokenizer`), ids to logits (`step`, by `native` or `model`; `isolation`),
  logits to a token (`sampler`, `uniform`, `logprobs`), token to text (`detokenizer`, `stopping`).

`frames` is the border. A request: Submit -> loop.submit -> queue -> pages -> prefill in chunks -> one token a
step -> StepReport -> mailbox -> reader. Cancel takes the same way and frees the pages before the next step.
docs/engine.md follows a step.
"""
