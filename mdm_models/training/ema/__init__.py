"""Averages of the weights, and averages of other widths made after the run."""
