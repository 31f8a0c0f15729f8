"""Prompt templates, condition words, initializers and placeholder names: this module alone defines them.

The 27 object templates follow the list of Textual Inversion (2208.01618), without its "clean" and "dirty" lines: here
those words are conditions, which a caption may contradict.

A small text encoder knows only the words of its captions: an unknown word is split into byte pairs that were never
trained together and changes the image at random. If a pipeline lists its words (`training.json`, key "trained_words"),
every word of a prompt is checked against the list; if it does not (Stable Diffusion), it is trusted.
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
)  # words of a description that cannot initialize a class vector
FALLBACK = "object"  # initializer of a class none of whose keywords can be one
KEYWORDS = (
    "keywords"  # as initializer or condition: each class's own words, such as the description in MVIP's meta.json
)
CAPTION_PREFIX = re.compile(r"^(a|an|the) (photo|picture|image|rendering) of (a|an|the) ", re.IGNORECASE)


def phrase_of(caption: str) -> str:
    """The caption without its opening: "a photo of a rusty chip" -> "rusty chip"."""
    return CAPTION_PREFIX.sub("", caption.strip())


def fill(template: str, token: str, condition: str = "") -> str:
    """The prompt for a word or placeholder: ("a photo of a {}", "<t>", "rusty") -> "a photo of a rusty <t>"."""
    return template.format(f"{condition} {token}".strip())


def placeholder(label: str) -> str:
    """The placeholder token of a class: a slug, and 8 hash digits that also distinguish labels without ASCII letters.

    "M8 x 20 / zinc" -> "<m8-x-20-zinc-f39b20e7>"
    """
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:24]
    return f"<{slug or 'class'}-{hashlib.sha256(label.encode()).hexdigest()[:8]}>"


def words_of(text: str) -> list[str]:
    """Lowercase words of a prompt without slots and punctuation: "a close-up of the {}" -> a, close, up, of, the."""
    return re.findall(r"[^\W_]+", text.lower())


def trained_words(folder: str | Path) -> frozenset[str] | None:
    """The words that a pipeline's text encoder was trained on; None if the pipeline does not list them.

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
    """Check that every word of a prompt, condition or word list is trained; with `trained` None all are.

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
    """Check that the templates and condition words of generation hold only words the text encoder was trained on.

    Raises: ConfigError naming the setting, the word and the closest trained words.
    """
    for template in templates:
        refuse_untrained(template, trained, "generation.templates")
    for condition in conditions:
        if condition != KEYWORDS:  # keywords of classes are checked by `check_keywords`
            refuse_untrained(condition, trained, "generation.conditions")


def initializer_id(word: str, tokenizer, trained: frozenset[str] | None) -> int:
    """The vocabulary row of a word that initializes class vectors.

    Raises: ConfigError for a text that is not one trained word, or a word that the tokenizer splits: it has no row.
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
    """The word that initializes each class's vectors: its first keyword that is one trained token, else "object".

    Keywords of one word come first. Of a keyword of several words, because the description is prose, each word is a
    candidate, starting with the last: in "a round metal part" that is the noun.

    Raises: ConfigError if no class has such a keyword: the setting would have no effect.
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
    """Check that class keywords can serve as condition words.

    Raises: ConfigError if no class has keywords, or one holds a word that the text encoder was not trained on.
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
    """Every prompt in which generation may show `token`: each template with each condition of positive weight.

    The condition `keywords` stands for the keywords of all classes, and for no condition if a class has none.
    """
    words = [word for word, weight in conditions.items() if weight > 0 and word != KEYWORDS]
    if conditions.get(KEYWORDS, 0) > 0:
        words += [word for own in keywords for word in (own or ("",))]
    return [fill(template, token, word) for template in templates for word in dict.fromkeys(words)]


def check_generation(
    pipeline: StableDiffusion, generation: Generation, inversion: Inversion, keywords: Sequence[Sequence[str]]
) -> None:
    """Check that the pipeline can read every prompt that these settings may ever make.

    Args:
        keywords: of each class.

    Raises: ConfigError for a word that the text encoder was not trained on, and for a prompt that is too long for it,
    whether it is used to generate or to learn class tokens.
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
    """The word closest in spelling that has its own row; "object" if none is close."""
    whole = {entry.removesuffix("</w>") for entry in tokenizer.get_vocab() if entry.endswith("</w>")}
    candidates = sorted(w for w in (whole if trained is None else whole & trained) if w.isalpha())
    return (difflib.get_close_matches(word.lower(), candidates, 1, 0.75) or ["object"])[0]
