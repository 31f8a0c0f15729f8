"""`compare`: fair arms, a grid that any scheduler can run, failures named, nothing overwritten."""

import fcntl
import json
import shlex
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trainer
from modules import config
from modules.commands import compare, trials
from modules.commands.arms import ARMS, DEFAULT_ARMS, GENERATING, LONG, SMALL_BATCH, arm_settings
from modules.console import Console
from modules.data.mixer import Mixer
from modules.data.reservoir import Reservoir
from modules.errors import ConfigError, StorageError
from modules.evaluation.evaluate import evaluate
from modules.evaluation.stored import save_predictions
from modules.rules import generated_rows
from modules.settings import load_config, to_yaml
from tests.evaluation.examples import sets

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CLASSES = ("bolt", "gear", "nut", "washer")
FAKE_TRAINER = """
import os, shutil, sys, time
from pathlib import Path
settings = dict(word.split("=", 1) for word in sys.argv[3:])
name = Path(settings["run.name"]).name
here = Path(__file__).parent
with open(here / "started", "a") as file:
    file.write(name + "\\n")
if (here / ("fails-" + name)).exists():
    print("something said before")
    sys.exit("error: " + (here / ("fails-" + name)).read_text())
if (here / ("dies-" + name)).exists():
    os.kill(os.getpid(), 9)
shutil.copytree(here / "made" / name, Path(settings["run.dir"]) / settings["run.name"], dirs_exist_ok=True)
"""


@pytest.fixture
def file(tmp_path):
    """A config whose batches hold 6 real rows and, on average, 4 generated ones."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "learning: {classes_per_batch: 3, rows_per_class: 2, steps: 30}\n"
        "generation: {synthetic_fraction: 0.4, ring_size: 2}\ndata: {image_size: 16}\ngate: {start_step: 10}\n"
    )
    return path


@pytest.fixture(scope="module")
def outcome():
    return evaluate(
        **sets(), classes=CLASSES, probe=config.Probe(lrs=(0.1,), epochs=2), evaluation=config.Evaluation(), seed=0
    )


@pytest.fixture
def grid(file, tmp_path, monkeypatch, outcome):
    """(call, trainer's folder): `call(*arguments)` compares on `file` with a trainer that copies finished runs."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "trainer.py").write_text(FAKE_TRAINER)
    monkeypatch.setattr(trials, "TRAINER", folder / "trainer.py")
    overrides = [f"run.dir={tmp_path / 'runs'}", "evaluation.bootstrap=40"]
    for trial in trials.plan(file, ("ce", "supcon", "positives"), (0, 1), overrides):
        made = folder / "made" / trial.name
        made.mkdir(parents=True)
        (made / "config.yaml").write_text(to_yaml(trial.config, {}))
        save_predictions(made / "predictions.safetensors", outcome.predictions)
        seconds = {"seconds.stage.tokens": 0.0, "seconds.stage.contrastive": 20.0, "cost.seconds": 30.0}
        if trial.arm == "positives":
            seconds = {"seconds.stage.tokens": 8.0, "seconds.stage.contrastive": 40.0, "cost.seconds": 58.0}
        results = outcome.results | seconds | {"learning.steps": trial.config.learning.steps}
        (made / "results.json").write_text(json.dumps(results))

    def call(*arguments: str) -> None:
        compare.command(str(file), [*arguments, *overrides], Console(), None, None)

    return call, folder


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text().split() if (folder / "started").exists() else []


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("seed", [0, 3])
def test_every_arm_sees_the_same_real_rows_in_a_batch_of_the_same_size(file, seed):
    labels = torch.arange(4).repeat_interleave(5)
    pixels = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 16, 16, 3).contiguous()
    real, rows = {}, {}
    for trial in trials.plan(file, ARMS, (seed,), [], long_steps=90):
        reservoir = Reservoir(4, 2, 16, "cpu", max_uses=8)
        generation = replace(trial.config.generation, roundtrip_fraction=0.0)  # which needs a pipeline
        mixer = Mixer(pixels, labels, reservoir, generation, trial.config.learning, trial.config.run.seed)
        batches = [mixer.batch(step) for step in range(5)]
        real[trial.arm] = [(batch.sources[:6], batch.labels_B[:6].tolist()) for batch in batches]
        rows[trial.arm] = [len(batch.images_BHWC) for batch in batches]
    assert all(found == real["positives_ood"] for found in real.values())
    assert all(count == [6] * 5 for arm, count in rows.items() if arm.endswith(SMALL_BATCH))
    wide = {arm: count for arm, count in rows.items() if not arm.endswith(SMALL_BATCH)}
    assert len(wide) == len(ARMS) - 4 and all(count == [10] * 5 for count in wide.values())


