"""Settings: defaults < file < command line, with origins, suggestions and one clear message for every mistake."""

import re
from pathlib import Path

import pytest
import yaml

from modules.config import Config, PipelineConfig
from modules.data.sources import resolve_root
from modules.diffusion.checkpoints import locate
from modules.errors import ConfigError, DataError
from modules.rules import batch_rows
from modules.settings import flatten, load_config, to_yaml, with_settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run: {seed: 3}\nlearning: {lr: 1e-3, steps: 200}\n")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    schema = PipelineConfig if path.stem == "train_pipeline" else Config
    config, origins = load_config(path, schema=schema)
    assert config.run.name == path.stem
    assert any(origin == str(path) for origin in origins.values())


def test_command_line_beats_file_beats_default(file):
    config, origins = load_config(file, ["run.seed=5", "learning.crop_scale=[0.5, 1]"])
    assert (config.run.seed, config.learning.lr, config.learning.crop_scale) == (5, 1e-3, (0.5, 1.0))
    assert origins["run.seed"] == "command line"
    assert origins["learning.lr"] == str(file)
    assert origins["learning.momentum"] == "default"
    assert config.run.name == "mine"


@pytest.mark.parametrize(("written", "meant"), [("on", "on"), ("off", "off"), ("'on'", "on"), ("auto", "auto")])
def test_on_and_off_need_no_quotes(tmp_path, written, meant):
    path = tmp_path / "mine.yaml"
    path.write_text(f"pipeline: {{compile: {written}}}\n")
    assert load_config(path)[0].pipeline.compile == meant
    assert load_config(path, [f"pipeline.compile={written}"])[0].pipeline.compile == meant


@pytest.mark.parametrize("name", ["0123", "12:30", "1_000", "yes", "2024-02-30", "2024-01-31", "1e3"])
def test_a_text_stays_as_it_is_written(tmp_path, name):
    path = tmp_path / "mine.yaml"
    path.write_text(f"run: {{name: {name}}}\n")
    assert load_config(path)[0].run.name == name
    assert load_config(path, [f"run.name={name}x"])[0].run.name == f"{name}x"
    assert load_config(path, [f"data.root={name}"])[0].data.root == name
    for nothing in ("~", "#a remark"):
        assert load_config(path, [f"run.name={nothing}"])[0].run.name == "mine"


