"""Evaluation of trained models on held-out rows, and zero-shot evaluation of encoders."""
