"""Administration: tenants, clients, keys, roles, plans, address rules and identity providers.

How a change flows: `servicer` reads the messages by `request`, `callers` looks up who asks, `service` (one
resource) or `apply` (the whole configuration) plans the writes, `changeset` checks them against what there
will be after all of them (`authority`: who may do what; `checking`: what a resource must be), adds the
revocations that `revoking` says they need, and the store commits all of it or nothing.

`resources` knows the fields, `world` reads, `paging` makes page tokens, `explain` answers ExplainDecision.
"""
