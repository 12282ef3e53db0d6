"""Files of tenants: what they upload for batches, and what batches give them.

`ports` says what is needed of a store (`folder` and `s3` are the two), `sealing` how a file is sealed for
its tenant, `store` what a file is and how many there may be, `upload` reads a form as it comes, `http` has
the routes.
"""
