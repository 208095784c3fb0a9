"""Fair comparisons: every optimizer tuned as well as every other, compared at the end of a full schedule, paired by seed.

In: specs, a problem, seeds. Out: records of runs, a `Study`, and a report.

    records             one finished run; a whole study
    statistics, words   intervals over seeds, paired differences, costs; the same in sentences
    table, summary      rows for page and console
    report              the page, CSV and JSON
"""