def test_every_arm_takes_the_same_steps_and_scales_its_rate_by_the_same_rows(file):
    for trial in trials.plan(file, ARMS, (0,), [], long_steps=90):
        learning = trial.config.learning
        assert learning.steps == (90 if trial.arm.endswith(LONG) else 30), trial.arm
        rows = 6 + learning.extra_real_rows + generated_rows(trial.config)
        assert rows == pytest.approx(6 if trial.arm.endswith(SMALL_BATCH) else 10), trial.arm
        assert (
            trial.config.learning.lr == 0.1 and trial.config.data == trials.plan(file, ["ce"], (0,), [])[0].config.data
        )


def test_arms_are_what_their_words_say(file):
    made = {trial.arm: trial.config for trial in trials.plan(file, DEFAULT_ARMS + ("adaptive", "simclr"), (0,), [])}
    assert [made[arm].learning.method for arm in ("ce", "ce_strong", "simclr", "supcon")] == [
        "cross_entropy",
        "cross_entropy",
        "simclr",
        "supcon",
    ]
    assert (made["ce"].learning.augment, made["ce_strong"].learning.augment) == ("standard", "strong")
    assert made["supcon"].generation.synthetic_fraction == 0
    shares = {arm: made[arm].generation.near_ood_fraction for arm in GENERATING if arm in made}
    assert shares == {"positives": 0, "positives_ood": 0.5, "jigsaw_roundtrip": 0.5, "adaptive": 0.5}
    assert made["jigsaw_roundtrip"].near_ood.recipes == {"jigsaw_roundtrip": 1.0}
    assert made["adaptive"].controller.enabled and not made["positives_ood"].controller.enabled


def test_arms_that_are_controls_of_others_differ_in_one_thing(file):
    made = {trial.arm: trial.config for trial in trials.plan(file, ARMS, (0,), [], long_steps=90)}
    agnostic, positives = made["class_agnostic"], made["positives"]
    assert agnostic.inversion.class_agnostic and not positives.inversion.class_agnostic
    assert replace(agnostic, run=positives.run, inversion=positives.inversion) == positives
    exposed, ood = made["ce_exposure"], made["positives_ood"]
    assert (exposed.learning.method, exposed.learning.outlier_exposure) == ("cross_entropy", 0.5)
    assert replace(exposed, run=ood.run, learning=ood.learning) == ood


