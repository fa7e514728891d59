"""Looks for the placement with most of the objective: bounds first, then each phase, then the best few as a whole."""
