"""Class tokens: files diffusers reads, foreign and missing ones refused, a bank that encodes a fixed prompt once."""

import copy
import shutil
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from safetensors import safe_open
from safetensors.torch import save_file

from modules.config import Pipeline
from modules.diffusion.pipeline import load_pipeline
from modules.diffusion.prompts import fill, placeholder
from modules.diffusion.tokens import (
    FILE,
    PromptBank,
    Tokens,
    cached_tokens,
    load_tokens,
    replace_tokens,
    safe_name,
    save_tokens,
    store_tokens,
    vocabulary_norms,
)
from modules.errors import ConfigError, DataError, StorageError
from modules.runtime import stream
from tests.tiny import pipeline_folder

CLASSES = ("Hex bolt", "../../etc/passwd", "Gehäuse 螺丝")
TEMPLATE = "a close-up photo of the {}"


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(Pipeline(path=str(pipeline_folder())))


def make_tokens(pipeline, num_vectors=1, classes=CLASSES, base_model=None):
    shape = (len(classes), num_vectors, pipeline.text_width)
    vectors = torch.randn(shape, generator=stream(0, "test tokens", num_vectors)) * 0.1
    return Tokens(classes, vectors, base_model or pipeline.digest, "object", 200, 3)


def test_a_file_holds_one_key_and_its_metadata(pipeline, tmp_path):
    tokens = make_tokens(pipeline, 2)
    for c, path in enumerate(save_tokens(tokens, tmp_path)):
        assert path.name == "learned_embeds.safetensors"
        with safe_open(path, "pt") as file:
            assert list(file.keys()) == [placeholder(CLASSES[c])]
            vectors = file.get_tensor(placeholder(CLASSES[c]))
            assert file.metadata() == {
                "base_model": pipeline.digest,
                "class": CLASSES[c],
                "initializer": "object",
                "images_seen": "200",
                "seed": "3",
            }
        assert vectors.shape == (2, pipeline.text_width) and vectors.dtype == torch.float32


def test_class_names_never_leave_the_directory(pipeline, tmp_path):
    paths = save_tokens(make_tokens(pipeline), tmp_path / "tokens")
    assert all(path.resolve().parent.parent == (tmp_path / "tokens").resolve() for path in paths)
    assert len({safe_name(label) for label in ("a b", "a-b", "a/b", "A b", "")}) == 5
    assert sorted(p.name for p in (tmp_path / "tokens").rglob("*") if p.is_file()) == [FILE] * 3


def test_saved_tokens_come_back_bit_for_bit_in_the_order_asked_for(pipeline, tmp_path):
    tokens = make_tokens(pipeline, 3)
    save_tokens(tokens, tmp_path)
    again = load_tokens(tmp_path, CLASSES[::-1], pipeline.digest)
    assert torch.equal(again.vectors_CKE, tokens.vectors_CKE.flip(0))
    assert (again.initializer, again.images_seen, again.seed) == ("object", 200, 3)


def test_a_missing_token_is_an_error(pipeline, tmp_path):
    save_tokens(make_tokens(pipeline), tmp_path)
    with pytest.raises(DataError, match="no token of class 'nut'"):
        load_tokens(tmp_path, (*CLASSES, "nut"), pipeline.digest)


