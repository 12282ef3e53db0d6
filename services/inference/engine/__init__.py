"""The engine: from a request to a stream of tokens.

`port` is what the service sees. The other modules stand on two sides of a process border:

- the service's process: `process` starts and ends the child, `watchdog` watches it, `mailbox` and
  `health_state` carry what comes from it to readers. No torch, no numpy.
- the child (`child`): `loading` makes a model, `loop` runs jobs (`sequence`) step by step (`step`): prompt to
  ids (`tokenizer`), ids to logits, logits to a token (`sampler`, `uniform`), token to text (`detokenizer`,
  `stopping`).

`frames` is the border. A request: Submit -> loop.submit -> queue -> slot -> prefill in chunks -> one token a
step -> StepReport -> mailbox -> reader. Cancel takes the same way and frees the slot before the next step.
"""
