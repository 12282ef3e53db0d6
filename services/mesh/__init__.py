"""The wire that all four services share; no business rules.

- `app`: how a process is put together, started, drained and stopped
- `settings`: one frozen class per service; the only reader of the environment
- `server`, `interceptors`, `running`, `health`: the serving side of gRPC, limits and drain
- `channel`: the calling side of gRPC, with what every call carries along
- `errors`, `status`: the error tree, and its one mapping to and from gRPC
- `context`: what is known of the request being served
- `access_token`, `compact_jws`, `jwks`, `tokens`: signed identities, and how they are verified
- `service_tokens`, `auth_client`: a service's own tokens
- `revocation`, `watching`, `watch_client`: what auth pushes: what is revoked, and the policy
- `slowdown`: makes brute force slow
- `tls`: certificates, read again when they change
- `telemetry`, `logs`: traces, metrics and log lines
- `events`, `spool`, `relay`, `kafka`, `audit_protocol`: the way of an audit event to Kafka
- `policy`, `actions`, `decision`, `rule_index`, `policy_codec`: what policy is made of, and what it says
- `addresses`, `source_address`: whose address a call comes from, and which blocks it is in
- `clock`: time

A call arrives at `server`, passes the chain in `interceptors`, and reaches a service's servicer; what
that servicer asks of other services leaves through `channel`.
"""
