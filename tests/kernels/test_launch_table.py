"""Launch sizes: the heuristic, the tables of the user and of the package, and sizes forced for a trial."""

import json
import logging
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from vssm_kernels import launch_table
from vssm_kernels.launch_table import LaunchConfig, candidates, forced, key, launch_config
from vssm_kernels.scan_call import ScanCall

TUNED = LaunchConfig(steps=32, channels=64, slots=1, chunks=3, registers=200)


def _call(batch: int, directions: int, width: int, states: int, tokens: int, *, chain: bool = False) -> ScanCall:
    sets = 1 if chain else directions
    empty = lambda *shape: torch.empty(*shape, device="meta", dtype=torch.bfloat16)  # noqa: E731
    order = torch.empty(directions, tokens, device="meta", dtype=torch.int32)
    matrices = empty(batch, tokens, sets, states)
    return ScanCall(
        empty(batch, tokens, width), empty(batch, tokens, sets, 6), empty(sets, width, states), matrices, matrices,
        None, empty(sets, width, 6), None, None, order, None, True, "token", chain, True, False, None,
    )  # fmt: skip


@pytest.fixture
def table(monkeypatch, tmp_path):
    """An empty cache folder; gives the path of its table, which is read anew."""
    monkeypatch.setenv("VSSM_CACHE", str(tmp_path))
    launch_table.forget()
    yield tmp_path / "launch_table.json"
    launch_table.forget()


def test_key_says_what_sizes_depend_on():
    call = _call(100, 4, 96, 1, 3136)
    assert key(call, backward=False) == "forward b128 k4 d96 n1 t3136 r6 bfloat16"
    assert key(_call(2, 3, 8, 4, 49, chain=True), backward=True) == "backward b2 k1 d8 n4 t147 r6 bfloat16"


@pytest.mark.usefixtures("table")
def test_sequences_are_cut_only_where_they_are_few():
    assert launch_config(_call(128, 4, 96, 1, 3136), backward=False).chunks == 1
    few = launch_config(_call(32, 4, 96, 16, 3136), backward=False)
    assert (few.slots, few.chunks) == (4, 1)  # a few warps that share states are enough
    assert launch_config(_call(32, 4, 96, 16, 3136), backward=True).chunks == 4
    for states in (1, 16):
        fewer = launch_config(_call(8, 1, 384, states, 6085), backward=False)
        assert (fewer.slots, fewer.chunks) == (1, 16)  # 8 · 12 programs, of which the GPU holds 1584
        assert launch_config(_call(8, 1, 384, states, 6085), backward=True).chunks == 11  # or 1056
    assert launch_config(_call(1, 1, 16, 16, 130), backward=False).chunks == 1  # no chunk of a few steps


def test_candidates_start_with_the_usual():
    spelled = key(_call(8, 1, 384, 16, 6085), backward=False)
    found = candidates(spelled)
    assert found[0] == launch_table.heuristic(launch_table._parsed(spelled))
    assert len(set(found)) == len(found) > 10
    with pytest.raises(ValueError, match="expected a key such as 'forward b8"):
        candidates("forward b8")


def test_forced_sizes_hold_for_a_block():
    call = _call(2, 1, 8, 4, 64)
    with forced(TUNED):
        assert launch_config(call, backward=True) == TUNED
    assert launch_config(call, backward=True) != TUNED


def test_users_table_is_used_for_its_key(table):
    call = _call(2, 1, 8, 4, 64)
    row = asdict(TUNED) | {"ms": 0.1, "version": "0"}
    table.write_text(json.dumps({"meta": {key(call, backward=False): row}, "other": {}}))
    assert launch_config(call, backward=False) == TUNED
    assert launch_config(call, backward=True) != TUNED


@pytest.fixture
def shipped(monkeypatch, table):
    """The path of another table in place of that of the package."""
    path = table.with_name("shipped.json")
    monkeypatch.setattr(launch_table, "shipped_table_path", lambda: path)
    return path


def _rows(call: ScanCall, chunks: int, **facts: str) -> dict:
    """A row for the forward pass of a call."""
    return {key(call, backward=False): asdict(TUNED) | {"chunks": chunks, **facts}}


def test_users_rows_come_before_those_of_the_package(table, shipped):
    ours, both, neither = (_call(2, 1, 8, 4, tokens) for tokens in (64, 65, 66))
    shipped.write_text(json.dumps({"meta": _rows(ours, 3) | _rows(both, 3)}))
    table.write_text(json.dumps({"meta": _rows(both, 4)}))
    assert launch_config(ours, backward=False).chunks == 3
    assert launch_config(both, backward=False).chunks == 4
    assert launch_config(neither, backward=False) == launch_table.heuristic(
        launch_table._shape_of(neither, backward=False)
    )


def test_rows_serve_other_devices_of_the_same_part(monkeypatch, shipped):
    monkeypatch.setattr(launch_table, "device_part", lambda device: "sm_90 132")
    own, same, other, unknown = (_call(2, 1, 8, 4, tokens) for tokens in (64, 65, 66, 67))
    rows = {
        "meta": _rows(own, 3, part="sm_90 132"),
        "NVIDIA H100": _rows(own, 5, part="sm_90 132") | _rows(same, 5, part="sm_90 132"),
        "NVIDIA H100 PCIe": _rows(other, 7, part="sm_90 114") | _rows(same, 7) | _rows(unknown, 7),
    }
    shipped.write_text(json.dumps(rows))
    assert launch_config(own, backward=False).chunks == 3
    assert launch_config(same, backward=False).chunks == 5
    assert launch_config(other, backward=False).chunks == 1  # of the heuristic
    assert launch_config(unknown, backward=False).chunks == 1


def test_parts_are_architectures_and_multiprocessors(monkeypatch):
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    assert launch_table.device_part.__wrapped__(torch.device("cuda", 0)) == "sm_90 132"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch_table.device_part.__wrapped__(torch.device("cuda", 0)) == "gfx942 132"


def test_rows_of_the_package_are_sizes_that_are_worth_a_trial():
    for device, rows in json.loads(launch_table.shipped_table_path().read_text(encoding="utf-8")).items():
        for spelled, row in rows.items():
            sizes = LaunchConfig(**{name: row[name] for name in asdict(TUNED)})
            assert sizes in candidates(spelled), (device, spelled)
            assert row["part"]
            assert row["ms"] > 0


@pytest.mark.parametrize("content", ["not json", "[]", '{"meta": {"a": {"steps": 16}}}', '{"meta": {"a": 1}}'])
def test_a_file_that_is_no_table_is_one_warning(table, caplog, content):
    table.write_text(content)
    with caplog.at_level(logging.WARNING, logger="vssm"):
        for _ in range(2):
            assert launch_config(_call(2, 1, 8, 4, 64), backward=False).steps == 16
    assert [record.getMessage().split(" is ")[0] for record in caplog.records] == [str(table)]
