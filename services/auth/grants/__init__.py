"""Tokens for proven credentials, and what a token is worth.

- `policy`: what may be granted to whom; `exchange`: a token for a credential; `tokens`: signs it
- `people`: the clients that people of identity providers become
- `own_tokens`, `introspection`: what a token of ours is worth now, and making it worth nothing
"""
