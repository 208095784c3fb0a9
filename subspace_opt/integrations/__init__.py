"""One module for each trainer or library that optimizers are used in. Nothing here is imported unless a user imports it.

In:  a trainer's arguments, model or registry, and a spec.
Out: a `SubspaceOptimizer` in the form that the trainer wants: a factory, a container, a registry entry, a mixin.
"""
