"""Training: the Lightning module, optimizer, saved states, strategies for several devices, and alignment."""
