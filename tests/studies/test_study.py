"""Studies: what a file stands for, what is wrong with one, and committed records, which count as finished runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from studies.file import _MARKS
from studies.study import is_study, load_study
from studies.study import main as study_command
from tests.helpers import ROOT, SMALL
from tests.studies.conftest import start, starts, write_study
from utils.config import Config, config_from_dict
from utils.errors import UserError
from utils.runs.files import write_sealed_json

SHIPPED = sorted((ROOT / "exps" / "studies").glob("*.json"))


def refused(path: Path, overrides: tuple[str, ...] = (), **flags) -> str:
    with pytest.raises(UserError) as caught:
        load_study(path, overrides, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what a file stands for


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_study_loads_and_is_strict_json(path: Path) -> None:
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert is_study(path)
    study = load_study(path)
    assert study.filepath == Path(f"runs/studies/{path.stem}")
    for run in study.runs():
        given = {key: value for key, value in run.changes.items() if value is not None}
        assert json.dumps(given) == json.dumps({key: getattr(run.config, key) for key in given})


def test_no_shipped_config_is_taken_for_a_study() -> None:
    assert SHIPPED and not set(_MARKS) & set(Config.model_fields)
    assert not any(is_study(path) for path in (ROOT / "exps").glob("*.json"))


def test_the_grid_of_the_gate_is_every_combination() -> None:
    runs = load_study(ROOT / "exps" / "studies" / "gumbel_grid.json").runs()
    points = {(run.config.lambda_sparsity, run.config.growth_threshold) for run in runs}
    assert points == {(weight, threshold) for weight in (0.001, 0.01, 0.05, 0.1) for threshold in (0.05, 0.1, 0.15)}
    assert len({run.folder for run in runs}) == len(runs) == len(points) * len({run.seed for run in runs})


def test_variants_times_grid_times_seeds(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "other.json").write_text(json.dumps({**SMALL, "rank": 3}))
    path = write_study(
        tmp_path / "sub", variants={"sdlora": {"gate": "none", "gate_lr": None, "_comment_a": 1}, "_comment": "x",
                                    "other": {"base": "../other.json"}},
        grid={"epochs": [1, 2], "batch_size": [16], "_comment": []}, results="../records")
    study = load_study(path)
    runs = study.runs()
    assert [(run.name, run.seed) for run in runs] == [
        (f"{variant},epochs={epochs},batch_size=16", seed)
        for seed in (1, 2) for variant in ("sdlora", "other") for epochs in (1, 2)]
    first = runs[0]
    assert (first.variant, dict(first.changes)) == ("sdlora", {"gate": "none", "gate_lr": None, "epochs": 1, "batch_size": 16})
    assert (first.config.gate, first.config.epochs, first.config.batch_size) == ("none", 1, 16)
    assert first.folder == tmp_path / "sub" / "runs" / first.name / "seed_1" == Path(first.config.filepath)
    assert first.recorded == tmp_path / "records" / first.name / "seed_1.json"
    assert {run.config.rank for run in runs if run.variant == "other"} == {3}
    assert {run.config.rank for run in runs if run.variant == "sdlora"} == {4}
    assert all(run.config.seed == [run.seed] for run in runs) and study.jobs == 1
    assert (study.name, study.results) == ("study", tmp_path / "records")


def test_a_variant_has_a_grid_of_its_own(tmp_path: Path) -> None:
    path = write_study(tmp_path, seed=5, grid={"epochs": [1, 2]}, variants={
        "sdlora": {"gate": "none", "gate_lr": None},
        "gumbel": {"rank": 2, "grid": {"lambda_sparsity": [0.1, 0.2], "_comment": "its knob"}}})
    assert [run.name for run in load_study(path).runs()] == [
        "sdlora,epochs=1", "sdlora,epochs=2", *(f"gumbel,epochs={epochs},lambda_sparsity={weight}"
                                                for epochs in (1, 2) for weight in (0.1, 0.2))]
    last = load_study(path).runs()[-1]
    assert dict(last.changes) == {"rank": 2, "epochs": 2, "lambda_sparsity": 0.2} and last.config.lambda_sparsity == 0.2


def test_a_study_of_seeds_alone_and_comments(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    path.write_text("// a comment\n" + path.read_text().replace('"seed": [1, 2]', '"seed": 5, "_comment": "one"'))
    assert [(run.name, run.variant, run.seed, run.changes) for run in load_study(path).runs()] == [("base", "", 5, {})]


@pytest.mark.parametrize("change", [{"variants": {"a": {"batch_size": None}}}, {"grid": {"batch_size": [None]}}])
def test_null_is_as_if_the_base_did_not_give_the_key(change: dict, tmp_path: Path) -> None:
    (run,) = load_study(write_study(tmp_path, {"batch_size": 7}, seed=1, **change)).runs()
    default = config_from_dict({key: value for key, value in SMALL.items() if key != "batch_size"}).batch_size
    assert run.config.batch_size == default != 7 and dict(run.changes) == {"batch_size": None}


def test_a_variant_of_another_method_drops_what_has_no_effect_for_it(tmp_path: Path) -> None:
    without = dict.fromkeys(["rank", "gate_lr", "init_epoch", "epochs", "init_lr", "lrate"])
    path = write_study(tmp_path, seed=1, variants={"means": {"model_name": "simplecil", **without}})
    assert load_study(path).runs()[0].config.model_name == "simplecil"
    path = write_study(tmp_path, seed=1, variants={"means": {"model_name": "simplecil"}})
    with pytest.raises(UserError, match="no effect"):
        load_study(path)


def test_names_are_safe_as_folders(tmp_path: Path) -> None:
    grid = {"rank_schedule": [[[0, 4]], [[0, 4], [1, 2]], None], "prefix": ["a/b c"], "lambda_sparsity": [1e-5],
            "growth_margin": [-0.5], "compile": [True]}
    names = [run.name for run in load_study(write_study(tmp_path, {"rank": None}, grid=grid, seed=1)).runs()]
    tail = "prefix=a-b-c,lambda_sparsity=1e-05,growth_margin=-0.5,compile=true"
    assert names == [f"rank_schedule={part},{tail}" for part in ("0-4", "0-4-1-2", "null")]


def test_the_command_line_wins(tmp_path: Path) -> None:
    path = write_study(tmp_path, grid={"rank": [2, 3]}, results="records")
    study = load_study(path, ["epochs=7", "jobs=3", "results=null", f"filepath={tmp_path / 'else'}"], seed=[9], device=["cpu"])
    assert [(run.config.epochs, run.config.rank, run.seed) for run in study.runs()] == [(7, 2, 9), (7, 3, 9)]
    assert (study.jobs, study.results, study.filepath) == (3, None, tmp_path / "else")
    assert all(run.config.device == ["cpu"] and run.recorded is None for run in study.runs())
    assert "'rank' is varied by the study" in refused(path, ("rank=5",))
    assert refused(path, ("epoch=5",)).startswith("--set epoch=5: 'epoch' is not a key")
    assert "--set jobs=0" in refused(path, ("jobs=0",))
    assert "--seed" in refused(path, seed=[1, 1])


# ---- what is wrong with a file

BAD = {
    "no base": ({"base": ...}, ["'base' must be given"]),
    "no seed": ({"seed": ...}, ["'seed' must be given"]),
    "missing base": ({"base": "bas.json"}, ["study.json", "'base'", "bas.json", "no such file"]),
    "a study as base": ({"base": "study.json"}, ["'base'", "a study itself"]),
    "base no text": ({"base": 5}, ["'base' is 5"]),
    "unknown key": ({"sed": 1}, ["'sed' is not a key of a study", "'seed'"]),
    "config key": ({"epochs": 5}, ["'epochs' is not a key of a study", "'variants'", "'grid'"]),
    "seed twice": ({"seed": [1, 1]}, ["'seed' is [1, 1]", "different"]),
    "seed text": ({"seed": "1993"}, ["'seed' is \"1993\""]),
    "jobs 0": ({"jobs": 0}, ["'jobs' is 0", "at least 1"]),
    "jobs decimal": ({"jobs": 2.0}, ["'jobs' is 2.0"]),
    "filepath number": ({"filepath": 5}, ["'filepath' is 5"]),
    "results list": ({"results": []}, ["'results' is []"]),
    "grid list": ({"grid": [1]}, ["'grid' is [1]"]),
    "grid no list": ({"grid": {"rank": 4}}, ["'rank' in 'grid' is 4"]),
    "grid empty": ({"grid": {"rank": []}}, ["'rank' in 'grid' is []"]),
    "grid key": ({"grid": {"rnk": [4]}}, ["study.json, grid", "'rnk' is not a key of the config", "'rank'"]),
    "grid value": ({"grid": {"rank": [4, "x"]}}, ["study.json, grid", "'rank'", '"x"']),
    "grid twice": ({"grid": {"init_lr": [1, 0.1, 1.0]}}, ["'init_lr' holds 1.0 twice"]),
    "grid of seeds": ({"grid": {"seed": [1, 2]}}, ["'seed' cannot vary", "top of the study"]),
    "grid of devices": ({"grid": {"device": ["0", "1"]}}, ["'device' cannot vary", "command line"]),
    "same folder": ({"grid": {"prefix": ["a b", "a-b"]}}, ["prefix=a-b", "share a folder"]),
    "long name": ({"grid": {"prefix": ["x" * 250]}}, ["too long"]),
    "variant no object": ({"variants": {"a": 1}}, ["'a' in 'variants' is 1"]),
    "variant name": ({"variants": {"a/b": {}}}, ['"a/b"', "folder"]),
    "variant dots": ({"variants": {"..": {}}}, ['".."']),
    "variant key": ({"variants": {"a": {"gat": "none"}}}, ["variant 'a'", "'gat'", "'gate'"]),
    "variant value": ({"variants": {"a": {"gate": "nune"}}}, ["variant 'a'", "nune", "'none'"]),
    "variant folder": ({"variants": {"a": {"filepath": "x"}}}, ["variant 'a'", "'filepath' cannot vary"]),
    "variant base": ({"variants": {"a": {"base": "x.json"}}}, ["'base'", "x.json", "no such file"]),
    "variant base empty": ({"variants": {"a": {"base": ""}}}, ["variant 'a'", "'base' is \"\""]),
    "variant and grid": ({"variants": {"a": {"rank": 2}}, "grid": {"rank": [4]}}, ["'rank'", "variant 'a'", "'grid'"]),
    "variant grid list": ({"variants": {"a": {"grid": [1]}}}, ["variant 'a'", "'grid' is [1]"]),
    "variant grid no list": ({"variants": {"a": {"grid": {"rank": 4}}}}, ["variant 'a'", "'grid' is {\"rank\": 4}"]),
    "variant grid key": ({"variants": {"a": {"grid": {"rnk": [4]}}}}, ["variant 'a'", "'rnk'", "'rank'"]),
    "variant grid value": ({"variants": {"a": {"grid": {"rank": ["x"]}}}}, ["variant 'a'", "'rank'", '"x"']),
    "variant grid twice": ({"variants": {"a": {"grid": {"rank": [4, 4]}}}}, ["variant 'a'", "'rank' holds 4 twice"]),
    "variant and its grid": ({"variants": {"a": {"rank": 2, "grid": {"rank": [4]}}}}, ["'rank'", "variant 'a'", "'grid'"]),
    "two grids": ({"variants": {"a": {"grid": {"rank": [4]}}}, "grid": {"rank": [2]}}, ["'rank'", "variant 'a'", "'grid'"]),
    "contradiction": ({"variants": {"ok": {}, "a": {"gate": "none"}}}, ["base.json", "'gate_lr'", 'gate "none"']),
    "contradictory grid": ({"grid": {"gumbel_tau_init": [5.0, 0.2], "gumbel_tau_final": [0.1, 0.5]}},
                           ["'gumbel_tau_final' is 0.5", "'gumbel_tau_init' of 0.2", "study.json, grid"]),
}


@pytest.mark.parametrize("keys, words", BAD.values(), ids=BAD)
def test_a_bad_study_is_one_sentence(keys: dict, words: list[str], tmp_path: Path) -> None:
    message = refused(write_study(tmp_path, **keys))
    assert all(word in message for word in words), message
    assert message.count(", grid") <= 1


@pytest.mark.parametrize("changes, word", [
    ({"model_name": "sdlroa"}, "'sdlora'"), ({"dataset": "digit"}, "'digits'"),
    ({"model_name": "simplecil", "rank": 4, "gate": "sparsemax"}, '"simplecil"'), ({"rank": 0}, "'rank'")])
def test_nothing_starts_when_one_config_is_bad(changes: dict, word: str, tmp_path: Path, stand_in: Path, capsys) -> None:
    path = write_study(tmp_path, variants={"good": {}, "bad": changes})
    assert start(path) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and word in err
    assert sorted(item.name for item in tmp_path.iterdir()) == ["base.json", "stand_in.py", "study.json"]


# ---- committed records


@pytest.mark.slow
def test_collected_records_count_as_finished(tmp_path: Path, stand_in: Path, capsys) -> None:
    path = write_study(tmp_path, results="records")
    assert start(path, "--seed", "1") == 0
    capsys.readouterr()
    assert study_command(["collect", str(path)]) == 0
    assert "1 records written" in (out := capsys.readouterr().out) and "of 2 runs 1 have none" in out
    first, second = load_study(path).runs()
    own, committed = first.own_record(), first.committed_record()
    assert [task.pop("probe") for task in own["tasks"]] == [[[1.5]]] * 3 and committed == own
    assert first.recorded.read_text().count("\n") == 1

    elsewhere = ["--set", f"filepath={tmp_path / 'else'}"]
    assert start(path, *elsewhere, "--device", "0", "--set", "num_workers=3") == 0  # these change no result
    first, second = load_study(path, [f"filepath={tmp_path / 'else'}"]).runs()
    assert not first.folder.exists() and first.record() and starts(second.folder)
    assert start(path, *elsewhere, "--overwrite") == 0 and starts(first.folder)


def test_a_record_older_than_a_key_has_its_default(tmp_path: Path) -> None:
    run = recorded(tmp_path, lambda record: record["config"].pop("kd_residual"))
    assert run.record()["seed"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("change, words", [
    (lambda record: record["config"].update(epochs=3), ["another config", "epochs (there 3, now 1)", "results=null"]),
    (lambda record: record.update(finished=False), ["not finished"]),
    (lambda record: record["config"].update(seed=[2]), ["seed (there [2], now [1])"]),
    (lambda record: record["config"].update(unheard=1), ["'unheard'"]),
    (lambda record: record.pop("config"), ["no config"]),
])
def test_a_record_of_something_else_is_refused(
        change: Callable[[dict], None], words: list[str], tmp_path: Path, stand_in: Path, capsys) -> None:
    run = recorded(tmp_path, change)
    for arguments in ([], ["--dry-run"]):
        assert start(tmp_path / "study.json", *arguments) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(word in err for word in [str(run.recorded), *words]), err
    assert not (tmp_path / "runs").exists()
    assert start(tmp_path / "study.json", "--set", "results=null") == 0
    assert study_command(["collect", str(tmp_path / "study.json")]) == 2
    assert str(run.recorded) in capsys.readouterr().err


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    run = recorded(tmp_path, lambda record: None)
    run.recorded.write_text(run.recorded.read_text().replace('"finished": true', '"finished": false'))
    with pytest.raises(UserError, match="damaged"):
        run.record()


def test_collect_says_what_is_missing(tmp_path: Path, capsys) -> None:
    assert study_command(["collect", str(write_study(tmp_path))]) == 2
    assert "'results'" in capsys.readouterr().err
    assert study_command(["collect", str(tmp_path / "base.json")]) == 2
    assert "not a study" in capsys.readouterr().err


def recorded(folder: Path, change: Callable[[dict], None]):
    """The only run of a study, with a committed record that `change` has changed."""
    run = load_study(write_study(folder, seed=1, results="records")).runs()[0]
    record = {"finished": True, "config": run.config.model_dump(mode="json"), "seed": 1, "metrics": {"last_accuracy": 1.0}}
    change(record)
    run.recorded.parent.mkdir(parents=True)
    write_sealed_json(run.recorded, record)
    return run
