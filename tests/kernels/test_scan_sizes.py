"""Each of 40 argument combinations with 13 sizes, which share its compiled kernels: 520 calls on a GPU."""

import pytest
import torch

from scan_cases import TOLERANCE, outputs_and_gradients, random_case, relative_error
from vssm_kernels import directional_scan, directional_scan_ref, use_backend
from vssm_kernels.launch_table import LaunchConfig, forced

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="test_scan.py has what an interpreter can do in a minute"),
]
CONFIGS = [
    LaunchConfig(steps=16, channels=32, slots=1, chunks=1, registers=255),
    LaunchConfig(steps=16, channels=32, slots=4, chunks=1, registers=128),
    LaunchConfig(steps=16, channels=32, slots=1, chunks=3, registers=168),
    LaunchConfig(steps=32, channels=32, slots=1, chunks=1, registers=255),
    LaunchConfig(steps=16, channels=32, slots=16, chunks=2, registers=128),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("variant", range(40))
def test_sizes(variant, device):
    for sizes in range(13):
        case = random_case(variant, sizes)
        arguments = case.arguments(case.dtype, device)
        with use_backend("triton"), forced(CONFIGS[variant % len(CONFIGS)]):
            results = outputs_and_gradients(directional_scan, arguments)
        expected = outputs_and_gradients(directional_scan_ref, case.arguments(torch.float64))
        for name, reference in expected.items():
            error = relative_error(results[name], reference)
            dtype = case.dtype_of(name, arguments)
            assert error < TOLERANCE[dtype], f"sizes {sizes}: {name} is off by {error:.1e} in {dtype}: {case.options}"
