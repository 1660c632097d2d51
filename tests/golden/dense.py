"""Official backbones of detectors and segmentors: their records, and how `DenseBackbone` is built for them."""

from torch import nn

OFFICIAL = {
    "vmamba/vmamba_tiny_s1l8_backbone@256x192": {"model_name": "vmamba_tiny_s1l8", "out_norm": True},
    "msvmamba/msvmamba_nano_backbone@256x192": {"model_name": "msvmamba_nano", "out_norm": True},
    "efficient_vmamba/efficient_vmamba_tiny_backbone@256x192": {"model_name": "efficientvmamba_tiny", "out_norm": True},
    "vim/vim_tiny_seg@256x256": {
        "model_name": "vim_tiny_patch16_224",
        "img_size": 256,
        "class_token": False,
        "source": "mixer",
        "pyramid": True,
    },
    "local_mamba/local_vim_tiny_backbone@256x256": {
        "model_name": "localvim_tiny",
        "norm_layer": nn.LayerNorm,
        "source": "mixer",
        "out_norm": True,
    },
    "plain_mamba/plain_mamba_l1_seg@160x256": {
        "model_name": "plainmamba_l1",
        "out_norm": True,
        "final_norm": True,
        "norm_eps": 1e-6,
    },
}
