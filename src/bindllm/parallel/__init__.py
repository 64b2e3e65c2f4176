"""Processes and threads that work together."""
