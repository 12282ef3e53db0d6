"""Stores of the schedule."""
