"""Implementations of the engine port: `torch` runs models in a child process, `echo` runs none."""
