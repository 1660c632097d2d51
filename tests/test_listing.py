"""The list of models: what it says, and what of that is kept."""

import json

import pytest

import vssm
from vssm.engine import listing
from vssm.engine.listing import list_records
from vssm.engine.zoo import count_parameters, create_by_name, input_size


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder."""
    monkeypatch.setenv("VSSM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def built(monkeypatch, cache) -> list[str]:
    """Names of the models that were built to be listed."""
    names: list[str] = []
    build = listing._built
    monkeypatch.setattr(listing, "_built", lambda name: names.append(name) or build(name))
    return names


@pytest.mark.usefixtures("cache")
def test_facts_are_those_of_models_with_numbers():
    names = vssm.list_models("test_*")
    records = {record["model"]: record for record in list_records("test_*")}
    assert list(records) == names
    for name in names:
        model = create_by_name(name)
        assert round(records[name]["params_m"] * 1e6) == count_parameters(model)
        assert tuple(records[name]["input_size"]) == input_size(model)


def test_models_are_built_once(built):
    first = list_records("test_vim*")
    assert built == ["test_vim", "test_vim2"]
    assert list_records("test_vim*") == first
    assert list_records("test_vim2") == first[1:]
    list_records("test_v*")
    assert built == ["test_vim", "test_vim2", "test_vmamba"]
    assert list_records("test_vim*") == first
    assert len(built) == 3


def test_models_are_built_again_after_their_sources_have_changed(built, monkeypatch, tmp_path):
    (tmp_path / "layers").mkdir()
    (tmp_path / "models").mkdir()
    source = tmp_path / "models" / "vim.py"
    monkeypatch.setattr(vssm, "__file__", str(tmp_path / "__init__.py"))
    for text in ("depth = 2", "depth = 2", "depth = 3"):
        source.write_text(text)
        list_records("test_vmamba")
    assert built == ["test_vmamba", "test_vmamba"]


@pytest.mark.parametrize("content", ["[]", '{"models": {"test_vmamba": [1]}}', "{"])
def test_a_damaged_file_is_made_anew(cache, built, caplog, content):
    first = list_records("test_vmamba")
    file = cache / "model_facts.json"
    of = {key: value for key, value in json.loads(file.read_text()).items() if key != "models"}
    file.write_text(json.dumps({**of, **json.loads(content)}) if ":" in content else content)
    assert list_records("test_vmamba") == first
    assert len(built) == 2
    assert "model_facts.json is not what it is read for" in caplog.text
    assert list_records("test_vmamba") == first
    assert len(built) == 2


def test_a_cache_that_cannot_be_written_is_only_a_line(built, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VSSM_CACHE", str(tmp_path / "file"))
    assert list_records("test_vmamba")[0]["family"] == "vmamba"
    assert "the number of parameters of models is not kept" in caplog.text
