"""Wrong arguments of the scan: one line that names what was expected and what came."""

import random
import re

import pytest
import torch

from fuzzing import fuzzed
from scan_cases import random_case
from vssm_kernels import available_backends, directional_scan, selective_scan, use_backend

B, L, K, D, N, R = 2, 12, 4, 6, 3, 5


def _directional(**changes) -> dict:
    arguments = {
        "x": torch.randn(B, L, D),
        "dt": torch.randn(B, L, K, R),
        "A": -torch.rand(K, D, N),
        "B": torch.randn(B, L, K, N),
        "C": torch.randn(B, L, K, N),
        "dt_weight": torch.randn(K, D, R),
        "order": torch.arange(L, dtype=torch.int32).expand(K, L),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"order": torch.zeros(2, L, dtype=torch.int32)},
            r"A must be \(2, 6, 3\) for 2 directions, 12 tokens and width 6, got \(4, 6, 3\)",
        ),
        ({"order": torch.arange(L).expand(3, K, L)}, r"order must be \(4, 12\) or \(2, 4, 12\) .*got \(3, 4, 12\)"),
        ({"order": torch.arange(L).expand(K, L).float()}, "order must hold integers, got float32"),
        ({"order": torch.arange(1, L + 1).expand(K, L)}, "order must hold tokens 0 to 11, got 1 to 12"),
        ({"order": torch.arange(-1, L - 1).expand(K, L)}, "order must hold tokens 0 to 11, got -1 to 10"),
        ({"order": torch.zeros(K, L + 1, dtype=torch.int32)}, "order has 13 steps for 12 tokens"),
        ({"x": torch.randn(B, D)}, r"x must be \(b, l, d\) or \(b, l, k, d\), got \(2, 6\)"),
        ({"x": torch.randn(B, L, 3, D)}, r"x must be \(2, 12, 6\) or \(2, 12, 4, 6\) .*got \(2, 12, 3, 6\)"),
        ({"x": torch.zeros(B, L, D, dtype=torch.int64)}, "x must be float32, bfloat16 or float16, got int64"),
        ({"dt": torch.randn(B, L, K, D)}, r"dt must be \(2, 12, 4, 5\) .*got \(2, 12, 4, 6\)"),
        ({"dt_weight": None}, r"dt must be \(2, 12, 4, 6\) .*got \(2, 12, 4, 5\)"),
        ({"A": torch.rand(K, D, N)}, r"A must not be above 0.*got 0\.\d+; pass -exp\(A_log\)"),
        ({"A": -torch.rand(K, D, N, dtype=torch.cfloat)}, "A must be real, got complex64"),
        ({"A": -torch.rand(K, D, N).bfloat16()}, "A must be float32, got bfloat16"),
        ({"B": torch.randn(B, L, K, N + 1)}, r"B must be \(2, 12, 4, 3\) or \(4, 3\) or \(4, 6, 3\)"),
        ({"C": None}, "C=None returns the state, which needs n = 1, got n = 3"),
        ({"D": torch.randn(D)}, r"D must be \(4, 6\).*got \(6,\)"),
        ({"z": torch.randn(B, L, K, D)}, r"z must be \(2, 12, 6\).*got \(2, 12, 4, 6\)"),
        ({"gap": -torch.ones(K, L, dtype=torch.int32)}, "gap must not be below 0, got -1"),
        ({"gap": torch.ones(K, L)}, "gap must hold integers, got float32"),
        ({"params": "tokens"}, "params must be 'token' or 'step', got 'tokens'"),
        ({"B": torch.randn(B, L, K, N, device="meta")}, "all tensors must be on cpu, got B on meta"),
        ({"dt": None}, "dt must be a tensor, got NoneType"),
        ({"z": [1.0]}, "z must be a tensor, got list"),
        ({"x": torch.randn(B, L, D).to_sparse()}, "x must be a dense tensor, got sparse_coo"),
        ({"softplus": None}, "softplus must be True or False, got None"),
        ({"merge": torch.ones(3, 3)}, "merge must be True or False, got Tensor"),
        ({"out_dtype": torch.int32}, "out_dtype must be float32, bfloat16, float16 or None, got torch.int32"),
    ],
)
def test_directional_scan_refuses(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        directional_scan(**_directional(**changes))
    assert "\n" not in str(caught.value)


def _selective(**changes) -> dict:
    matrix = torch.randn(B, N, L)
    arguments = {
        "u": torch.randn(B, D, L),
        "delta": torch.rand(B, D, L),
        "A": -torch.rand(D, N),
        "B": matrix,
        "C": matrix,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.randn(B, L)}, r"u must be \(b, d, l\), got \(2, 12\)"),
        ({"delta": torch.rand(B, L, D)}, r"delta must be \(2, 6, 12\) .*got \(2, 12, 6\)"),
        ({"A": -torch.rand(N, D)}, r"A must be \(6, 6\) for 6 channels and 12 tokens, got \(3, 6\)"),
        ({"A": -torch.rand(D, N, dtype=torch.cfloat)}, "A must be real"),
        ({"B": torch.randn(B, 4, N, L)}, "4 groups, which must divide the 6 channels"),
        ({"B": torch.randn(B, 2, N, L)}, r"C must be \(2, 2, 3, 12\) or \(6, 3\) .*got \(2, 3, 12\)"),
        ({"D": torch.randn(L)}, r"D must be \(6,\)"),
        ({"z": torch.randn(B, L, D)}, r"z must be \(2, 6, 12\)"),
        ({"A": torch.rand(D, N)}, "A must not be above 0"),
        ({"C": None}, "C must be a tensor, got NoneType"),
        ({"delta_softplus": 1}, "delta_softplus must be True or False, got 1"),
    ],
)
def test_selective_scan_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**_selective(**changes))


