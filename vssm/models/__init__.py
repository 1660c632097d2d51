"""The families; importing this package registers their models in timm."""

from vssm.models import efficientvmamba, localmamba, msvmamba, plainmamba, vim, vmamba

FAMILIES = tuple(
    module.__name__.rpartition(".")[2] for module in (vim, vmamba, plainmamba, localmamba, msvmamba, efficientvmamba)
)
