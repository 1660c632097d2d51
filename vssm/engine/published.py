"""Figures that papers print about the models, to stand beside what is counted here."""

from typing import NamedTuple


class Published(NamedTuple):
    """What a paper prints about a model at its default input size.

    Args:
        params_m: Parameters, in millions.
        gflops: Its "FLOPs", in thousand millions; ``None`` where none are printed.
        top1: Accuracy on ImageNet-1k, in percent, of the first guess.
        source: Where the numbers stand.
        top5: That of the first five guesses; ``None`` where it is not printed.
    """

    params_m: float
    gflops: float | None
    top1: float
    source: str
    top5: float | None = None


class PublishedDetector(NamedTuple):
    """What a paper prints about a detector at 640 × 640 pixels.

    Args:
        params_m: Parameters, in millions.
        gflops: Its "FLOPs", in thousand millions.
        ap: Box AP on COCO val2017, in percent, over overlaps from 50 to 95 %.
        ap50: At an overlap of 50 %.
        ap75: At an overlap of 75 %.
        source: Where the numbers stand.
    """

    params_m: float
    gflops: float
    ap: float
    ap50: float
    ap75: float
    source: str


_VIM = "README of hustvl/Vim; Zhu et al., 2024, arXiv:2401.09417"
_VMAMBA = "README of MzeroMiko/VMamba; Liu et al., 2024, arXiv:2401.10166"
_VIM_FLOPS = f"{_VIM}; FLOPs after the README of LocalMamba, arXiv:2403.09338"
_PLAINMAMBA = (
    "README of ChenhongyiYang/PlainMamba; Yang et al., 2024, arXiv:2403.17695; parameters without the classifier"
)
_MSVMAMBA = "README of YuHengsss/MSVMamba; Shi et al., 2024, arXiv:2405.14174"
_EFFICIENTVMAMBA = "README of TerryPei/EfficientVMamba; Pei et al., 2024, arXiv:2403.09977"
_LOCALMAMBA = "README of hunto/LocalMamba; Huang et al., 2024, arXiv:2403.09338"
_VIM2 = "Behrouz et al., 2024, arXiv:2403.19888"
_A2MAMBA = "README of LMMMEng/A2Mamba; Lou et al., 2025, arXiv:2507.16624"
_GROUPMAMBA = "README of Amshaker/GroupMamba; Shaker et al., 2024, arXiv:2407.13772"
_MAMBAYOLO = "README of HZAI-ZJNU/Mamba-YOLO; Wang et al., 2024, arXiv:2406.05835"
_MAMBAVISION = "README of NVlabs/MambaVision; Hatamizadeh and Kautz, 2024, arXiv:2407.08083"

PUBLISHED = {
    "a2mamba_nano": Published(4, 0.8, 78.7, _A2MAMBA),
    "a2mamba_tiny": Published(15, 2.7, 83.0, _A2MAMBA),
    "a2mamba_small": Published(31, 5.4, 84.7, _A2MAMBA),
    "a2mamba_base": Published(51, 10.7, 85.7, _A2MAMBA),
    "a2mamba_large": Published(95, 17.4, 86.1, _A2MAMBA),
    "efficientvmamba_tiny": Published(6, 0.8, 76.5, _EFFICIENTVMAMBA),
    "efficientvmamba_small": Published(11, 1.3, 78.7, _EFFICIENTVMAMBA),
    "efficientvmamba_base": Published(33, 4.0, 81.8, _EFFICIENTVMAMBA),
    "groupmamba_tiny": Published(23, 4.5, 83.3, _GROUPMAMBA),
    "groupmamba_small": Published(34, 7.0, 83.9, _GROUPMAMBA),
    "groupmamba_base": Published(57, 14, 84.5, _GROUPMAMBA),
    "mambavision_tiny": Published(31.8, 4.4, 82.3, _MAMBAVISION),
    "mambavision_tiny2": Published(35.1, 5.1, 82.7, _MAMBAVISION),
    "mambavision_small": Published(50.1, 7.5, 83.3, _MAMBAVISION),
    "mambavision_base": Published(97.7, 15.0, 84.2, _MAMBAVISION),
    "mambavision_large": Published(227.9, 34.9, 85.0, _MAMBAVISION),
    "mambavision_large2": Published(241.5, 37.5, 85.3, _MAMBAVISION),
    "msvmamba_nano": Published(7, 0.9, 77.3, _MSVMAMBA),
    "msvmamba_micro": Published(12, 1.5, 79.8, _MSVMAMBA),
    "msvmamba_tiny": Published(33, 4.6, 82.8, _MSVMAMBA),
    "msvmamba_tiny_v3": Published(32, 5.1, 83.0, _MSVMAMBA),
    "msvmamba_small_v3": Published(50, 8.8, 84.1, _MSVMAMBA),
    "localvim_tiny": Published(8, 1.5, 76.2, _LOCALMAMBA),
    "localvim_tiny_class_token": Published(8, 1.5, 77.8, _LOCALMAMBA),
    "localvim_small": Published(28, 4.8, 81.1, _LOCALMAMBA),
    "localvmamba_tiny": Published(26, 5.7, 82.7, _LOCALMAMBA),
    "localvmamba_small": Published(50, 11.4, 83.7, _LOCALMAMBA),
    "plainmamba_l1": Published(7.3, 3.0, 77.9, _PLAINMAMBA),
    "plainmamba_l2": Published(25.7, 8.1, 81.6, _PLAINMAMBA),
    "plainmamba_l3": Published(50.5, 14.4, 82.3, _PLAINMAMBA),
    "vim2_tiny": Published(20, None, 82.7, _VIM2),
    "vim2_small": Published(43, None, 83.7, _VIM2),
    "vim2_base": Published(74, None, 83.9, _VIM2),
    "vim_tiny_patch16_224": Published(7, 1.5, 76.1, _VIM_FLOPS, top5=93.0),
    "vim_tiny_patch16_stride8_224": Published(7, None, 78.3, _VIM, top5=94.2),
    "vim_small_patch16_224": Published(26, 5.1, 80.5, _VIM_FLOPS, top5=95.1),
    "vim_small_patch16_stride8_224": Published(26, None, 81.6, _VIM, top5=95.4),
    "vim_base_patch16_224": Published(98, None, 81.9, _VIM, top5=95.8),
    "vmamba_tiny_s1l8": Published(30, 4.9, 82.6, _VMAMBA),
    "vmamba_tiny_s2l5": Published(31, 4.9, 82.5, _VMAMBA),
    "vmamba_small_s2l15": Published(50, 8.7, 83.6, _VMAMBA),
    "vmamba_small_s1l20": Published(49, 8.6, 83.3, _VMAMBA),
    "vmamba_base_s2l15": Published(89, 15.4, 83.9, _VMAMBA),
    "vmamba_base_s1l20": Published(87, 15.2, 83.8, _VMAMBA),
    "vmamba_tiny_v0": Published(23, 5.6, 82.2, _VMAMBA),
    "vmamba_small_v0": Published(44, 11.2, 83.5, _VMAMBA),
    "vmamba_base_v0": Published(76, 18.0, 83.7, _VMAMBA),
}

# By the name of the backbone.
PUBLISHED_DETECTORS = {
    "mambayolo_tiny": PublishedDetector(5.8, 13.2, 44.5, 61.2, 48.2, _MAMBAYOLO),
    "mambayolo_base": PublishedDetector(19.1, 45.4, 49.1, 66.5, 53.5, _MAMBAYOLO),
    "mambayolo_large": PublishedDetector(57.6, 156.2, 52.1, 69.8, 56.5, _MAMBAYOLO),
}
