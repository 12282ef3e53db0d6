"""The response cache: an answer that can only come out the same again is not computed again.

`keys` says which requests those are and names them, `entries` is what is kept, `memory` and `redis_cache`
keep it, `flights` lets equal requests at the same time share one generation, `answers` is the cache as the
use case sees it.
"""
