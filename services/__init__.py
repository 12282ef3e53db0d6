"""The four processes of llmos and the wire that they share.

`mesh` is that wire and holds no business rules. `gateway`, `auth`, `inference` and `logging` are the
processes, each started by `python -m services.NAME` from the root of the tree; none imports another.
This file keeps `services.logging` from shadowing the standard library's `logging`.
"""
