"""Comparison of finished runs: pairing, seeds, honesty about what is missing or not comparable."""

import csv
import dataclasses
import io
import json

import pytest
import torch

from modules import config
from modules.errors import DataError
from modules.evaluation.compare import Trial, compare, find_trials, read_trials
from modules.evaluation.compare_page import as_html, write_comparison
from modules.evaluation.compare_text import ROW_COLUMNS, as_csv, as_json, as_long_text, as_rows, as_text, verdict
from modules.evaluation.evaluate import evaluate
from modules.evaluation.intervals import metric_replicates, percentile_interval, role_weights
from modules.evaluation.metrics import OOD_METRICS
from modules.evaluation.ood import SCORES
from modules.evaluation.page import number
from modules.evaluation.stored import save_predictions
from modules.settings import to_yaml
from tests.evaluation.examples import sets
from tests.evaluation.test_report import parse

CLASSES = ("bolt", "gear", "nut", "washer")


def write_run(folder, arm, seed, noise, *, settings=None, change=None):
    """A finished run directory: the shared test images, features blurred by `noise` of this seed."""
    given = sets()
    for index, (name, part) in enumerate(given.items()):
        generator = torch.Generator().manual_seed(100 * seed + index)
        blurred = part.features_DF + noise * torch.randn(part.features_DF.shape, generator=generator)
        given[name] = dataclasses.replace(part, features_DF=blurred)
    if change is not None:
        given = change(given)
    outcome = evaluate(
        **given,
        classes=CLASSES,
        probe=config.Probe(lrs=(0.1,), epochs=5),
        evaluation=config.Evaluation(bootstrap=0),
        seed=seed,
    )
    path = folder / f"{arm}-s{seed}"
    path.mkdir(parents=True)
    resolved = config.Config(run=config.Run(seed=seed, name=path.name), **(settings or {}))
    (path / "config.yaml").write_text(to_yaml(resolved, {}))
    (path / "environment.json").write_text(json.dumps({"commit": "abc123", "gpu": None, "cpu": "Reference CPU"}))
    costs = {"cost.seconds": 100.0 + seed, "cost.forward_passes": 4000, "cost.images_generated": 0, "cost.reuse": 0.0}
    (path / "results.json").write_text(json.dumps(outcome.results | costs))
    save_predictions(path / "predictions.safetensors", outcome.predictions)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    for seed in range(3):
        write_run(folder, "positives", seed, 0.0, settings={"learning": config.Learning(extra_real_rows=5)})
        write_run(folder, "supcon", seed, 1.5)
    (folder / "ce-s0").mkdir()
    (folder / "cache").mkdir()
    return folder


@pytest.fixture(scope="module")
def comparison(folder):
    finished, unfinished = read_trials(find_trials(folder))
    return compare(finished, unfinished, arms=("ce", "supcon", "positives"), baseline="supcon", resamples=200)


def test_trials_are_found_by_name_and_unfinished_ones_named(folder):
    trials = find_trials(folder)
    assert [(trial.arm, trial.seed) for trial in trials[:3]] == [("ce", 0), ("positives", 0), ("positives", 1)]
    finished, unfinished = read_trials([*trials, Trial("simclr", 1, folder / "simclr-s1")])
    assert len(finished) == 6
    assert [(trial.arm, reason) for trial, reason in unfinished] == [
        ("ce", "no results.json"),
        ("simclr", "not started"),
    ]
    with pytest.raises(DataError, match="holds no run directory named"):
        find_trials(folder / "cache")


@pytest.mark.parametrize(
    ("name", "harm"), [("predictions.safetensors", None), ("predictions.safetensors", b"x"), ("config.yaml", None)]
)
def test_a_finished_trial_without_its_files_is_no_unfinished_one(tmp_path, name, harm):
    """The same command would not run it again, because it is finished: the comparison would lack it for good."""
    write_run(tmp_path, "a", 0, 0.1)
    path = tmp_path / "a-s0" / name
    path.unlink()
    if harm is not None:
        path.write_bytes(harm)
    with pytest.raises(DataError, match=f"{name}.*; .*move (it|the run) away and"):
        read_trials(find_trials(tmp_path))


