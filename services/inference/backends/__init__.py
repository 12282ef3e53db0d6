"""Implementations of the engine port: `embedded` runs models in a child process, `echo` runs none."""
