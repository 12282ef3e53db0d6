"""The gateway: the public edge of the mesh.

It owns who may come in and what it costs: identity, limits, routing to a replica, and the record of it all.
It does not run models (inference), keep accounts (auth) or keep records (logging).

A request goes in a straight line:

- `servicer` (gRPC) or `http` (with `http_server`, `http_protocol`, `http_endpoint`, `http_exchange`,
  `http_receiving`, `http_errors`, and `openai` for the forms of requests and answers) takes it in, behind the
  mesh's chain, to which this service adds two links: `auditing` (one outcome for each request, whatever ends
  it) and `authorisation` (whether policy allows it); who calls is found by `authentication` and `keys`
- `request` parses it once into what can only be valid (`generation`)
- `completion` is the use case: `limits`, `cache`, `admission`, `routing`, the replica behind `ports`, and
  what is counted (`telemetry`); `models` and `policy_view` answer what a caller sees and may do

`clients` speaks to the other services, `settings` is what the process is told, `app` puts it together.
"""
