"""The report of a study: one HTML page that needs no network and no JavaScript, and the numbers as CSV and JSON beside it.

In: a `Study`. Out: `report.html`, `results.csv`, `results.json`.

    page         the page: sections, template, files
    curves       loss against updates, tokens, time; captured energy
    pareto       loss against memory and step time
    sweeps       what the sweeps tried
    specs        YAML of each spec, and the part that all share
    protocol     how the study was made, and its limits
    numbers      CSV and JSON
    svg          matplotlib's pictures in the colours of the page
"""

from .page import write_report

__all__ = ["write_report"]
