from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from pared_bench import Record
from pared_bench.environment import Environment
from pared_bench.errors import StoreError
from pared_bench.store import ResultStore, schema, validate

RECORD = Record("dato", "ours", "time", 1.5, "ms", {"steps": 50, "shape": [2, 4]}, spread=(1.4, 1.6), samples=9)


def test_records_survive_the_round_trip_through_a_file(tmp_path: Path, environment: Environment) -> None:
    store = ResultStore(tmp_path)
    absent = Record("dato", "ours", "energy", None, "J", note="no counter")
    path = store.add("dato", [RECORD, absent], environment)
    assert path == tmp_path / "nvidia-h200" / "dato.json"
    loaded = store.load("dato")
    assert [entry.record for entry in loaded] == [RECORD, absent]
    assert all(entry.environment == environment and entry.package == "dato" for entry in loaded)


def test_each_stored_record_tells_device_versions_commit_date_and_seed(
    tmp_path: Path, environment: Environment
) -> None:
    path = ResultStore(tmp_path).add("dato", [RECORD], environment)
    stored = json.loads(path.read_text())["records"][0]["environment"]
    assert stored == {
        "device": "NVIDIA H200",
        "slug": "nvidia-h200",
        "versions": {"python": "3.12.1", "torch": "2.11.0"},
        "commit": "0123456789ab",
        "date": "2026-01-02T03:04:05Z",
        "seed": 7,
    }


def test_the_same_measurement_replaces_the_older_and_others_stay(tmp_path: Path, environment: Environment) -> None:
    store = ResultStore(tmp_path)
    other = dataclasses.replace(RECORD, settings={"steps": 20})
    store.add("dato", [RECORD, other], environment)
    newer = dataclasses.replace(RECORD, value=1.2)
    store.add("dato", [newer], dataclasses.replace(environment, seed=8))
    loaded = {entry.record.settings["steps"]: entry for entry in store.load("dato")}
    assert loaded[50].record.value == 1.2
    assert loaded[50].environment.seed == 8
    assert loaded[20].record == other
    assert loaded[20].environment.seed == 7


def test_results_of_another_store_are_merged_with_their_own_environment(
    tmp_path: Path, environment: Environment
) -> None:
    here, there = ResultStore(tmp_path / "here"), ResultStore(tmp_path / "there")
    here.add("dato", [RECORD], environment)
    later = dataclasses.replace(environment, date="2026-02-02T00:00:00Z")
    there.add("dato", [dataclasses.replace(RECORD, value=9.0)], later)
    assert here.merge(there) == [here.path("nvidia-h200", "dato")]
    (entry,) = here.load()
    assert (entry.record.value, entry.environment.date) == (9.0, later.date)


def test_a_broken_file_is_refused_with_its_place_and_left_as_it_is(tmp_path: Path, environment: Environment) -> None:
    store = ResultStore(tmp_path)
    path = store.add("dato", [RECORD], environment)
    document = json.loads(path.read_text())
    document["records"][0]["value"] = "fast"
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"records/0/value: 'fast' is not of type"):
        store.add("dato", [RECORD], environment)
    assert json.loads(path.read_text()) == document


def test_half_a_file_is_refused(tmp_path: Path, environment: Environment) -> None:
    store = ResultStore(tmp_path)
    path = store.add("dato", [RECORD], environment)
    path.write_text(path.read_text()[:40])
    with pytest.raises(StoreError, match="is not JSON"):
        store.load("dato")


def test_an_absent_value_without_a_note_breaks_the_schema(environment: Environment) -> None:
    item = {**RECORD.to_dict(), "environment": environment.to_dict(), "value": None}
    document = {"schema": "pared.results/1", "package": "dato", "device": "nvidia-h200", "records": [item]}
    with pytest.raises(StoreError, match="records/0/note"):
        validate(document)


def test_without_jsonschema_a_wrong_record_is_still_refused(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jsonschema", None)
    item = {**RECORD.to_dict(), "environment": environment.to_dict()}
    document = {"schema": "pared.results/1", "package": "dato", "device": "nvidia-h200", "records": [item]}
    validate(document)
    item["value"] = "fast"
    with pytest.raises(StoreError, match="value of 'time' must be a number"):
        validate(document)


def test_the_schema_is_itself_a_valid_schema() -> None:
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_a_package_name_never_becomes_another_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="package must be a plain file name"):
        ResultStore(tmp_path).path("nvidia-h200", name)


def test_the_store_stands_in_the_current_folder_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pared_bench.store.workspace_root", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert ResultStore().root == Path(os.getcwd()) / "benchmarks" / "results"
