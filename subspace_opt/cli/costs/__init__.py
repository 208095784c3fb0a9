"""Tables of the costs of a plan and of the search for a spec that fits.

In: `Costs`, or a `Fitted`. Out: text, or plain data for JSON.
"""

from .tables import fitted_to_dict, show_costs, show_fitted

__all__ = ["fitted_to_dict", "show_costs", "show_fitted"]
