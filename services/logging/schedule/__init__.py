"""The durable schedule of jobs: what waits, who runs it, what was given up.

Owns when a job runs and how it ends; it cannot read what is in one. How a job flows: the consumer hands what
it read from Kafka to `schedule`, which gives it to the `store` and wakes who waits for work; a gateway's
worker claims, beats and reports through `servicer`. Each method of a store is one transaction of
`transactions`, over the `Rows` that the store offers; what becomes of a job in it says `machine`, which knows
no store, no clock and no chance but what it is handed.

- `machine`: job + event -> job, effects; `job` has the words for them
- `store`: the port; `transactions` over `Rows`; `stores/sqlite` and `stores/memory`
- `schedule`: the rules around it: who sees what, waiting for work, watching, sweeping
- `servicer`: gRPC

docs/decisions/0080-jobs.md tells the whole way of a job.
"""
