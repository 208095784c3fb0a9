"""One step in one process: from gradients to weights.

In: the parameters that have a gradient, with their rows of the plan and their state. Out: updated weights and state, in place.
Only this room knows of devices, dtypes of parameters and storage.
"""
