"""Implementations of the port in `services.auth.store`."""
