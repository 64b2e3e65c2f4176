"""Measuring what a trained model says about held-out media."""
