"""The experiments: sweeps that read val alone, and the image set of the grocery pipeline."""

import csv
import json
import zipfile

import pytest

from benchmarks import grocery_pack, sweep
from modules.errors import ConfigError
from modules.runtime import environment
from modules.settings import to_yaml
from tests.base.tinyset import write_config


def rows_of(path) -> list[dict]:
    return list(csv.DictReader(path.open()))


def test_sweeps_run_under_the_rules_and_read_val_alone():
    for arms, variants in sweep.SWEEPS.values():
        for settings in variants.values():
            assert len(sweep.plan("configs/parts.yaml", arms, [0], settings)) == len(arms)
    assert not [metric for metric in sweep.METRICS if metric.startswith("test.")]


def test_a_sweep_writes_a_row_a_val_metric_and_repeats_no_finished_trial(tmp_path, monkeypatch, capsys):
    config, made = write_config(tmp_path), []

    def trial(planned, log):
        made.append(planned)
        planned.path.mkdir(parents=True)
        results = {"val.accuracy": 0.25, "test.accuracy": 0.5, "cost.seconds": 3.0, "learning.steps": 8}
        (planned.path / "results.json").write_text(json.dumps(results))
        (planned.path / "config.yaml").write_text(to_yaml(planned.config, {}))
        (planned.path / "environment.json").write_text(json.dumps(environment()))
        return 0

    monkeypatch.setattr(sweep, "run_trial", trial)
    monkeypatch.setattr(sweep, "SWEEPS", {"steps": (("supcon",), {"8 steps": ["learning.steps=8"]})})
    asked = [str(config), "--seeds", "0,1", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    for _ in range(2):
        assert sweep.main(asked)["failed"] == []
    rows = rows_of(tmp_path / "sweep.csv")
    assert not any(planned.config.evaluation.test for planned in made)
    assert len(made) == len(rows) == 2 and {row["metric"] for row in rows} == {"val.accuracy"}
    assert "25.0 %" in capsys.readouterr().out
    other = write_config(tmp_path / "other")
    assert sweep.main([str(other.rename(other.with_name("other.yaml"))), *asked[1:]])["failed"] == []
    assert len(made) == 4 and len({planned.path for planned in made}) == 4, "each config has its own trials"


@pytest.mark.parametrize("override", ["run.name=mine", "learning.grayscale_p=0", "evaluation.test=true", "run.seed=3"])
def test_what_a_sweep_sets_may_not_be_set_for_all_of_it(override, tmp_path, capsys):
    """Or variants of six names would be one trial, and the table would say that nothing matters."""
    with pytest.raises(SystemExit) as stopped:
        sweep.main([str(write_config(tmp_path)), override, "--sweeps", "views", "--out", str(tmp_path)])
    name = override.partition("=")[0]
    assert stopped.value.code == 2 and f"{name} is what this sweep sets in each" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.csv"))


def test_trials_of_other_settings_are_refused_with_the_way_out_of_a_sweep(tmp_path, monkeypatch):
    def refuse(trials):
        raise ConfigError("holds a trial of other settings. Set run.name to begin another comparison")

    monkeypatch.setattr(sweep, "refuse_other_settings", refuse)
    with pytest.raises(ConfigError, match="it is --runs that names another place"):
        sweep.main([str(write_config(tmp_path)), "--sweeps", "views", "--out", str(tmp_path)])


def test_a_pack_of_photographs_and_renders_holds_no_class_of_the_experiment(tmp_path):
    columns = {"photographs": "path,label,role", "renders": "path,caption,noun,model"}
    lines = {
        "photographs": ["a.jpg,Red-Kiwi,pretrain", "b.jpg,Apple,id"],
        "renders": ["r.jpg,a photo of a rusty buzzer,buzzer,m1", "s.jpg,a cone,cone,m2"],
    }
    for name, header in columns.items():
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as pack:
            pack.writestr("index.csv", "\n".join([header, *lines[name]]) + "\n")
            for line in lines[name]:
                pack.writestr(line.split(",")[0], line)
    flags = [word for name in columns for word in (f"--{name}", str(tmp_path / f"{name}.zip"))]
    path = grocery_pack.main([*flags, "--renders-taken", "1", "--out", str(tmp_path / "pack.zip")])
    with zipfile.ZipFile(path) as pack:
        rows = list(csv.DictReader(pack.read("index.csv").decode().splitlines()))
        assert [row["path"] for row in rows][0] == "photographs/a.jpg" and len(rows) == 2
        assert (
            rows[0]["caption"] == "a photo of a red kiwi"
            and pack.read("photographs/a.jpg") == b"a.jpg,Red-Kiwi,pretrain"
        )
