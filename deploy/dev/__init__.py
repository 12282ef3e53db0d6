"""The mesh on one machine: a real single-node Kafka and the four services, each in its own process.

- `state`: the state folder, its secrets, its lock; what is wrong with it, in a sentence
- `ports`: which ports there are, and whether they are free
- `processes`, `guard`: a child process with its log, which ends when this process ends
- `kafka_jars`, `broker`: Kafka from packages, started and stopped
- `certs`: development certificates
- `environment`: what each service is told, as environment variables
- `readiness`: waits until a service says that it serves
- `mesh`: all of it together, started and drained in order
- `demo`: one request, from the client to its audit record

`python -m deploy.dev` is the command; the tests' `tests.framework` uses the same parts. What a service does,
and how it drains, is the service's own business: here it is only started, watched and told to stop.
"""
