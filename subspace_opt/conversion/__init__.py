"""Turn the state of a running optimizer into the state of another spec.

In: a saved state dictionary, of this package or of torch's AdamW, Adam or SGD; a spec; the model. Out: a state dictionary that an
optimizer of the spec loads, and a report that says for every slot whether it is exact, approximate, rebuilt or reset, and why; or a
`ConversionError`.

    responses    how each slot of a pipeline answers to a constant gradient: averages of the gradient, of its squares, and their weights
    source       a saved state as averages in coordinates of known bases
    moments      averages moved from one basis to another
    bases        the selector's state of the new spec
    target       the slots of some matrices under the new spec
    parameter    the state of one parameter: views, storage, counters
    groups       parameter groups and learning rates
    report       the rows of the report and their table
    run          `convert`

Everything follows from the declarations of slots (`Slot.dims`, `holds`, `transport`) and from their answers to gradients, so kinds of
plugins are converted too.
"""

from .report import Report, ReportRow
from .run import Converted, convert
from .source import ConversionError

__all__ = ["ConversionError", "Converted", "Report", "ReportRow", "convert"]
