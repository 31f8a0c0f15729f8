"""Prompts: placeholders never collide, untrained words are refused by name, an initializer is one trained row."""

import dataclasses
import json

import pytest

from modules.config import Generation, Inversion, Pipeline
from modules.diffusion import prompts
from modules.diffusion.pipeline import load_pipeline
from modules.errors import ConfigError, DataError
from tests.tiny import WORDS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_placeholders_of_labels_with_equal_slugs_differ():
    labels = ["M8 x 20", "M8-x-20", "m8 x 20", "M8/x/20", "Gehäuse", "Geh use", "螺丝", "螺母", ""]
    names = [prompts.placeholder(label) for label in labels]
    assert len(set(names)) == len(labels)
    assert all(name == name.lower() and " " not in name for name in names)
    without_letters = {prompts.placeholder(chr(0x4E00 + i)) for i in range(3000)}
    assert len(without_letters) == 3000, "none of the slug tells these apart"


def test_a_filled_template_puts_the_condition_before_the_token():
    assert prompts.fill("a photo of a {}", "<t>", "brand new") == "a photo of a brand new <t>"
    assert prompts.fill("a photo of a {}", "<t>") == "a photo of a <t>"


def test_a_caption_loses_its_opening_only():
    assert prompts.phrase_of("A photo of a rusty photo frame") == "rusty photo frame"
    assert prompts.phrase_of("rusty photo of a chip") == "rusty photo of a chip"


def test_trained_words_come_from_training_json_and_are_absent_elsewhere(tmp_path):
    assert prompts.trained_words(tmp_path) is None
    path = tmp_path / "training.json"
    path.write_text(json.dumps({"steps": 3}))
    assert prompts.trained_words(tmp_path) is None
    path.write_text(json.dumps({"trained_words": ["Close-up", "rusty"]}))
    assert prompts.trained_words(tmp_path) == {"close", "up", "rusty"}


@pytest.mark.parametrize("text", ["{", "[1]", '{"trained_words": "rusty"}', '{"trained_words": [1]}'])
def test_a_broken_training_json_is_named(tmp_path, text):
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(DataError, match=r"training\.json"):
        prompts.trained_words(tmp_path)


def test_conditions_outside_the_trained_words_are_refused_with_a_suggestion():
    trained = frozenset(WORDS)
    prompts.check_prompts(prompts.OBJECT_TEMPLATES, ["", "rusty", "Brand new"], trained)
    with pytest.raises(ConfigError, match=r"generation\.conditions: 'rusted' .* rusty"):
        prompts.check_prompts(["a photo of a {}"], ["rusty", "very rusted"], frozenset(WORDS) | {"very"})
    with pytest.raises(ConfigError, match=r"generation\.templates: 'hologram'"):
        prompts.check_prompts(["a hologram of a {}"], [""], trained)


def test_a_foreign_checkpoint_knows_every_word():
    prompts.check_prompts(["a hologram of a {}"], ["iridescent"], None)


def test_every_prompt_of_a_run_is_measured_before_one_is_used():
    pipeline = load_pipeline(Pipeline(path="embedded"))
    assert pipeline.num_tokens - 2 == 30
    prose = "a " * 21 + "header"
    generation, inversion = Generation(templates=("a {}", "a photo of a {}")), Inversion(num_vectors=4)
    in_prose = dataclasses.replace(generation, conditions={"": 1.0, "keywords": 0.1})

    def refusal(*arguments) -> str:
        with pytest.raises(ConfigError) as error:
            prompts.check_generation(pipeline, *arguments)
        return str(error.value)

    prompts.check_generation(pipeline, in_prose, inversion, ((), (prose,)))
    message = refusal(in_prose, Inversion(num_vectors=5), ((), (prose,)))
    assert f"prompt 'a photo of a {prose} *' takes 31 tokens, the text encoder reads 30; shorten" in message
    assert "keyword of the class" in message and "inversion.num_vectors" in message
    prompts.check_generation(pipeline, generation, Inversion(num_vectors=5), ((), (prose,)))
    agnostic = Inversion(num_vectors=32, class_agnostic=True)
    prompts.check_generation(pipeline, in_prose, agnostic, ((prose,),))
    long_condition = dataclasses.replace(generation, conditions={"a " * 25 + "a": 1.0})
    assert "a object' takes 31" in refusal(long_condition, agnostic, ())
    short = dataclasses.replace(generation, templates=("{}",))
    prompts.check_generation(pipeline, short, Inversion(num_vectors=22), ())
    assert refusal(short, Inversion(num_vectors=27), ()).endswith("learned in it: lower inversion.num_vectors")


def test_the_initializer_is_the_row_of_its_word(tokenizer):
    row = prompts.initializer_id("object", tokenizer, None)
    assert tokenizer.convert_ids_to_tokens(row) == "object</w>"
    assert prompts.initializer_id("Object", tokenizer, frozenset(WORDS)) == row


@pytest.mark.parametrize(
    "word, trained, message",
    [
        ("screws", None, r"'screws' is not one token .* 'screw' would do"),
        ("zzqy", None, r"'zzqy' is not one token .* 'object' would do"),
        ("gear", frozenset({"object", "bolt"}), r"'gear' in 'gear' was never seen"),
        ("hex bolt", None, "not one word"),
        ("", None, "not one word"),
    ],
)
def test_an_initializer_without_a_trained_row_of_its_own_is_refused(tokenizer, word, trained, message):
    with pytest.raises(ConfigError, match=message):
        prompts.initializer_id(word, tokenizer, trained)
