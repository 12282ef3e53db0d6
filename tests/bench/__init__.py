"""Measurements: what llmos does, beside what others do with the same model on the same machine.

`make bench-engine` (`engine`), `make bench-start` (`start`) and `make soak` (`soak`); docs/benchmarks.md says
how they are run and read. All talk to public ports only: gRPC through the gateway, or the engine's port.

- `work`: prompts, and what came of one batch of streams
- `subject`: what is measured: `through_gateway` (the whole platform), `alone` (our engine without the mesh),
  `generate` (transformers in a process of its own: `generate_worker`), `serve` (`transformers serve`)
- `rounds`: the subjects one after the other, again and again; `check`: that they answer alike
- `figures`: medians of ratios, aims; `report`: the table, the raw rounds as JSON
- `soak_load`, `soak_samples`, `soak_judgement`: the load, what is noted meanwhile, what is said of it
"""
