"""One optimizer step on many ranks.

In: parameters that several ranks hold (FSDP2, tensor parallel, DDP) and this rank's shards of their gradients. Out: the weights that one
process would compute; the ranks divide work and state. Only `exchange` imports `torch.distributed`; `boxes`, `parts`, `placement` and
`meshes` are pure functions of shapes.

    boxes         index ranges of tensors, and the shards that a mesh makes
    parts         the matrices that one rank computes of a parameter, with their own plan and state
    placement     who owns which part, which messages a step sends, how many bytes a rank holds and sends
    meshes        the same for meshes that do not exist, for the planner
    exchange      process groups, shards of DTensors, all-to-all, tensors of checkpoints
    shards        one sharded parameter in one step
    coordinates   low-rank updates that send only coordinates between refreshes
    buckets       gradients to owners and updates back, some parameters at a time
    checkpoint    state as DTensors, and back from any placements
    step          the whole step: agree on gradients, exchange, compute, update
"""
