"""Vision state-space backbones in timm, on one selective-scan op."""
