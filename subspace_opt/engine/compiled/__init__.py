"""Updates of stacks through `torch.compile`.

In: a stack, its step, and the backend that the options ask for. Out: `Frame.update`, compiled or plain, and the step to call it with.
"""
