"""Implementations of the port in `services.logging.store`: `sqlite`, and `memory` for tests."""
