"""Public names: one that goes away breaks somebody's program, so it fails here first."""

import inspect
from importlib import import_module

import pytest

from vssm.cli import commands
from vssm.scan_order import BUILDERS
from vssm_kernels import directional_scan, selective_scan

# Names in one text each: a list a line would be a copy of the modules' own.
NAMES = {
    "vssm": "__version__ checkpoint create_model directional_scan list_models scan_order selective_scan",
    "vssm.checkpoint": "check load read read_whole",
    "vssm.data": "DataOptions LabelledImages Split data_id open_dataset open_digits open_images",
    "vssm.detection": "fasterrcnn maskrcnn retinanet",
    "vssm.pruning": (
        "ALIGNMENTS BlockTrace CONVOLUTIONS METHODS Policy Reduction SCORES Schedule Score TokenMap TokenReducer "
        "count_kept read_schedule write_schedule"
    ),
    "vssm.quantization": "Quantized compact count_int8 fold_hadamard quantize restore",
    "vssm.scan_order": "gather local_order restrict scan_moves scan_order scatter",
    "vssm.yolo": "MambaYoloDetector MambaYoloNeck Objects YoloHead",
    "vssm_kernels": (
        "available_backends causal_conv directional_scan directional_scan_ref neighbourhood_attention "
        "selective_scan selective_scan_ref use_backend"
    ),
}
COMMANDS = (
    "benchmark card convert demo detect doctor export info list predict prune quantize segment train tune validate "
    "visualize"
)
ORDERS = "alternating atrous bidirectional column cross cross_rest row snake window"


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_there(module):
    found, names = import_module(module), set(NAMES[module].split())
    assert not {name for name in names if not hasattr(found, name)}
    assert names - {"__version__"} <= set(getattr(found, "__all__", names))


def test_commands_and_scan_orders_are_there():
    assert not set(COMMANDS.split()) - set(commands())
    assert not set(ORDERS.split()) - set(BUILDERS)


def test_selective_scan_takes_the_arguments_of_mamba_ssm_in_their_order():
    names = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "return_last_state"]
    parameters = inspect.signature(selective_scan).parameters
    assert list(parameters) == names
    assert [parameters[name].default for name in names[5:]] == [None, None, None, False, False]


def test_directional_scan_keeps_its_arguments():
    parameters = inspect.signature(directional_scan).parameters
    assert list(parameters)[:6] == ["x", "dt", "A", "B", "C", "D"]
    options = {
        "dt_weight": None,
        "dt_bias": None,
        "softplus": True,
        "order": None,
        "params": "token",
        "chain": False,
        "gap": None,
        "z": None,
        "merge": True,
        "return_last_state": False,
        "out_dtype": None,
    }
    assert options.items() <= {name: parameter.default for name, parameter in parameters.items()}.items()
