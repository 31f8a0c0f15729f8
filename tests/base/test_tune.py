"""tune measures real steps on copies of the state and recommends by the rule it prints."""

import io
import json
import weakref

import pytest
import torch
import yaml

import trainer
from modules.commands import tune, tune_measure
from modules.commands.tune_choice import Row, cost_of_an_image, recommend, within
from modules.config import Generation, Tune
from modules.console import Console
from modules.data.reservoir import Entry, Reservoir
from modules.errors import ConfigError, Terminated
from modules.runtime import stream
from modules.training.timing import copied
from tests.base.tinyset import write_config

GRID = "[0, 0.1, 1, 2]"


def row(rate: float, step_ms: float = 100.0, **changes) -> Row:
    return Row(images_per_step=rate, preset="exact", step_ms=step_ms, **changes)


BASELINE = Row(images_per_step=0, preset="", step_ms=50.0)


def speak(command, path, *overrides) -> tuple[object, str]:
    stream_ = io.StringIO()
    result = command(path, list(overrides), Console(stream_), None, trainer.step)
    return result, stream_.getvalue()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(report, text, folder) of a tuning of the tiny set."""
    folder = tmp_path_factory.mktemp("tune")
    path = write_config(
        folder,
        tune={"grid": GRID, "steps": 2, "max_slowdown": 0},
        generation={"strengths": "{0.5: 1.0}"},
        near_ood={"strength": 0.5},
    )
    report, text = speak(tune.command, path)
    return report, text, folder / "runs" / "tiny" / "tune"


def test_every_ratio_is_measured_or_refused_with_its_reason(tuned):
    report, text, _ = tuned
    rows = {row["images_per_step"]: row for row in report["rows"]}
    assert list(rows) == [0, 0.1, 1, 2]
    assert "generation.max_uses 6 feeds only 0.6" in rows[0.1]["reason"] and rows[0.1]["step_ms"] == 0
    assert rows[0.1]["outside"] == ["cannot be run"]
    assert "0.1: generation.synthetic_fraction 0.4 needs 4 generated rows a step" in text
    for rate in (0, 1, 2):
        assert rows[rate]["step_ms"] > 0 and not rows[rate]["reason"]
    assert rows[0]["generation_share"] < 0.05 < rows[2]["generation_share"]


def test_a_window_holds_what_the_ratio_owes(tuned):
    rows = {row["images_per_step"]: row for row in tuned[0]["rows"]}
    for rate in (1, 2):
        made = rows[rate]["made_per_s"] * rows[rate]["step_ms"] / 1e3
        assert made == pytest.approx(rate)  # whole turnovers of 4 slots, decoded in threes
        assert rows[rate]["steps_timed"] == 12 / rate
        assert rows[rate]["reuse"] == pytest.approx(4 / rate)


def test_what_is_written_and_pasted(tuned):
    report, text, folder = tuned
    assert json.loads((folder / "tune.json").read_text())["rows"] == report["rows"]
    assert (folder / "tune.png").read_bytes().startswith(b"\x89PNG")
    line = next(line for line in report["recommendation"] if line.startswith("  images_per_step"))
    assert yaml.safe_load("generation:\n" + line) == {"generation": {"images_per_step": 2}}
    assert line in text and report["rule"] in text
    assert not (folder.parent / "config.yaml").exists()  # the run itself can still be started with other settings


def test_quality_judges_on_val(tmp_path):
    path = write_config(tmp_path, tune={"grid": "[2]", "steps": 2})
    report, text = speak(tune.command, path, "--quality=10")
    for row in report["rows"]:
        assert 0 <= row["quality"]["val_knn_accuracy"] <= 1
        assert 0 <= row["quality"]["val_near_ood_auroc"] <= 1
    assert "val kNN" in text and "after 10 steps, one seed" in text
    assert "learned, or read from the cache" in text


def test_a_preset_that_cannot_be_run_is_a_row(tmp_path):
    path = write_config(tmp_path, tune={"grid": "[2]", "steps": 2})
    report, text = speak(tune.command, path, "--presets=turbo")
    refused = [row for row in report["rows"] if row["preset"] == "turbo"]
    assert "turbo needs weights distilled to a few steps" in refused[0]["reason"]
    assert "preset turbo" in text


def test_a_preset_leaves_no_engine_behind_that_the_next_would_be_fitted_beside(tmp_path, monkeypatch):
    engines, alive = [], []
    candidates = tune_measure._candidates

    def counted(job, step, preset, *rest):
        alive.append(sum(engine() is not None for engine in engines))
        found = candidates(job, step, preset, *rest)
        engines.extend(weakref.ref(candidate.state.generator.slots) for candidate in found[0].values())
        return found

    monkeypatch.setattr(tune_measure, "_candidates", counted)
    path = write_config(tmp_path, tune={"grid": "[1]", "steps": 1}, generation={"strengths": "{0.5: 1.0}"})
    speak(tune.command, path, "--presets=fast", "near_ood.strength=0.5")
    assert alive == [0, 0] and len(engines) == 2


def test_sigterm_is_no_refusal_of_a_ratio(tmp_path):
    calls = []

    def step(state):
        calls.append(state)
        if state.generator is not None:
            raise Terminated("SIGTERM")
        trainer.step(state)

    path = write_config(tmp_path, tune={"grid": "[2]", "steps": 2})
    with pytest.raises(Terminated):
        tune.command(path, [], Console(io.StringIO()), None, step)
    assert calls[-1].generator is not None


def test_a_ratio_that_runs_out_of_memory_is_a_row(tmp_path):
    def step(state):
        if state.generator is not None and state.config.generation.images_per_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        trainer.step(state)

    path = write_config(tmp_path, tune={"grid": "[1, 2]", "steps": 2, "max_slowdown": 0})
    report = tune.command(path, [], Console(io.StringIO()), None, step)
    rows = {row["images_per_step"]: row for row in report["rows"]}
    assert "a step does not fit (CUDA out of memory); lower generation.slots (4)" in rows[2]["reason"]
    assert rows[1]["step_ms"] > 0 and "  images_per_step: 1" in report["recommendation"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generation.synthetic_fraction=0"], "tune: generation.synthetic_fraction is 0"),
        (["tune.max_hours=-1"], "`tune.max_hours` is -1.0; it must lie in"),
        (["--qualty"], "unknown flag --qualty; did you mean --quality"),
        (["--quality=4"], "--quality is '4'; it must be a whole number of at least 10"),
        (["--presets=fastest"], "--presets names 'fastest'; choose from exact, fast, faster, turbo"),
    ],
)
def test_bad_input(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        speak(tune.command, write_config(tmp_path), *overrides)


def test_rule_takes_the_largest_within_every_bound():
    rows = [BASELINE, row(1, slowdown=1.2, reuse=8, hours=1), row(2, slowdown=1.6, reuse=4, hours=2),
            row(4, slowdown=2.4, reuse=2, hours=3)]  # fmt: skip

    def chosen(**bounds) -> str:
        lines = recommend(rows, Tune(**({"max_slowdown": 0} | bounds)), "exact")
        return next((line.split()[-1] for line in lines if line.startswith("  images_per_step")), "none")

    assert chosen() == "4"
    assert chosen(max_slowdown=2) == "2"
    assert chosen(max_hours=1.5) == "1"
    assert chosen(max_slowdown=2, max_reuse=5) == "2"
    assert chosen(max_slowdown=1.3, max_reuse=5) == "none"
    assert within(rows[3], Tune(max_hours=2)) == [
        "3 hours are more than tune.max_hours 2",
        "2.40x is slower than tune.max_slowdown 2",
    ]


@pytest.mark.parametrize(
    ("bounds", "nearest", "ways"),
    [
        ({"max_reuse": 1}, 4, "raise that bound, or add a larger ratio to tune.grid"),
        ({"max_reuse": 3, "max_slowdown": 2}, 2, "raise that bound, or take a faster preset"),
        ({"max_slowdown": 1.1}, 1, "raise that bound, add a smaller ratio to tune.grid, or take a faster preset"),
    ],
)
def test_none_names_the_nearest_ratio_and_the_way_to_keep_the_bound(bounds, nearest, ways):
    rows = [BASELINE, row(1, slowdown=1.2, reuse=8), row(2, 120, slowdown=1.6, reuse=4),
            row(4, 150, slowdown=2.4, reuse=2)]  # fmt: skip
    line = recommend(rows, Tune(**({"max_slowdown": 0} | bounds)), "exact")[1]
    assert f"the nearest is images_per_step {nearest} " in line and line.endswith(ways)


def test_a_bound_that_is_just_met_is_kept():
    generated = 4 * 3 * 0.4 / (1 - 0.4)  # 8.000000000000002
    rows = [BASELINE, row(2, slowdown=1.0, reuse=generated / 2)]
    assert "  images_per_step: 2" in recommend(rows, Tune(max_reuse=4), "exact")
    assert within(row(1, hours=3, slowdown=2), Tune(max_hours=3, max_slowdown=2)) == []


def test_the_line_to_paste_is_the_ratio_that_ran():
    assert "  images_per_step: 0.33333334" in recommend([BASELINE, row(0.33333334, slowdown=1.0)], Tune(), "exact")


def test_recommendation_says_why_not_more_and_what_else():
    rows = [BASELINE, row(1, slowdown=1.2), row(4, slowdown=2.4), row(2, step_ms=60, slowdown=1.1)]
    rows.append(Row(8, "fast", step_ms=80.0, slowdown=1.6))
    text = "\n".join(recommend(rows, Tune(), "exact"))
    assert "images_per_step 2 " in text and "4: 2.40x is slower than tune.max_slowdown 2" in text
    assert "preset fast: allows images_per_step 8" in text
    slow = recommend([BASELINE, row(1, slowdown=1.2), Row(8, "fast", step_ms=80.0, slowdown=3.0)], Tune(), "exact")
    assert slow[-1] == "preset fast: keeps the bounds at no ratio"
    assert not [line for line in slow if line.startswith("a step takes about")], "no line through one ratio"
    nothing = "\n".join(recommend([BASELINE, row(1, slowdown=3.0)], Tune(), "exact"))
    assert "recommended: none, because no measured ratio keeps every bound" in nothing
    refused = "\n".join(recommend([BASELINE, Row(1, "exact", reason="no")], Tune(), "exact"))
    assert "no ratio of tune.grid can be run" in refused


def test_accuracy_is_told_of_the_recommended_ratio_and_of_the_best():
    rows = [row(rate, slowdown=1.0, quality={"val_knn_accuracy": found}) for rate, found in ((1, 0.6), (2, 0.5))]
    (line,) = (line for line in recommend([BASELINE, *rows], Tune(), "exact") if line.startswith("on val"))
    assert "0.500 at the recommended ratio, highest 0.600 at 1;" in line


def test_cost_line_is_exact_on_a_line():
    base, slope = cost_of_an_image([row(rate, 40 + 12.5 * rate) for rate in (0, 1, 2, 8)])
    assert (base, slope) == (pytest.approx(40), pytest.approx(12.5))


@pytest.mark.parametrize(("near_ood", "max_age"), [(0.5, 0), (0.25, 0), (0.0, 0)])
def test_mean_age_is_that_of_a_reservoir_in_balance(near_ood, max_age):
    classes, ring, rate, steps = 3, 4, 1.5, 400
    reservoir = Reservoir(classes, ring, 2, torch.device("cpu"), max_uses=1)
    made = 0
    for step in range(steps):
        while made < (step + 1) * rate:
            is_ood = int((made + 1) * near_ood) > int(made * near_ood)
            turn = int(made * near_ood) if is_ood else made - int(made * near_ood)
            entry = Entry(turn % classes, is_ood, 0, "positive", step, made)
            reservoir.put_batch(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), [entry])
            made += 1
    reservoir.take(None, False, steps - 1, 0, stream(0, "test"))
    expected = tune_measure.mean_age(
        Generation(ring_size=ring, near_ood_fraction=near_ood, max_age=max_age), rate, classes
    )
    assert reservoir.statistics()["age_mean"] == pytest.approx(expected, rel=0.15)


def test_max_age_bounds_the_mean_age():
    assert tune_measure.mean_age(Generation(ring_size=1000, max_age=30), 1.0, 5) == 15
    assert tune_measure.mean_age(Generation(), 0.0, 5) == 0


def test_copies_share_nothing():
    tree = {"a": [torch.zeros(2), {"b": 1}], 3: (torch.ones(1), "x")}
    copy = copied(tree)
    copy["a"][0] += 1
    copy["a"][1]["b"] = 2
    assert tree["a"][0].sum() == 0 and tree["a"][1]["b"] == 1 and copy[3][1] == "x"
