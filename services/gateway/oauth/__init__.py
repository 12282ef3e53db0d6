"""The OAuth2 edge: tokens for clients of the platform, in the standards' own form.

Auth does the work; here are its methods on gRPC (`servicer`) and the standards' endpoints on HTTP (`http`).
They are open methods: the request itself holds the credential. `forms` reads what clients send, `answers`
has metadata, answers and errors, `ports` what is asked of auth and `clients` how; `outcomes` writes the
audit record once auth has said whose request it was.
"""
