"""Trajectories that the authors' code wrote in float64, and the optimizers that must reproduce them.

In: a file of `tests/golden`. Out: the largest distance of a weight from the recorded one, as a part of the distance it moved.
"""
