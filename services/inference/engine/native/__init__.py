"""The native step: a whole transformer step behind one call, in C.

Owns the C sources, their build and cache, and `NativeStep`, which implements the engine's `Step` with them.
Does not own: which token is next (sampler), whose pages are whose (KV cache), reading models (engine.model).

A step goes: `step.NativeStep.run` checks and flattens rows, `library.Library` passes pointers to C, without
the GIL; `step.c` runs the layers, its loops shared by the threads of `pool.c`; arithmetic is in `matmul.c`,
`attention.c` and `rows.c`, compiled once for each instruction set by `variant.c` and chosen when a model
is loaded. `model.c` packs the weights. `build.py` compiles it all with the machine's compiler, once.
"""
