"""Corporate identity providers: whose token is this, and may it be exchanged for one of ours?

An administrator names a provider by its issuer (OpenID Connect Discovery 1.0); nothing but that address,
and the key set that its own document names, is ever fetched. A token chooses among the configured issuers,
and can cause no request to anywhere else.

How a token is proven: `foreign_token` reads its form, the store knows its issuer or not, `discovery` has
the issuer's keys, by way of `fetching`, `signature` verifies with one of them, and `claims` says whether
it is meant for us, still holds, and which roles its holder gets. `provider_tokens` does these in turn.
"""