WRONG_VALUES = (None, 3, "x", [1.0], True, torch.float32, torch.int32)
WRONG_CHANGES = (
    lambda tensor, rng: tensor.to(
        rng.choice([torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
    ),
    lambda tensor, rng: tensor.to("meta"),
    lambda tensor, rng: tensor[..., None],
    lambda tensor, rng: tensor[None],
    lambda tensor, rng: tensor.reshape(-1),
    lambda tensor, rng: tensor.new_ones([max(0, size + rng.choice([-size, -1, 0, 0, 1])) for size in tensor.shape]),
    lambda tensor, rng: tensor.transpose(0, -1),
    lambda tensor, rng: -tensor,
    lambda tensor, rng: tensor.to_sparse(),
)


@pytest.mark.parametrize("backend", [name for name in ("torch", "cpu") if name in available_backends()])
@pytest.mark.parametrize(("function", "usual"), [(directional_scan, _directional), (selective_scan, _selective)])
def test_random_arguments_are_computed_or_refused_in_one_line(function, usual, backend):
    """An exception of another kind than ValueError would be raised here."""
    refused = computed = 0

    @fuzzed(400)
    def call(rng: random.Random) -> None:
        nonlocal refused, computed
        case = random_case(rng.randrange(1, 400))
        arguments = case.arguments(torch.float32) if function is directional_scan else usual()
        for name in rng.sample(sorted(arguments), rng.choice([1, 1, 2])):
            value = arguments[name]
            if isinstance(value, torch.Tensor) and rng.random() < 0.9:
                arguments[name] = rng.choice(WRONG_CHANGES)(value.detach(), rng)
            else:
                arguments[name] = rng.choice(WRONG_VALUES)
        try:
            with use_backend(backend):
                function(**arguments)
        except ValueError as error:
            refused += 1
            message = str(error)
        else:
            computed += 1
            message = f"{function.__name__}: computed"
        assert re.fullmatch(rf"({function.__name__}|scan): .+", message)

    call()
    assert refused > 100
    assert computed > 10


def test_repeated_token_is_found_on_request(monkeypatch):
    order = torch.zeros(K, L, dtype=torch.int32)
    directional_scan(**_directional(order=order))
    monkeypatch.setenv("VSSM_CHECK", "1")
    with pytest.raises(ValueError, match="distinct tokens"):
        directional_scan(**_directional(order=order))
