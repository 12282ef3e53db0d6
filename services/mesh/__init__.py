"""The wire that all four services share; no business rules.

- `app`: how a process is put together, started, drained and stopped
- `settings`: one frozen class per service; the only reader of the environment
- `server`, `interceptors`, `running`, `health`: the serving side of gRPC, limits and drain
- `channel`: the calling side of gRPC, with what every call carries along
- `errors`, `status`: the error tree, and its one mapping to and from gRPC
- `context`: what is known of the request being served
- `tokens`: signed identities, checked and obtained
- `tls`: certificates, read again when they change
- `telemetry`, `logs`: traces, metrics and log lines
- `events`, `spool`, `relay`, `kafka`, `audit_protocol`: the way of an audit event to Kafka
- `policy`, `actions`, `decision`, `rule_index`, `policy_codec`: what policy is made of, and what it says
- `addresses`, `source_address`: whose address a call comes from, and which blocks it is in
- `clock`: time

A call arrives at `server`, passes the chain in `interceptors`, and reaches a service's servicer; what
that servicer asks of other services leaves through `channel`.
"""
