"""Token reduction: dropping and merging tokens between the blocks of any backbone that allows it."""

from vssm.pruning.policies import METHODS, SCORES, BlockTrace, Policy, Score
from vssm.pruning.reducer import ALIGNMENTS, CONVOLUTIONS, TokenReducer, count_kept
from vssm.pruning.schedule import Schedule, read_schedule, write_schedule
from vssm.pruning.token_map import Reduction, TokenMap

__all__ = [
    "ALIGNMENTS",
    "CONVOLUTIONS",
    "METHODS",
    "SCORES",
    "BlockTrace",
    "Policy",
    "Reduction",
    "Schedule",
    "Score",
    "TokenMap",
    "TokenReducer",
    "count_kept",
    "read_schedule",
    "write_schedule",
]