def test_means_and_spreads_are_those_of_the_runs(folder, comparison):
    values = [
        json.loads((folder / f"supcon-s{seed}" / "results.json").read_text())["test.accuracy"] for seed in range(3)
    ]
    found = comparison.summaries["supcon"]["test.accuracy"]
    assert found.mean == pytest.approx(sum(values) / 3) and found.seeds == 3
    assert found.sd == pytest.approx(float(torch.tensor(values).std()), abs=1e-6)
    assert found.low <= found.mean <= found.high
    assert comparison.summaries["supcon"]["cost.seconds"] == dataclasses.replace(
        comparison.summaries["supcon"]["cost.seconds"], mean=101.0, sd=1.0, low=None, high=None
    )
    assert comparison.arms == ("supcon", "positives") and comparison.headline == "knn"
    assert comparison.groups == {"id": 16, "near_ood": 12, "far_ood": 12}


def test_differences_are_paired(comparison):
    found = comparison.differences["positives", "supcon"]["test.accuracy"]
    mirrored = comparison.differences["supcon", "positives"]["test.accuracy"]
    arms = [comparison.summaries[arm]["test.accuracy"] for arm in ("positives", "supcon")]
    assert found.mean == pytest.approx(arms[0].mean - arms[1].mean)
    assert (found.low, found.high) == pytest.approx((-mirrored.high, -mirrored.low))
    assert found.low > 0 and verdict(found, "test.accuracy") == "better"
    unpaired = (arms[0].high - arms[0].low) + (arms[1].high - arms[1].low)
    assert found.high - found.low < unpaired


def test_an_arm_does_not_differ_from_itself(tmp_path):
    write_run(tmp_path, "a", 0, 0.5)
    write_run(tmp_path, "b", 0, 0.5)
    finished, _ = read_trials(find_trials(tmp_path))
    both = compare(finished, resamples=50)
    assert both.baseline == "a"
    for metric, found in both.differences["a", "b"].items():
        assert found.mean == 0 and found.sd is None and found.low in (None, 0) and found.high in (None, 0), metric
        assert verdict(found, metric) == ""


def test_an_interval_of_a_share_ends_where_shares_end(tmp_path):
    """Two seeds far apart: Student's t reaches over both ends."""
    for arm, noises in (("a", (0.1, 5.0)), ("b", (5.0, 0.1))):
        for seed, noise in enumerate(noises):
            write_run(tmp_path, arm, seed, noise)
    finished, _ = read_trials(find_trials(tmp_path))
    both = compare(finished, resamples=50)
    found = both.summaries["a"]["test.accuracy"], both.differences["a", "b"]["test.accuracy"]
    assert [(one.low, one.high) for one in found] == [(0, 1), (-1, 1)]


def test_one_seed_gives_the_group_bootstrap_alone(folder):
    finished, _ = read_trials([Trial("supcon", 1, folder / "supcon-s1")])
    alone = compare(finished, resamples=100, seed=4)
    replicates = metric_replicates(finished[0].predictions, role_weights(finished[0].predictions, 100, seed=4))
    found = alone.summaries["supcon"]["test.near_ood.knn.auroc"]
    assert (found.low, found.high) == pytest.approx(percentile_interval(replicates["test.near_ood.knn.auroc"], 0.95))
    assert alone.differences == {} and found.sd is None


def test_the_order_of_images_in_a_run_does_not_matter(folder, comparison):
    finished, _ = read_trials(find_trials(folder))
    assert finished[0].predictions.paths[:2] == ("test/0.jpg", "test/1.jpg")
    shuffled = folder.parent / "shuffled" / "supcon-s0"

    def reverse(given):
        test = given["test"]
        flipped = dataclasses.replace(
            test,
            features_DF=test.features_DF.flip(0),
            labels_D=test.labels_D.flip(0),
            paths=test.paths[::-1],
            groups=test.groups[::-1],
        )
        return given | {"test": flipped}

    write_run(shuffled.parent, "supcon", 0, 1.5, change=reverse)
    (one,), _ = read_trials([Trial("supcon", 0, shuffled)])
    original = next(one for one in finished if one.trial == Trial("supcon", 0, folder / "supcon-s0"))
    assert one.predictions.paths == original.predictions.paths
    torch.testing.assert_close(one.predictions.scores["knn"], original.predictions.scores["knn"])


