"""The certificate: one spec run on one process and on several ranks, with weights, state and traffic compared.

In: a `Trial`: spec, model, mesh, number of ranks, steps. Out: a `Certificate` with a difference for each parameter and the bytes of each
rank, or a `CertificateError` if a rank fails, is killed or does not end in time.
"""

from .certificate import TOLERANCES, Certificate, CertificateError, Difference, RankBytes
from .launch import certify, certify_here, torchrun_ranks
from .trial import Trial

__all__ = ["TOLERANCES", "Certificate", "CertificateError", "Difference", "RankBytes", "Trial", "certify", "certify_here", "torchrun_ranks"]
