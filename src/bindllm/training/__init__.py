"""Training: objective, optimiser, Lightning module and report."""
