"""The selective scan of vision state-space models: one op, two public faces, several implementations."""

from vssm_kernels.backend import available_backends, use_backend
from vssm_kernels.causal_conv import causal_conv
from vssm_kernels.interface import directional_scan, selective_scan
from vssm_kernels.neighbourhood_attention import neighbourhood_attention
from vssm_kernels.reference import directional_scan_ref, selective_scan_ref

__all__ = [
    "available_backends",
    "causal_conv",
    "directional_scan",
    "directional_scan_ref",
    "neighbourhood_attention",
    "selective_scan",
    "selective_scan_ref",
    "use_backend",
]