def test_a_token_of_another_base_model_is_an_error_naming_both(pipeline, tmp_path):
    save_tokens(make_tokens(pipeline, base_model="f" * 64), tmp_path)
    with pytest.raises(DataError, match=f"{'f' * 16}.*{pipeline.digest[:16]}"):
        load_tokens(tmp_path, CLASSES, pipeline.digest)
    with pytest.raises(DataError, match="f" * 16):
        PromptBank(pipeline, make_tokens(pipeline, base_model="f" * 64))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path, v, m: path.write_bytes(b"\x80\x04cposix\nsystem\n."), "not a readable safetensors file"),
        (lambda path, v, m: path.write_bytes(path.read_bytes()[:-8]), "not a readable safetensors file"),
        (lambda path, v, m: save_file(v, path), "metadata lacks base_model, class"),
        (lambda path, v, m: save_file({"other": torch.ones(1, 32)}, path, m), "expected"),
        (lambda path, v, m: save_file(v | {"other": torch.ones(1, 32)}, path, m), "expected"),
        (lambda path, v, m: save_file(v, path, m | {"class": "nut"}), "'nut'"),
        (lambda path, v, m: save_file({k: x * torch.nan for k, x in v.items()}, path, m), "finite float32"),
        (lambda path, v, m: save_file({k: x.half() for k, x in v.items()}, path, m), "finite float32"),
        (lambda path, v, m: save_file({k: x.repeat(2, 1) for k, x in v.items()}, path, m), "other classes have"),
    ],
)
def test_a_damaged_file_is_named_and_never_unpickled(pipeline, tmp_path, damage, message):
    path = save_tokens(make_tokens(pipeline), tmp_path)[-1]
    with safe_open(path, "pt") as file:
        vectors, metadata = {k: file.get_tensor(k).clone() for k in file.keys()}, file.metadata()  # noqa: SIM118
    damage(path, vectors, metadata)
    with pytest.raises(DataError, match=message) as error:
        load_tokens(tmp_path, CLASSES, pipeline.digest)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_diffusers_loads_a_saved_token_and_embeds_the_same_prompt(pipeline, tmp_path, num_vectors):
    tokens = make_tokens(pipeline, num_vectors)
    paths = save_tokens(tokens, tmp_path)
    theirs = StableDiffusionImg2ImgPipeline(
        vae=pipeline.vae,
        text_encoder=copy.deepcopy(pipeline.text_encoder),
        tokenizer=copy.deepcopy(pipeline.tokenizer),
        unet=pipeline.unet,
        scheduler=DDIMScheduler.from_config(pipeline.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.random.fork_rng(devices=[]):  # resizing the embedding draws from the global generator
        theirs.load_textual_inversion(str(paths[0].parent))
        theirs.load_textual_inversion(str(paths[2]))
    bank = PromptBank(pipeline, tokens)
    for c in (0, 2):
        prompt = fill(TEMPLATE, placeholder(CLASSES[c]), "rusty")
        expected, empty = theirs.encode_prompt(prompt, "cpu", 1, True)
        assert torch.allclose(bank.fixed(TEMPLATE, "rusty", c), expected[0], atol=1e-6)
        assert torch.allclose(bank.empty(), empty[0], atol=1e-6)
    other = bank.fixed(TEMPLATE, "rusty", 1)
    assert (other - expected[0]).abs().max() > 1e-3, "the test cannot tell tokens apart"


def test_the_bank_encodes_a_fixed_prompt_once_and_forgets_the_longest_unused(pipeline):
    bank = PromptBank(pipeline, make_tokens(pipeline), capacity=2)
    first = bank.fixed(TEMPLATE, "", 0)
    assert bank.fixed(TEMPLATE, "", 0) is first and bank.encoded == 1
    bank.fixed(TEMPLATE, "", 1)
    bank.fixed(TEMPLATE, "", 0)
    bank.fixed(TEMPLATE, "", 2)  # drops class 1, class 0 was used since
    assert len(bank.kept) == 2 and bank.encoded == 3
    assert bank.fixed(TEMPLATE, "", 0) is first
    bank.fixed(TEMPLATE, "", 1)
    assert bank.encoded == 4 and not first.requires_grad


def test_mixed_vectors_are_encoded_each_time_and_agree_with_fixed_ones(pipeline):
    tokens = make_tokens(pipeline)
    bank = PromptBank(pipeline, tokens)
    mixed = bank.mixed(TEMPLATE, "old", tokens.vectors_CKE[1])
    assert torch.equal(mixed, bank.fixed(TEMPLATE, "old", 1))
    half = bank.mixed(TEMPLATE, "old", 0.5 * tokens.vectors_CKE[0] + 0.5 * tokens.vectors_CKE[1])
    assert (half - mixed).abs().max() > 1e-3
    assert len(bank.kept) == 1


def test_class_agnostic_prompts_show_the_initializer_for_every_class(pipeline):
    bank = PromptBank(pipeline, None, "gear")
    assert bank.fixed(TEMPLATE, "", 0) is bank.fixed(TEMPLATE, "", 1)
    with torch.no_grad():
        assert torch.equal(bank.fixed(TEMPLATE, "", 0), pipeline.embed(["a close-up photo of the gear"])[0])


def test_a_class_agnostic_word_that_was_never_trained_is_refused(pipeline, tmp_path):
    (tmp_path / "training.json").write_text('{"trained_words": ["object"]}')
    narrow = copy.copy(pipeline)
    narrow.source = str(tmp_path)
    PromptBank(narrow, None, "object")
    with pytest.raises(ConfigError, match="shows one word for every class"):
        PromptBank(pipeline, None, "keywords")
    with pytest.raises(ConfigError, match=r"inversion\.initializer: 'gear'"):
        PromptBank(narrow, None, "gear")


def test_vocabulary_norms_are_those_of_the_words_known(pipeline):
    rows = pipeline.text_encoder.get_input_embeddings().weight
    ids = pipeline.tokenizer.convert_tokens_to_ids(["bolt</w>", "gear</w>"])
    assert torch.allclose(vocabulary_norms(pipeline, frozenset({"gear", "bolt", "unheard"})), rows[ids].norm(dim=1))
    assert vocabulary_norms(pipeline).shape == (len(rows),)


def test_the_cache_returns_what_was_stored_and_keeps_the_first(pipeline, tmp_path):
    tokens = make_tokens(pipeline)
    assert cached_tokens(tmp_path, "k" * 64, CLASSES, pipeline.digest) is None
    store_tokens(tmp_path, "k" * 64, tokens)
    store_tokens(tmp_path, "k" * 64, make_tokens(pipeline, 2))
    found = cached_tokens(tmp_path, "k" * 64, CLASSES, pipeline.digest)
    assert torch.equal(found.vectors_CKE, tokens.vectors_CKE)
    assert [p.name for p in (tmp_path / "tokens").iterdir()] == ["k" * 64], "a partial entry was left behind"


def test_tokens_take_the_place_of_others_whole(pipeline, tmp_path, monkeypatch):
    folder, first, second = tmp_path / "tokens", make_tokens(pipeline), make_tokens(pipeline, 2)
    for left in ("tokens.partial", "tokens.former"):
        (tmp_path / left / "bolt").mkdir(parents=True)
    replace_tokens(first, folder)
    (folder / "report.json").write_text("[]")
    replace_tokens(second, folder)
    assert torch.equal(load_tokens(folder, CLASSES, pipeline.digest).vectors_CKE, second.vectors_CKE)
    assert not (folder / "report.json").exists(), "it told of other tokens"
    with monkeypatch.context() as patch:
        patch.setattr("modules.diffusion.tokens.safetensors_bytes", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            replace_tokens(first, folder)
    assert torch.equal(load_tokens(folder, CLASSES, pipeline.digest).vectors_CKE, second.vectors_CKE)
    monkeypatch.setattr("pathlib.Path.rename", mock.Mock(side_effect=OSError(30, "Read-only file system")))
    with pytest.raises(StorageError, match=f"{folder}: .*Read-only file system.*set run.dir"):
        replace_tokens(first, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


@pytest.mark.parametrize("damage", ["cut", "missing", "foreign"])
def test_a_cache_entry_that_cannot_be_used_says_what_to_delete(pipeline, tmp_path, damage):
    """To learn the tokens again is no way out: the same command finds the same entry."""
    entry = store_tokens(
        tmp_path, "k" * 64, make_tokens(pipeline, base_model="f" * 64 if damage == "foreign" else None)
    )
    if damage != "foreign":
        path = next(entry.rglob(FILE))
        path.write_bytes(path.read_bytes()[:-8])
    if damage == "missing":
        path.unlink()
    for _ in range(2):
        with pytest.raises(DataError, match=f"delete {entry} and start the same command again$") as error:
            cached_tokens(tmp_path, "k" * 64, CLASSES, pipeline.digest)
        assert "learn the" not in str(error.value)
    shutil.rmtree(entry)
    assert cached_tokens(tmp_path, "k" * 64, CLASSES, pipeline.digest) is None, "so the tokens are learned again"
    store_tokens(tmp_path, "k" * 64, make_tokens(pipeline))
    found = cached_tokens(tmp_path, "k" * 64, CLASSES, pipeline.digest)
    assert torch.equal(found.vectors_CKE, make_tokens(pipeline).vectors_CKE)


@pytest.mark.parametrize("step", ["write", "rename"])
def test_tokens_that_cannot_be_stored_name_the_folder_and_the_setting(pipeline, tmp_path, monkeypatch, step):
    def full(path, target):
        raise OSError(28, "No space left on device")

    if step == "write":
        (tmp_path / "tokens").write_text("a file where the folder should be")
    else:
        monkeypatch.setattr("pathlib.Path.rename", full)
    with pytest.raises(
        StorageError, match=f"{tmp_path / 'tokens'}.*free some disk space or set run.cache_dir"
    ) as error:
        store_tokens(tmp_path, "k" * 64, make_tokens(pipeline))
    assert "run.dir" not in str(error.value)
    assert not list(tmp_path.rglob("*.partial"))
