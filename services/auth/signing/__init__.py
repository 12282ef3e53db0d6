"""The keys that tokens are signed with.

- `ring`: their rotation, shared by all auth processes of a database
- `master_key`: what they are encrypted with at rest; `kms`: one that a KMS holds
"""
