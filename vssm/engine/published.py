"""Figures that papers print about the models, to stand beside what is counted here."""

from typing import NamedTuple


class Published(NamedTuple):
    """What a paper prints about a model at its default input size.

    Args:
        params_m: Parameters, in millions.
        gflops: Its "FLOPs", in thousand millions; ``None`` where none are printed.
        source: Where the numbers stand.
    """

    params_m: float
    gflops: float | None
    source: str


_VIM = "Zhu et al., 2024, arXiv:2401.09417"
_VMAMBA = "README of MzeroMiko/VMamba; Liu et al., 2024, arXiv:2401.10166"
_VIM_FLOPS = f"{_VIM}; FLOPs after the README of LocalMamba, arXiv:2403.09338"
_PLAINMAMBA = "Yang et al., 2024, arXiv:2403.17695; parameters without the classifier"
_MSVMAMBA = "README of YuHengsss/MSVMamba; Shi et al., 2024, arXiv:2405.14174"
_EFFICIENTVMAMBA = "README of TerryPei/EfficientVMamba; Pei et al., 2024, arXiv:2403.09977"
_LOCALMAMBA = "Huang et al., 2024, arXiv:2403.09338"
_VIM2 = "Behrouz et al., 2024, arXiv:2403.19888"
_A2MAMBA = "README of LMMMEng/A2Mamba; Lou et al., 2025, arXiv:2507.16624"
_GROUPMAMBA = "README of Amshaker/GroupMamba; Shaker et al., 2024, arXiv:2407.13772"
_MAMBAVISION = "README of NVlabs/MambaVision; Hatamizadeh and Kautz, 2024, arXiv:2407.08083"

PUBLISHED = {
    "a2mamba_nano": Published(4, 0.8, _A2MAMBA),
    "a2mamba_tiny": Published(15, 2.7, _A2MAMBA),
    "a2mamba_small": Published(31, 5.4, _A2MAMBA),
    "a2mamba_base": Published(51, 10.7, _A2MAMBA),
    "a2mamba_large": Published(95, 17.4, _A2MAMBA),
    "efficientvmamba_tiny": Published(6, 0.8, _EFFICIENTVMAMBA),
    "efficientvmamba_small": Published(11, 1.3, _EFFICIENTVMAMBA),
    "efficientvmamba_base": Published(33, 4.0, _EFFICIENTVMAMBA),
    "groupmamba_tiny": Published(23, 4.5, _GROUPMAMBA),
    "groupmamba_small": Published(34, 7.0, _GROUPMAMBA),
    "groupmamba_base": Published(57, 14, _GROUPMAMBA),
    "mambavision_tiny": Published(31.8, 4.4, _MAMBAVISION),
    "mambavision_tiny2": Published(35.1, 5.1, _MAMBAVISION),
    "mambavision_small": Published(50.1, 7.5, _MAMBAVISION),
    "mambavision_base": Published(97.7, 15.0, _MAMBAVISION),
    "mambavision_large": Published(227.9, 34.9, _MAMBAVISION),
    "mambavision_large2": Published(241.5, 37.5, _MAMBAVISION),
    "msvmamba_nano": Published(7, 0.9, _MSVMAMBA),
    "msvmamba_micro": Published(12, 1.5, _MSVMAMBA),
    "msvmamba_tiny": Published(33, 4.6, _MSVMAMBA),
    "msvmamba_tiny_v3": Published(32, 5.1, _MSVMAMBA),
    "msvmamba_small_v3": Published(50, 8.8, _MSVMAMBA),
    "localvim_tiny": Published(8, 1.5, _LOCALMAMBA),
    "localvim_tiny_class_token": Published(8, 1.5, _LOCALMAMBA),
    "localvim_small": Published(28, 4.8, _LOCALMAMBA),
    "localvmamba_tiny": Published(26, 5.7, _LOCALMAMBA),
    "localvmamba_small": Published(50, 11.4, _LOCALMAMBA),
    "plainmamba_l1": Published(7.3, 3.0, _PLAINMAMBA),
    "plainmamba_l2": Published(25.7, 8.1, _PLAINMAMBA),
    "plainmamba_l3": Published(50.5, 14.4, _PLAINMAMBA),
    "vim2_tiny": Published(20, None, _VIM2),
    "vim2_small": Published(43, None, _VIM2),
    "vim2_base": Published(74, None, _VIM2),
    "vim_tiny_patch16_224": Published(7, 1.5, _VIM_FLOPS),
    "vim_tiny_patch16_stride8_224": Published(7, None, _VIM),
    "vim_small_patch16_224": Published(26, 5.1, _VIM_FLOPS),
    "vim_small_patch16_stride8_224": Published(26, None, _VIM),
    "vim_base_patch16_224": Published(98, None, _VIM),
    "vmamba_tiny_s1l8": Published(30, 4.9, _VMAMBA),
    "vmamba_tiny_s2l5": Published(31, 4.9, _VMAMBA),
    "vmamba_small_s2l15": Published(50, 8.7, _VMAMBA),
    "vmamba_small_s1l20": Published(49, 8.6, _VMAMBA),
    "vmamba_base_s2l15": Published(89, 15.4, _VMAMBA),
    "vmamba_base_s1l20": Published(87, 15.2, _VMAMBA),
    "vmamba_tiny_v0": Published(23, 5.6, _VMAMBA),
    "vmamba_small_v0": Published(44, 11.2, _VMAMBA),
    "vmamba_base_v0": Published(76, 18.0, _VMAMBA),
}
