"""CoMERA for subspace_opt: tensor-train layers whose ranks shrink during training (arXiv:2405.14377)."""

from .contraction import Path, cheapest, contract
from .factors import FactorError, factorize
from .layers import TTEmbedding, TTLinear
from .objective import RankObjective, Sizes
from .pruning import Pruned, prune
from .replace import Tensorized, tensorize
from .state import PruneError
from .trains import TensorTrain

__all__ = [
    "FactorError",
    "Path",
    "PruneError",
    "Pruned",
    "RankObjective",
    "Sizes",
    "TTEmbedding",
    "TTLinear",
    "TensorTrain",
    "Tensorized",
    "cheapest",
    "contract",
    "factorize",
    "prune",
    "tensorize",
]