@pytest.mark.parametrize("name", ["parts", "grocery", "mvip"])
def test_the_experiments_can_be_planned_with_every_arm(name):
    planned = trials.plan(CONFIGS / f"{name}.yaml", ARMS, (0,), [], long_steps=20_000)
    assert len({trial.path for trial in planned}) == len(ARMS)
    assert planned[0].path == Path("runs") / name / "ce-s0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "ce,supcom"], r"--arms names 'supcom', which is no arm \(did you mean supcon\?\); arms are ce, "),
        (["--arms", "ce,ce"], "--arms is ce,ce; name each once"),
        (["--arms"], "--arms names nothing; write --arms=supcon,positives, without spaces"),
        (["--arms", "ce,", "supcon"], "--arms ends with a comma; write its values without spaces"),
        (["--arms", "ce", "--seeds", "0,-1"], r"--seeds holds '-1'; write whole numbers"),
        (["--seeds=0,00"], r"--seeds holds '00'"),
        (["--seeds", "1,1"], "--seeds is 1,1; name each once"),
        (["--seed", "1"], r"unknown flag --seed; did you mean --seeds\?"),
        (["--arms", "ce", "--baseline", "supcon"], "--baseline is 'supcon', which is not among the arms ce"),
        (["run.seed=3"], "run.seed is given, but the seeds of a comparison are those of --seeds"),
        (["--arms", "ce_long"], r"ce_long, which needs --long-steps above learning.steps 30"),
        (["--arms", "ce_long", "--long-steps", "30"], r"above learning.steps 30"),
        (["--arms", "positives", "generation.synthetic_fraction=0"], r"arm positives mixes generated rows"),
        (["--arms", "positives_ood", "generation.near_ood_fraction=0"], r"arm positives_ood has near-OOD rows"),
        (
            ["--arms", "ce,positives", "generation.max_uses=1", "generation.images_per_step=1"],
            r"max_uses 1 feeds only 1",
        ),
        (["--arms", "jigsaw_roundtrip", "learning.stebs=3"], r"did you mean `learning.steps`"),
    ],
)
def test_a_grid_that_cannot_be_run_gets_one_clear_message(file, tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        compare.command(str(file), [*arguments, f"run.dir={tmp_path / 'runs'}"], Console(), None, None)
    assert not (tmp_path / "runs").exists()


def test_a_contradiction_within_an_arm_names_the_arm(file):
    one_row = ["learning.classes_per_batch=1", "learning.rows_per_class=1"]
    classic = ["learning.method=cross_entropy", "learning.outlier_exposure=0.5"]
    with pytest.raises(ConfigError, match=r"arm supcon_small_batch: .*SupCon needs two rows or more"):
        trials.plan(file, ["ce", "supcon_small_batch"], [0], [*one_row, *classic])


def test_trials_are_printed_as_run_commands_and_nothing_is_started(file, tmp_path, capsys):
    overrides = [f"run.dir={tmp_path / 'my runs'}", "run.name=grid", "near_ood.recipes={foreign: 1}"]
    arguments = [
        "compare",
        str(file),
        "--print-trials",
        "--arms",
        "positives,jigsaw_roundtrip",
        "--seeds=4",
        *overrides,
    ]
    assert trainer.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and not (tmp_path / "my runs").exists()
    words = [shlex.split(line) for line in lines]
    assert [word[:4] for word in words] == [[sys.executable, words[0][1], "run", str(file)]] * 2
    assert (Path.cwd() / words[0][1]).samefile(Path(trainer.__file__))
    first, second = (load_config(file, word[4:])[0] for word in words)
    assert (first.run.name, first.run.seed) == ("grid/positives-s4", 4)
    assert first.run.dir == second.run.dir == str(tmp_path / "my runs")
    assert first.near_ood.recipes == {"foreign": 1.0}
    assert second.near_ood.recipes == {"jigsaw_roundtrip": 1.0}, "an arm's own settings have the last word"


def test_the_grid_is_run_once_and_compared(grid, tmp_path, capsys):
    call, folder = grid
    call("--arms", "ce,supcon,positives", "--seeds", "0,1")
    expected = ["ce-s0", "supcon-s0", "positives-s0", "ce-s1", "supcon-s1", "positives-s1"]
    assert started(folder) == expected
    made = tmp_path / "runs" / "tiny"
    found = json.loads((made / "compare.json").read_text())
    assert found["baseline"] == "supcon" and list(found["arms"]) == ["ce", "supcon", "positives"]
    assert len(found["finished"]) == 6 and not found["unfinished"]
    text = capsys.readouterr().out
    assert all(name in text for name in expected) and "near-OOD AUROC" in text
    assert "supcon_long --long-steps 72 would take the wall time of positives" in text
    before = tree(made / "supcon-s0")
    call("--arms", "supcon,positives", "--seeds", "0")
    assert started(folder) == expected and tree(made / "supcon-s0") == before
    text = capsys.readouterr().out
    assert text.count("finished before") == 2 and "not asked for, so left out: ce-s0, ce-s1, positives-s1" in text


def test_equal_wall_time_charges_every_arm_for_its_tokens():
    classic = {
        "cost.seconds": 30.0,
        "seconds.stage.contrastive": 20.0,
        "seconds.stage.tokens": 0.0,
        "learning.steps": 100,
    }
    first = {"cost.seconds": 90.0, "seconds.stage.tokens": 20.0}
    second = {"cost.seconds": 70.0, "seconds.stage.tokens": 0.0}  # read the first one's tokens
    both = [("ce", 0, classic), ("positives", 0, first), ("positives_ood", 0, second)]
    assert compare.equal_time_steps(both) == [("ce", "positives_ood", 400)]
    assert compare.equal_time_steps([("ce", 0, classic), ("supcon", 0, classic)]) == []


def test_a_failed_trial_is_named_and_the_rest_go_on(grid, tmp_path, capsys):
    call, folder = grid
    (folder / "fails-supcon-s0").write_text("tiny.zip: does not exist")
    (folder / "dies-ce-s1").touch()
    with pytest.raises(compare.TrialsFailed) as caught:
        call("--arms", "ce,supcon", "--seeds", "0,1")
    assert caught.value.code == 1, "a traceback is worse than a signal"
    assert (
        "2 of 4 trials did not finish: supcon-s0 (exit code 1: tiny.zip: does not exist); ce-s1 (exit code 137: killed, as "
        "by a system that is short of memory; its last line was: " in str(caught.value)
    )
    assert started(folder) == ["ce-s0", "supcon-s0", "ce-s1", "supcon-s1"]
    found = json.loads((tmp_path / "runs/tiny/compare.json").read_text())
    assert [(one["arm"], one["seed"]) for one in found["finished"]] == [("ce", 0), ("supcon", 1)]
    assert [(one["arm"], one["seed"]) for one in found["unfinished"]] == [("supcon", 0), ("ce", 1)]
    assert "something said before" in (tmp_path / "runs/tiny/logs/supcon-s0.log").read_text()
    (folder / "fails-supcon-s0").unlink()
    (folder / "dies-ce-s1").unlink()
    call("--arms", "ce,supcon", "--seeds", "0,1")
    assert started(folder)[4:] == ["supcon-s0", "ce-s1"], "finished trials are not started again"


@pytest.mark.parametrize(("codes", "worst"), [([2, 6], 6), ([143, 1], 1), ([3], 3), ([137, 143], 143)])
def test_the_exit_code_is_that_of_the_worst_trial(codes, worst):
    assert compare.TrialsFailed("", codes).code == worst


def test_nothing_finished_is_no_comparison(grid, tmp_path, capsys):
    call, folder = grid
    (folder / "fails-ce-s0").write_text("no data")
    with pytest.raises(compare.TrialsFailed, match="1 of 1 trials did not finish: ce-s0"):
        call("--arms", "ce", "--seeds", "0")
    assert "nothing to compare yet" in capsys.readouterr().out
    assert not list((tmp_path / "runs/tiny").glob("compare.*"))


def test_trials_of_other_settings_are_refused_before_anything_is_started(grid, tmp_path):
    call, folder = grid
    call("--arms", "ce,supcon", "--seeds", "0")
    before = tree(tmp_path / "runs")
    with pytest.raises(
        ConfigError, match=r"ce-s0: holds a trial of other settings \(learning.steps was 30, now 31\), and"
    ):
        call("--arms", "ce,supcon,positives", "--seeds", "0,1", "learning.steps=31")
    assert tree(tmp_path / "runs") == before and started(folder) == ["ce-s0", "supcon-s0"]


def test_a_trial_of_another_user_is_an_error_of_storage(grid, monkeypatch):
    def locked_away(trial):
        raise PermissionError(13, "Permission denied")

    call, folder = grid
    monkeypatch.setattr(trials, "holder", locked_away)
    with pytest.raises(StorageError, match=r"ce-s0: cannot be read \(Permission denied\); nothing was started"):
        call("--arms", "ce", "--seeds", "0")
    assert started(folder) == []


def test_a_trial_another_process_is_at_is_left_to_it_and_waited_for(grid, tmp_path, capsys):
    """As after `compare` was killed and its trial went on, or beside a scheduler that runs the same grid."""
    call, folder = grid
    path = tmp_path / "runs/tiny/ce-s0"
    path.mkdir(parents=True)
    with open(path / ".lock", "w") as lock:
        lock.write("4321")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)

        def finish_when_the_other_is_done():
            while not (tmp_path / "runs/tiny/supcon-s0/results.json").exists():
                threading.Event().wait(0.01)
            for name in ("config.yaml", "predictions.safetensors", "results.json"):
                (path / name).write_bytes((folder / "made/ce-s0" / name).read_bytes())
            fcntl.flock(lock, fcntl.LOCK_UN)

        other = threading.Thread(target=finish_when_the_other_is_done)
        other.start()
        call("--arms", "ce,supcon", "--seeds", "0")
        other.join()
    assert started(folder) == ["supcon-s0"]
    text = capsys.readouterr().out
    assert "in use by process 4321: the others first" in text and "finished before" in text
    assert len(json.loads((tmp_path / "runs/tiny/compare.json").read_text())["finished"]) == 2