def test_runs_that_cannot_be_compared_are_refused(folder, tmp_path):
    finished, _ = read_trials(find_trials(folder))
    one, other = finished[0], next(one for one in finished if one.trial.arm == "supcon")

    def altered(**changes):
        return dataclasses.replace(other, **changes)

    moved = dataclasses.replace(other.predictions, groups=("x", *other.predictions.groups[1:]))
    with pytest.raises(DataError, match="supcon-s0 was judged on other test images"):
        compare([one, altered(predictions=moved)], resamples=10)
    relabeled = dataclasses.replace(other.predictions, labels_D=other.predictions.labels_D.flip(0))
    with pytest.raises(DataError, match="other test images, labels"):
        compare([one, altered(predictions=relabeled)], resamples=10)
    fewer = [dataclasses.replace(x, results=x.results | {"sha256.data.root": x.trial.arm}) for x in (one, other)]
    with pytest.raises(DataError, match="supcon-s0 read other images than .*positives-s0, which has the same seed"):
        compare(fewer, resamples=10)
    repainted = [
        dataclasses.replace(x, results=x.results | {"sha256.pipeline.path": x.trial.arm}) for x in (one, other)
    ]
    with pytest.raises(DataError, match="positives-s0 read pipeline.path 'embedded' with other weights in it"):
        compare(repainted, resamples=10)
    assert compare([one, repainted[1]], resamples=10).arms == ("positives", "supcon")  # an arm may use no pipeline
    with pytest.raises(DataError, match="headline score msp"):
        compare([one, altered(results=other.results | {"headline.score": "msp"})], resamples=10)
    second = altered(trial=Trial("supcon", 1, other.trial.path), settings=other.settings | {"learning.steps": 7})
    with pytest.raises(DataError, match="arm supcon: learning.steps is 300 at seed 0 and 7 at seed 1"):
        compare([other, second], resamples=10)
    with pytest.raises(DataError, match="no trial is finished"):
        compare([], resamples=10)
    with pytest.raises(DataError, match="baseline arm 'ce' has no finished trial"):
        compare([one], baseline="ce", resamples=10)
    path = write_run(tmp_path, "supcon", 0, 0.0)
    path.rename(tmp_path / "supcon-s5")
    with pytest.raises(DataError, match="run.seed=0, its name says 5"):
        read_trials(find_trials(tmp_path))
    (tmp_path / "supcon-s5").rename(tmp_path / "supcon-s0")
    (tmp_path / "supcon-s0" / "results.json").write_text("{")
    with pytest.raises(DataError, match="results.json: cannot be read"):
        read_trials(find_trials(tmp_path))


def test_all_dresses_show_the_same_numbers(tmp_path, comparison):
    paths = write_comparison(tmp_path, comparison, title="parts <64>", notes=("rendered, not photographed",))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    found = comparison.summaries["positives"]["test.accuracy"]
    mean = f"{100 * found.mean:.1f}"
    html, text = (tmp_path / "compare.html").read_text(), (tmp_path / "compare.txt").read_text()
    assert mean in text and f"[{100 * found.low:.1f}, {100 * found.high:.1f}]" in text
    shown = " ".join(parse(html).text)
    assert mean in shown and "parts <64>" in shown and "rendered, not photographed" in shown
    assert "ce, seed 0 (no results.json)" in shown and "unfinished: ce seed 0" in text
    assert "3 seeds (0, 1, 2)" in text and "16 groups (48 images) in-distribution" in text
    assert all(source.startswith("#") for source in parse(html).sources)
    assert "learning.extra_real_rows" in shown
    plain = json.loads((tmp_path / "compare.json").read_text())
    assert plain["arms"]["positives"]["test.accuracy"]["mean"] == found.mean
    assert plain["unfinished"][0]["arm"] == "ce" and plain["arm_settings"]["positives"] == {
        "learning.extra_real_rows": 5
    }
    for role in ("near-OOD", "far-OOD"):
        for metric in OOD_METRICS:
            table = text.split(f"{role} {metric}\n")[1].split("\n\n")[0].splitlines()
            assert table[0].split() == ["score", "supcon", "positives"]
            assert [line.split()[0] for line in table[1:]] == list(SCORES)
    value = comparison.summaries["supcon"]["test.far_ood.energy.fpr_id_at_ood_tpr95"].mean
    table = text.split("far-OOD fpr_id_at_ood_tpr95\n")[1]
    assert next(line for line in table.splitlines() if line.startswith("energy")).split()[1] == f"{100 * value:.1f}"
    representation = text.split("representation, mean over seeds\n")[1].splitlines()
    assert representation[1].split()[:2] == ["supcon", number(comparison.summaries["supcon"]["test.alignment"].mean)]
    figure = (tmp_path / "compare.svg").read_text()
    assert "var(--" not in figure and "xmlns" in figure


