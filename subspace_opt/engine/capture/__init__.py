"""Steps that a CUDA graph can hold: counters on the device, and the reasons why a pipeline cannot be captured.

In: frames and counters. Out: the clock of a stack as tensors, or a clear error when the optimizer is built.
"""
