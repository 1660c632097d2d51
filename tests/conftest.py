"""Fixtures of all tests: fixed seeds, and every device that is there."""

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory):
    """What the user has in theirs changes no test, and no test adds to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VSSM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """Every device of this machine in turn, with matrix products in full float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
