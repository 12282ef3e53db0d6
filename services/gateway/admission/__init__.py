"""Who may begin now, who waits, and who is told at once that it makes no sense to wait.

Each model has a pool of places, as many as its replicas take at once. A request takes places (`permits`), or
waits for them in a short queue (`pool`): by class, then fairly between tenants (`fair_queue`). A request
that cannot be served in time is refused before any work is done for it. `claim` is what a request asks for.
"""
