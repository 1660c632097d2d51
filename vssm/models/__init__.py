"""The families; importing this package registers their models in timm."""

from vssm.models import (
    a2mamba,
    efficientvmamba,
    groupmamba,
    localmamba,
    mambavision,
    mambayolo,
    msvmamba,
    plainmamba,
    vim,
    vim2,
    vmamba,
)

FAMILIES = tuple(
    module.__name__.rpartition(".")[2]
    for module in (
        vim,
        vmamba,
        plainmamba,
        localmamba,
        msvmamba,
        efficientvmamba,
        groupmamba,
        mambavision,
        a2mamba,
        vim2,
        mambayolo,
    )
)
