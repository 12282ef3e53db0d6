"""What tests start, break and look at.

Real processes, started by the code that `make up` uses (`deploy.dev`); `tests/conftest.py` makes fixtures of
them:

- `mesh`: any part of the mesh, started, killed, frozen, restarted; its channels and logs
- `broker`: a Kafka for the whole run, or one of a test's own
- `ports`: ports that no other run on this machine is given meanwhile
- `proxy`: a TCP proxy that refuses, resets, goes silent or slows down
- `calls`: calls as a plain client makes them, and the history that is judged afterwards
- `tiny_service`, `scripted_gateway`, `otlp`: a smallest service, a gateway for clients, a receiver of spans

In this process:

- `audit_model`, `audit_real_world`, `audit_trace`, `audit_path`, `memory_broker`: the audit protocol as a
  state machine, and the real parts driven by the same traces
- `gateway_fakes`, `gateway_grpc`, `gateway_http`: the gateway's edges over its ports in memory
- `engines`, `engine_parent`, `models`: engines and models
- `access_tokens`: honest ones and forged ones
- `waiting`: waits for a condition, with a deadline
"""
