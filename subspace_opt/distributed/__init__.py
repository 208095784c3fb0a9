"""The same step on many ranks.

In: parameters that several ranks hold (FSDP2, tensor parallel, DDP). Out: the weights that one process would have; ranks divide work and
state. Placement is pure; only `exchange` imports `torch.distributed`. Nothing here is imported before a parameter is shared.
"""
