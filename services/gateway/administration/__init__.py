"""AdminService at the edge: audited as every request, and forwarded to auth with whoever asks.

`servicer` is what callers see, `clients` the way to auth, which decides what they may do.
"""