def test_long_rows_hold_every_trial_and_metric(comparison):
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert tuple(rows[0]) == ROW_COLUMNS
    metrics = len(comparison.summaries["supcon"])
    assert len(rows) == 6 * (metrics + 1) and metrics > 80
    one = next(row for row in rows if (row["arm"], row["seed"], row["metric"]) == ("supcon", "2", "test.accuracy"))
    assert one["seconds"] == "102.0" and one["commit"] == "abc123" and one["device"] == "Reference CPU"
    assert one["data"] == "embedded:parts64" and one["shots"] == "0" and one["steps"] == "300"


def test_without_resamples_there_are_means_and_no_intervals(folder):
    finished, _ = read_trials(find_trials(folder))
    bare = compare(finished, resamples=0)
    assert bare.summaries["supcon"]["test.accuracy"].low is None
    assert "[" not in as_text(bare) and "±" in as_text(bare)
    shown = " ".join(parse(as_html(bare, title="bare")).text)
    for dress in (as_text(bare), shown, json.loads(as_json(bare))["conditions"]):
        assert dress.count("interval") == 1 and "without intervals (evaluation.bootstrap=0)" in dress, dress


def test_every_arm_with_tokens_pays_for_them_whichever_learned_them(folder):
    finished, _ = read_trials(find_trials(folder))
    tokens = {"supcon": 0.0, "positives": 20.0, "positives_ood": 0.5}
    seconds = {"supcon": 50.0, "positives": 80.0, "positives_ood": 60.5}
    supcon = next(one for one in finished if one.trial.arm == "supcon" and one.trial.seed == 0)
    trials = [
        dataclasses.replace(
            supcon,
            trial=Trial(arm, 0, folder / f"{arm}-s0"),
            results=supcon.results
            | {"cost.seconds": seconds[arm], "seconds.stage.tokens": tokens[arm], "cost.images_generated": generated},
        )
        for arm, generated in (("supcon", 0), ("positives", 450), ("positives_ood", 450))
    ]
    found = compare(trials, resamples=10)
    fair = {"supcon": 50.0, "positives": 80.0, "positives_ood": 80.0}
    assert {arm: summary["cost.seconds"].mean for arm, summary in found.summaries.items()} == fair
    rows = [row for row in as_rows(found) if row["metric"] == "cost.seconds_with_tokens"]
    assert {row["arm"]: row["value"] for row in rows} == fair
    assert {row["arm"]: row["seconds"] for row in rows} == seconds


def test_a_binary_head_of_other_examples_is_said_not_to_compare(folder):
    finished, _ = read_trials(find_trials(folder))
    one, other = (next(x for x in finished if x.trial.arm == arm) for arm in ("positives", "supcon"))
    assert "does not compare" not in as_long_text(compare([one, other], resamples=10))
    source = one.results | {"binary_head.trained_on": "generated"}
    mixed = compare([dataclasses.replace(one, results=source), other], resamples=10)
    said = "does not compare across these arms, its head saw different OOD examples: generated in positives; "
    for text in (as_long_text(mixed), as_html(mixed, title="t"), as_json(mixed)):
        assert said in text
