"""The families; importing this package registers their models in timm."""

from vssm.models import efficientvmamba, plainmamba, vim, vmamba

FAMILIES = tuple(module.__name__.rpartition(".")[2] for module in (vim, vmamba, plainmamba, efficientvmamba))
