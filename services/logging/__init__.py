"""The logging service: the audit log, in which each request has exactly one outcome.

Owns what was asked, by whom and how it ended, and what is known of the spools that it comes from. Holds no
text of a caller's. Nothing waits for it: while it is away, events wait in Kafka and in the spools.

How an event flows: `consumer` reads it from Kafka and gives it to `audit`, which hands it to the `store`
together with its offset, and wakes those who follow. How a query flows: `servicer` tells who asks and turns
messages into our own types, `audit` keeps a reader to its own tenant, `store` finds. How a producer learns
what it may forget: `servicer` -> `audit` -> `store` again, by the rules in `services.mesh.audit_protocol`.

- `settings`, `app`, `__main__`: how the process is told, put together and started
- `stores/sqlite` with `stores/queries`: the store; `stores/memory`: the reference that tests hold it against

docs/audit.md tells the whole way of an event.
"""
