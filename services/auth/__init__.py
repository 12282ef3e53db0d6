"""The auth service: who may call, proven by short-lived signed tokens.

Owns tenants, clients, API keys and signing keys. Knows nothing of models or prompts, and stands on no
hot path: a token is verified where it is used, against the public keys that are published here.

How a request flows: `access` tells who calls which method, `servicer` turns messages into our own types,
`credentials` proves who it is and `grants` gives a token for that, signed with a key of `signing`;
`administration` changes what is stored, `store` keeps it all, and `watching` tells the other services.

- `settings`, `app`, `__main__`: how the process is told, put together and started
- `providers`: proves tokens of corporate identity providers
- `guard`: slows down who proves badly
- `first_start`: makes the administrator, once
- `stores`: the store on SQLite and PostgreSQL, and one in memory
"""