def test_a_trial_that_another_process_began_a_moment_before_is_waited_for(grid, tmp_path, capsys, monkeypatch):
    """It had not locked its directory yet when this compare looked: the second start finds it in use."""
    call, folder = grid
    path = tmp_path / "runs/tiny/ce-s0"
    lock_taken, made = threading.Event(), threading.Event()

    def other():
        path.mkdir(parents=True)
        with open(path / ".lock", "w") as lock:
            lock.write("4321")
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock_taken.set()
            made.wait()
            for name in ("config.yaml", "predictions.safetensors", "results.json"):
                (path / name).write_bytes((folder / "made/ce-s0" / name).read_bytes())

    def refused(trial, log):
        worker.start()
        lock_taken.wait()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("error: in use by process 4321\n")
        threading.Timer(0.2, made.set).start()
        return trials.IN_USE

    worker = threading.Thread(target=other)
    monkeypatch.setattr(trials, "run_trial", refused)
    call("--arms", "ce", "--seeds", "0")
    worker.join()
    text = capsys.readouterr().out
    assert "in use by process 4321: waiting for it" in text and "exit code" not in text
    assert len(json.loads((tmp_path / "runs/tiny/compare.json").read_text())["finished"]) == 1


def test_the_lock_of_a_killed_process_is_nobodys(grid, tmp_path):
    call, folder = grid
    (tmp_path / "runs/tiny/ce-s0").mkdir(parents=True)
    (tmp_path / "runs/tiny/ce-s0/.lock").write_text("4321")
    call("--arms", "ce", "--seeds", "0")
    assert started(folder) == ["ce-s0"]


def test_logs_that_cannot_be_written_are_an_error_of_storage(grid, tmp_path):
    call, _ = grid
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/logs").write_text("in the way")
    with pytest.raises(StorageError, match=r"logs/ce-s0.log: cannot be written .*set run.dir"):
        call("--arms", "ce", "--seeds", "0")


def test_arm_settings_follow_the_config_in_further_rows(file):
    base, _ = load_config(file, ["learning.extra_real_rows=1", "generation.synthetic_fraction=0.5"])
    assert arm_settings("supcon", base)["learning.extra_real_rows"] == 1 + 6
    assert arm_settings("supcon_small_batch", base)["learning.extra_real_rows"] == 1
    assert "learning.extra_real_rows" not in arm_settings("positives", base)
