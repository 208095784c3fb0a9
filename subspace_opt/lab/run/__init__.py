"""One training run: the loop, its checkpoints, its events, its measurements.

In: a `TrainConfig`, and optionally a corpus, a callback for events and a function that makes the optimizer. Out: events during the run, a
`Result` at the end, and, if the config names a folder, a checkpoint and `log.jsonl` in it.
"""
