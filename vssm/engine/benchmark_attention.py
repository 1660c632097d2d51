"""Speed and memory of neighbourhood attention alone."""

from collections.abc import Sequence

from vssm.engine.attention_subjects import AttentionShape, attention_subjects, log_left_out
from vssm.engine.benchmark_op import OpSetting, benchmark_subjects


def benchmark_attention(shapes: Sequence[AttentionShape], setting: OpSetting) -> list[dict]:
    """Times neighbourhood attention, and rivals, on the same random numbers, in the way of `benchmark_op`.

    Args:
        shapes: Sizes.
        setting: How to measure; ``against`` has names of `attention_subjects.RIVALS`.

    Returns:
        One record per shape and subject: ``op``, the sizes, and what else records of `benchmark_op` have.
    """
    log_left_out(setting.against)
    return benchmark_subjects(shapes, attention_subjects, setting, compiled=["neighbourhood_attention"])
