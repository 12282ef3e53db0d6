"""Alembic's environment and the revisions, which are never changed, only added to."""
