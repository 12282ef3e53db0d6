"""The auth service: who may call, proven by short-lived signed tokens.

Owns tenants, clients, API keys and signing keys. Knows nothing of models or prompts, and stands on no
hot path: a token is verified where it is used, against the public keys that are published here.

How a request flows: `access` tells who calls which method, `servicer` turns messages into our own types,
`proof` proves a credential (`assertions` a signed one) and `exchange` gives a token for it, `policy` says
what may be granted, `tokens` signs with the key that `signing` has in force, `introspection` tells what a
token is worth (`own_tokens`) and revokes it, `administration` changes what is stored, `store` keeps it all.

- `settings`, `app`, `__main__`: how the process is told, put together and started
- `keys`: the form of API keys and client secrets; `service_secrets`: those of the four services
- `providers`: proves tokens of corporate identity providers; `people`: makes clients of those they prove
- `last_use`: when API keys were last used; `watching`: pushes revocations and the policy to the others
- `first_start`: makes the administrator, once
- `stores/sqlite`, `stores/memory`: the store
"""