@pytest.mark.parametrize(("written", "meant"), [("010", 10), ("007", 7), ("09", 9), ("0", 0), ("0x10", 16)])
def test_a_number_with_leading_zeros_is_not_octal(tmp_path, written, meant):
    """Seeds made by `seq -w` would else be others than they say, and two of them the same."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"run: {{seed: {written}}}\n")
    assert load_config(path)[0].run.seed == meant
    assert load_config(path, [f"run.seed={written}"])[0].run.seed == meant


@pytest.mark.parametrize("setting", ["run.seed=1:30", "learning.lr=1:30", "learning.lr=1:30.5"])
def test_a_time_of_day_is_no_number(file, setting):
    with pytest.raises(ConfigError, match=r"is '1:30(\.5)?'; expected a( whole)? number"):
        load_config(file, [setting])


def test_the_home_is_meant_by_a_tilde_wherever_a_place_is_named(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config, _ = load_config(file, ["run.dir=~/runs", "run.cache_dir=~/cache", "data.root=~/parts"])
    assert (config.run.dir, config.run.cache_dir) == (str(tmp_path / "runs"), str(tmp_path / "cache"))
    with pytest.raises(DataError, match="`data.root` '~/parts' does not exist"):
        resolve_root(config.data.root)
    (tmp_path / "parts").mkdir()
    assert resolve_root(config.data.root) == tmp_path / "parts"
    with pytest.raises(DataError, match="'~nosuchuser/parts' does not exist"):
        resolve_root("~nosuchuser/parts")
    with pytest.raises(DataError, match="~nosuchuser/sd does not exist"):
        locate(with_settings(config, {"pipeline.path": "~nosuchuser/sd"}).pipeline)


def test_a_section_may_take_settings_from_a_mapping(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning:\n  <<: {lr: 0.1, steps: 7}\n  steps: 9\n  warmup_steps: 0\n")
    config, _ = load_config(path)
    assert (config.learning.lr, config.learning.steps) == (0.1, 9)


def test_resolved_yaml_reads_back_as_the_same_config(file):
    config, origins = load_config(file, ["generation.strengths={0.25: 1, 0.5: 2}", "data.near_ood_classes=[a, b]"])
    again = yaml.safe_load(to_yaml(config, origins))
    for name, value in flatten(config).items():
        section, key = name.split(".")
        assert again[section][key] == (list(value) if isinstance(value, tuple) else value), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning.lrr=3", r"unknown setting `learning.lrr`; did you mean `learning.lr`"),
        ("learning.images_per_step=3", r"did you mean `generation.images_per_step`"),
        ("lerning.lr=3", r"unknown section `lerning`; did you mean `learning`"),
        ("learning.lr", r"is not section.key=value"),
        ("learning.lr=fast", r"`learning.lr` is 'fast'; expected a number"),
        ("learning.steps=1.5", r"`learning.steps` is 1.5; expected a whole number"),
        ("gate.enabled=3", r"`gate.enabled` is 3; expected true or false"),
        ("learning.crop_scale=[1]", r"`learning.crop_scale` is \[1\]; expected a list of 2 in brackets, each a number"),
        ("data.near_ood_classes=pin", r"expected a list in brackets, each entry a text"),
        ("generation.strengths=0.4", r"expected pairs of choice and weight"),
        ("steps=5", r"unknown section `steps`; did you mean `learning.steps` or `tune.steps`"),
        ("probe.steps=5", r"unknown setting `probe.steps`; did you mean `learning.steps` or `tune.steps`"),
        ("learning.lr=.nan", r"`learning.lr` is nan"),
        ("learning.method=supcom", r"choose one of supcon, cross_entropy, simclr"),
        ("learning.temperature=0", r"`learning.temperature` is 0.0; it must lie in \(0, inf\)"),
        ("generation.synthetic_fraction=1", r"\[0, 1\)"),
        ("generation.images_per_step=0.1", r"feeds only 0.8; raise images_per_step to 4"),
        ("generation.strengths={0.02: 1}", r"int\(20 x 0.02\) = 0 denoising steps"),
        ("near_ood.strength=0.01", r"= 0 denoising steps"),
        ("near_ood.negative_guidance=1", r"`near_ood.negative_guidance` is 1.0; it must lie in \(-inf, 0\]"),
        ("generation.strengths={weak: 1}", r"`generation.strengths` holds 'weak'; a strength is a number in \(0, 1\]"),
        ("generation.strengths={yes: 1}", r"`generation.strengths` holds True; a strength is a number"),
        ("generation.strengths={2024-01-31: 1}", r"holds datetime.date\(2024, 1, 31\); a strength is a number"),
        ("generation.strengths={1.5: 1}", r"`generation.strengths` holds 1.5; a strength lies in \(0, 1\]"),
        ("near_ood.mix=[0.6, 0.4]", r"`near_ood.mix` is \[0.6, 0.4\]; it must be a rising pair inside \(0, 1\)"),
        ("near_ood.recipes={dream: 1}", r"names 'dream'; choose from strength"),
        ("near_ood.recipes={strength: 0}", r"at least one weight above 0"),
        ("near_ood.recipes={strength: 1.0e+308, foreign: 1.0e+308}", r"none below, and a finite sum"),
        ("generation.templates=[a photo]", r"needs exactly one \{\}"),
        ("generation.templates=['a {} of a {}']", r"needs exactly one \{\}"),
        ("generation.templates=['a {name}']", r"needs exactly one \{\}"),
        ("generation.templates=['a {0}']", r"needs exactly one \{\}"),
        ("generation.templates=['a {} {']", r"needs exactly one \{\}"),
        ("generation.templates=[]", r"`generation.templates` is empty"),
        ("near_ood.jigsaw_grid=1", r"`near_ood.jigsaw_grid` is 1; it must lie in \[2, 32\]"),
        ("gate.refresh_every=0", r"`gate.refresh_every` is 0; it must lie in \[1, inf\)"),
        ("controller.update_every=0", r"`controller.update_every` is 0; it must lie in \[1, inf\)"),
        ("controller.target_low=0.9", r"`controller.target_low` is 0.9 .* the band must rise"),
        ("controller.target_low=0.85", r"`controller.target_low` is 0.85 .* the band must rise"),
        ("probe.lrs=[]", r"`probe.lrs` is \[\]; name at least one"),
        ("learning.method=cross_entropy", r"needs learning.outlier_exposure > 0"),
        ("learning.warmup_steps=500", r"does not end before learning.steps"),
        ("learning.jitter=[-1, 0, 0, 0]", r"`learning.jitter` is \[-1.0, 0.0, 0.0, 0.0\]; .* are 0 or more"),
        ("learning.jitter=[0, 0, 0, 0.6]", r"hue at most 0.5, half a turn"),
        ("pipeline.resolution=-5", r"`pipeline.resolution` is -5; it must lie in \[0, 8192\]"),
        ("data.num_classes=-2", r"`data.num_classes` is -2; it must lie in \[0, inf\)"),
        (
            "evaluation.bootstrap=39",
            r"`evaluation.bootstrap` is 39: too few for the ends of a 0.95 interval; set it to 40 or more, as 1000,",
        ),
        ("evaluation.confidence=0.999", "set it to 2000 or more, as 20000,"),
        ("run.dir=", r"`run.dir` is empty"),
        ("run.name=.", r"`run.name` is '.'; it must name a directory below run.dir"),
        ("run.name=cache", r"`run.name` is 'cache', but runs/cache holds the class tokens"),
        ("run.name=cache/tokens", r"but runs/cache holds the class tokens"),
        ('run.name="a\\0b"', r"`run.name` is 'a\\x00b'; expected a text"),
        ("learning.steps=2024-02-30", r"'learning.steps=2024-02-30': the value is not valid YAML"),
        (f"learning.steps={'9' * 5000}", r"the value is not valid YAML"),
        ("learning.steps=!!bool x", r"the value is not valid YAML"),
        ("run.threads=100000", r"`run.threads` is 100000; it must lie in \[0, 1024\]"),
        ("tune.grid=[]", r"`tune.grid` is \[\]; name images a step to try"),
        ("tune.grid=[-1, 2]", r"`tune.grid` is \[-1.0, 2.0\]; name images a step to try"),
    ],
)
def test_a_mistake_gets_one_clear_message(file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(file, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.warmup_steps=0", r"`training.warmup_steps` is 0; it must lie in \[1, inf\)"),
        ("run.keep_checkpoints=0", r"`run.keep_checkpoints` is 0"),
        ("shape.resolution=50", r"halve it 4 times, so it must be a multiple of 16"),
        ("shape.vae_channels=[20, 40]", r"`shape.vae_channels` is \(20, 40\); it takes multiples of 16"),
        ("shape.unet_channels=[0, 8, 16]", r"it takes multiples of 8"),
        ("shape.text_width=90", r"`shape.text_width` is 90; it takes multiples of 4"),
        ("shape.text_heads=0", r"shape.text_heads"),
        ("training.further_vae_steps=5", r"trains the VAE of training.start on, and training.start is empty"),
        ("learning.steps=3", r"unknown section `learning`"),
    ],
)
def test_a_pipeline_to_be_made_has_rules_too(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIGS / "train_pipeline.yaml", [override], schema=PipelineConfig)


@pytest.mark.parametrize(
    "overrides",
    [
        ["generation.max_uses=10", "generation.images_per_step=1.5"],
        ["generation.max_uses=10"],
        ["generation.max_uses=7", "generation.images_per_step=0.3", "generation.synthetic_fraction=0.61"],
        ["generation.max_uses=3", "generation.images_per_step=0.007", "learning.rows_per_class=1"],
        ["generation.max_uses=30", "generation.images_per_step=0", "generation.synthetic_fraction=0.01"],
    ],
)
def test_a_fraction_that_cannot_be_fed_can_be_fed_as_advised(overrides):
    with pytest.raises(ConfigError, match="raise images_per_step to") as error:
        load_config(CONFIGS / "demo.yaml", overrides)
    advised = re.findall(r"(images_per_step|max_uses) to ([\d.e-]+)", str(error.value))
    assert len(advised) == (1 if "generation.images_per_step=0" in overrides else 2)
    for name, value in advised:
        config, _ = load_config(CONFIGS / "demo.yaml", [*overrides, f"generation.{name}={value}"])
        assert getattr(config.generation, name) == float(value)


def test_rows_a_batch_are_those_of_the_classes_further_ones_and_generated_ones(file):
    learning = ["learning.classes_per_batch=6", "learning.rows_per_class=4", "learning.extra_real_rows=5"]
    assert batch_rows(load_config(file, [*learning, "generation.synthetic_fraction=0.4"])[0]) == pytest.approx(45)
    assert batch_rows(load_config(file, [*learning, "generation.synthetic_fraction=0"])[0]) == 29


def test_supcon_needs_two_rows(file):
    one_class = ["learning.classes_per_batch=1", "learning.rows_per_class=2"]
    load_config(file, one_class)
    with pytest.raises(ConfigError, match="is 1; SupCon needs two rows or more"):
        load_config(file, [*one_class, "learning.rows_per_class=1"])


def test_a_strength_that_no_recipe_uses_does_no_harm(file):
    config, _ = load_config(file, ["near_ood.strength=0.01", "near_ood.recipes={jigsaw: 1, foreign: 0}"])
    assert config.near_ood.strength == 0.01


def test_near_ood_terms_belong_to_supcon(file):
    term = "learning.ood_variant=prototype_push"
    with pytest.raises(ConfigError, match="ood_variant belongs to supcon"):
        load_config(file, ["learning.method=simclr", term])
    classic = ["learning.method=cross_entropy", "learning.outlier_exposure=0.5"]
    with pytest.raises(ConfigError, match="'prototype_push' .* cross_entropy does not read"):
        load_config(file, [*classic, term])
    load_config(file, classic)


def test_a_roundtrip_without_a_decoder_is_refused(file):
    with pytest.raises(ConfigError, match="nothing is generated and no VAE is loaded"):
        load_config(file, ["generation.roundtrip_fraction=0.2", "generation.synthetic_fraction=0"])


@pytest.mark.parametrize("section", ["gate", "controller"])
def test_a_gate_that_would_judge_nothing_is_refused(section):
    settings = [f"{section}.enabled=true", "learning.steps=60", "gate.start_step=60"]
    with pytest.raises(ConfigError, match=f"{section}.enabled is true, but gate.start_step is 60 of learning.steps 60"):
        load_config(CONFIGS / "demo.yaml", settings)
    load_config(CONFIGS / "demo.yaml", [*settings, "gate.start_step=59"])
    load_config(CONFIGS / "demo.yaml", settings[1:])


def test_a_grid_that_no_recipe_uses_does_no_harm(file):
    assert load_config(file, ["near_ood.jigsaw_grid=5"])[0].near_ood.jigsaw_grid == 5
    for recipe in ("jigsaw", "jigsaw_roundtrip"):
        with pytest.raises(ConfigError, match="does not divide data.image_size 64"):
            load_config(file, ["near_ood.jigsaw_grid=5", f"near_ood.recipes={{foreign: 1, {recipe}: 1}}"])


def test_file_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("run: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(bad)
    bad.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected sections"):
        load_config(bad)
    bad.write_text("run: 3\n")
    with pytest.raises(ConfigError, match="must hold key: value"):
        load_config(bad)
    bad.write_text("run: {seed: 1}\nlearning:\n  lr: 0.1\nrun: {name: a}\n")
    with pytest.raises(ConfigError, match=f"{bad}: `run` is given twice, on lines 1 and 4; join the two"):
        load_config(bad)
    bad.write_text("generation:\n  strengths: {0.5: 1, .50: 2}\n")
    with pytest.raises(ConfigError, match="`0.5` is given twice, on lines 2 and 2"):
        load_config(bad)
    bad.write_text("run: {name: a}\n")
    with pytest.raises(ConfigError, match=r"command line: .* `rusty` is given twice, .*; name it once"):
        load_config(bad, ["generation.conditions={rusty: 1, rusty: 2}"])
    bad.write_bytes("run: {name: Gehäuse}\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=f"{bad}: the config file is not UTF-8 text.*save it as UTF-8"):
        load_config(bad)


@pytest.mark.parametrize("word", ["no", "1", "~", "2024-01-01"])
def test_a_condition_that_yaml_takes_for_no_word_must_be_quoted(file, word):
    with pytest.raises(ConfigError, match=r"`generation.conditions` holds .* quote the word, as in \{'no': 1.0\}"):
        load_config(file, [f"generation.conditions={{{word}: 1, rusty: 2}}"])
    config, origins = load_config(file, [f"generation.conditions={{'{word}': 1, rusty: 2}}"])
    assert config.generation.conditions == {word: 1.0, "rusty": 2.0}
    assert yaml.safe_load(to_yaml(config, origins))["generation"]["conditions"] == config.generation.conditions


def test_yaml_cannot_run_code(tmp_path):
    bad = tmp_path / "bomb.yaml"
    bad.write_text(f"run: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'boom'}]\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(bad)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(bad, ["run.name=!!python/name:os.getcwd"])
    assert not (tmp_path / "boom").exists()


def test_with_settings_checks_the_rules_again(file):
    config, _ = load_config(file)
    assert with_settings(config, {"learning.steps": 99}).learning.steps == 99
    with pytest.raises(ConfigError, match="method"):
        with_settings(config, {"learning.method": "none"})


def test_the_strength_that_a_refusal_advises_is_let_through(file):
    steps = "generation.num_inference_steps=3"
    with pytest.raises(ConfigError, match="= 0 denoising steps") as refused:
        load_config(file, [steps, "generation.strengths={0.333: 1}"])
    advised = re.search("at least ([.0-9]+)", str(refused.value))[1]
    load_config(file, [steps, f"generation.strengths={{{advised}: 1}}"])
