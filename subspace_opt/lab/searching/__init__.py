"""Search a space of pipelines for one that beats the presets within budgets of state bytes and step time.

In: a space, a problem, budgets. Out: every trial, the Pareto front, and a winner only if a confirmation on another problem holds.

    space        parts by place, and the candidates that they form
    halving      rungs and survivors, as pure functions
    run          the search and its confirmation
"""
