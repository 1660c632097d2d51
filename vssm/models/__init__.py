"""The families; importing this package registers their models in timm."""

from vssm.models import efficientvmamba, msvmamba, plainmamba, vim, vmamba

FAMILIES = tuple(module.__name__.rpartition(".")[2] for module in (vim, vmamba, plainmamba, msvmamba, efficientvmamba))
