"""Steps without a wait: flags of non-finite gradients stay on the device and gate the update there; the host reads them at the next step.

In: the gradients of a step. Out: a gate for each parameter, later an error or a count for the user. `gate` selects between new and old
numbers, `watch` keeps the flags until they are read.
"""
