"""Commands that train many times: `compare`, and `search` for a new pipeline.

In: optimizers and a problem. Out: stored runs, a report, a table.
"""
