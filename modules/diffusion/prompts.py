"""Prompt templates, condition words, initializers and placeholder names: their only owner.

The 27 object templates follow the list of Textual Inversion (2208.01618), less its "clean" and "dirty" lines: here
those words are conditions that a caption may contradict.

A small text encoder knows the words of its captions and no others: an unknown word is split into byte pairs that were
never trained together and moves the picture at random. A pipeline that lists its words (`training.json`, key
"trained_words") has every word of a prompt checked against the list; one that does not (Stable Diffusion) is trusted.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from modules.config import Generation, Inversion
from modules.diffusion.pipeline import SLOT, StableDiffusion
from modules.errors import ConfigError, DataError

OBJECT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a photo of the {}",
    "a dark photo of the {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
    "a picture of a {}",
    "a picture of the {}",
    "an image of a {}",
)
LINKING = frozenset(
    ["a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with", "without"]
)  # start no class vector
FALLBACK = "object"  # initializer of a class without a keyword that could be one
KEYWORDS = "keywords"  # as initializer or condition: each class's own words, as MVIP's meta.json describes it
CAPTION_PREFIX = re.compile(r"^(a|an|the) (photo|picture|image|rendering) of (a|an|the) ", re.IGNORECASE)


def phrase_of(caption: str) -> str:
    """What a caption shows, without its opening: "a photo of a rusty chip" -> "rusty chip"."""
    return CAPTION_PREFIX.sub("", caption.strip())


def fill(template: str, token: str, condition: str = "") -> str:
    """The prompt that shows `token` (a word or placeholders) in a condition: ("a photo of a {}", "<t>", "rusty")."""
    return template.format(f"{condition} {token}".strip())


def placeholder(label: str) -> str:
    """The placeholder token of a class: a slug plus 8 digits of a hash, which tell labels without ASCII letters apart.

    "M8 x 20 / zinc" -> "<m8-x-20-zinc-f39b20e7>"
    """
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:24]
    return f"<{slug or 'class'}-{hashlib.sha256(label.encode()).hexdigest()[:8]}>"


def words_of(text: str) -> list[str]:
    """The words of a prompt in lower case, slots and punctuation aside: "a close-up of the {}" -> a, close, up, of, the."""
    return re.findall(r"[^\W_]+", text.lower())


def trained_words(folder: str | Path) -> frozenset[str] | None:
    """The words a pipeline's text encoder was trained on, or None for a pipeline that does not list them.

    Raises: DataError for a training.json that is not JSON or whose "trained_words" is not a list of words.
    """
    path = Path(folder) / "training.json"
    if not path.is_file():
        return None
    try:
        words = json.loads(path.read_text(encoding="utf-8")).get("trained_words")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a JSON object ({error}); restore the file or remove it") from error
    if words is None:
        return None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{path}: trained_words is {type(words).__name__}, expected a list of words")
    return frozenset(part for word in words for part in words_of(word))


def refuse_untrained(text: str, trained: frozenset[str] | None, setting: str) -> None:
    """Refuse a prompt, condition or word that holds an untrained word; with `trained` None every word counts as trained.

    Raises: ConfigError naming the setting, the word and the closest trained words.
    """
    if trained is None:
        return
    for word in words_of(text):
        if word not in trained:
            near = difflib.get_close_matches(word, sorted(trained), 3) or sorted(trained)[:3]
            raise ConfigError(
                f"{setting}: {word!r} in {text!r} was never seen by this pipeline's text encoder; "
                f"words it knows, for instance: {', '.join(near)}"
            )


def check_prompts(templates: Iterable[str], conditions: Iterable[str], trained: frozenset[str] | None) -> None:
    """Refuse templates and condition words of generation with a word that the text encoder was not trained on.

    Raises: ConfigError naming the setting, the word and the closest trained words.
    """
    for template in templates:
        refuse_untrained(template, trained, "generation.templates")
    for condition in conditions:
        if condition != KEYWORDS:  # a class's words are checked where they are known
            refuse_untrained(condition, trained, "generation.conditions")


def initializer_id(word: str, tokenizer, trained: frozenset[str] | None) -> int:
    """The vocabulary row of the word that starts every class vector.

    Raises: ConfigError for an empty or untrained word, and for one the tokenizer splits (its parts are no word's row).
    """
    if len(words_of(word)) != 1:
        raise ConfigError(f"inversion.initializer: {word!r} is not one word; a known noun such as 'object' would do")
    refuse_untrained(word, trained, "inversion.initializer")
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = " + ".join(tokenizer.convert_ids_to_tokens(ids))
        raise ConfigError(
            f"inversion.initializer: {word!r} is not one token of this pipeline's vocabulary (it splits into {pieces}), so "
            f"no trained row could start a class vector; {_single_word_like(word, tokenizer, trained)!r} would do"
        )
    return ids[0]


def class_initializers(keywords: Sequence[Sequence[str]], tokenizer, trained: frozenset[str] | None) -> tuple[str, ...]:
    """The word that starts each class's vectors: its first keyword that is one trained token, else "object".

    A keyword of several words, as where a description is prose, offers each of them, the last first: of "a round metal
    part" that is the noun.

    Raises: ConfigError where no class has such a keyword: the setting would do nothing.
    """
    words = []
    for candidates in keywords:
        singles = [keyword for keyword in candidates if len(words_of(keyword)) == 1]
        parts = [
            word
            for keyword in candidates
            if keyword not in singles
            for word in reversed(words_of(keyword))
            if word not in LINKING
        ]
        known = (word for word in (*singles, *parts) if _has_row(word, tokenizer, trained))
        words.append(next(known, FALLBACK))
    if all(word == FALLBACK for word in words):
        raise ConfigError(
            f"inversion.initializer is {KEYWORDS!r}, but no class has a keyword that is one word of this pipeline's "
            f"vocabulary; name a noun such as {FALLBACK!r}"
        )
    return tuple(words)


def _has_row(word: str, tokenizer, trained: frozenset[str] | None) -> bool:
    try:
        initializer_id(word, tokenizer, trained)
    except ConfigError:
        return False
    return True


def check_keywords(keywords: Sequence[Sequence[str]], trained: frozenset[str] | None) -> None:
    """Refuse class keywords that cannot serve as condition words.

    Raises: ConfigError where no class has any, or one holds a word the text encoder was not trained on.
    """
    if not any(keywords):
        raise ConfigError(
            f"generation.conditions holds {KEYWORDS!r}, but no class of this set has keywords; name condition words"
        )
    for word in sorted({word for words in keywords for word in words}):
        refuse_untrained(word, trained, "generation.conditions (keywords of the set)")


def drawn_prompts(
    templates: Iterable[str], conditions: Mapping[str, float], keywords: Sequence[Sequence[str]], token: str
) -> list[str]:
    """Every prompt that generation may show `token` in: each template in each condition of some weight.

    The condition `keywords` stands for the keywords of each class, and for none where a class has none.
    """
    words = [word for word, weight in conditions.items() if weight > 0 and word != KEYWORDS]
    if conditions.get(KEYWORDS, 0) > 0:
        words += [word for own in keywords for word in (own or ("",))]
    return [fill(template, token, word) for template in templates for word in dict.fromkeys(words)]


def check_generation(
    pipeline: StableDiffusion, generation: Generation, inversion: Inversion, keywords: Sequence[Sequence[str]]
) -> None:
    """Refuse settings that may make a prompt, however rare, that the pipeline cannot read.

    Args:
        keywords: of each class.

    Raises: ConfigError for a word the text encoder was not trained on, and a prompt that is longer than it reads: one of
    generation, or one that class tokens are learned in.
    """
    trained = trained_words(pipeline.source)
    check_prompts(generation.templates, generation.conditions, trained)
    if generation.conditions.get(KEYWORDS, 0) > 0:
        check_keywords(keywords, trained)
    token, num_vectors = (inversion.initializer, 0) if inversion.class_agnostic else (SLOT, inversion.num_vectors)
    pipeline.check_lengths(drawn_prompts(generation.templates, generation.conditions, keywords, token), num_vectors)
    if num_vectors:
        learned = [fill(template, SLOT) for template in OBJECT_TEMPLATES]
        pipeline.check_lengths(learned, num_vectors, "class tokens are learned in it: lower inversion.num_vectors")


def _single_word_like(word: str, tokenizer, trained: frozenset[str] | None) -> str:
    """The word closest in spelling that has a row of its own; "object" where none is close."""
    whole = {entry.removesuffix("</w>") for entry in tokenizer.get_vocab() if entry.endswith("</w>")}
    candidates = sorted(w for w in (whole if trained is None else whole & trained) if w.isalpha())
    return (difflib.get_close_matches(word.lower(), candidates, 1, 0.75) or ["object"])[0]
