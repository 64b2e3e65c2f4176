"""Answers in several steps: tools, a planner that calls them, and a trace of the steps (docs/solve.md)."""
