"""What tests start and break: real processes on free ports, a real broker, a proxy that fails on demand.

- `ports`: ports that no other run on this machine is given meanwhile
- `broker`: a Kafka for the whole run, or one of a test's own
- `mesh`: any part of the mesh, started, killed, frozen, restarted; its channels, clients and logs
- `proxy`: a TCP proxy that refuses, resets, goes silent or slows down
- `waiting`: waits for a condition, with a deadline

`tests/conftest.py` makes fixtures of them. The processes are started by the code that `make up` uses
(`deploy.dev`).
"""
