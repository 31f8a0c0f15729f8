"""Prompt templates, condition words and placeholder names: their only owner.

The 27 object templates follow the list of Textual Inversion (2208.01618), less its "clean" and "dirty" lines: here
those words are conditions that a caption may contradict.
"""

import hashlib
import re

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
CAPTION_PREFIX = re.compile(r"^(a|an|the) (photo|picture|image|rendering) of (a|an|the) ", re.IGNORECASE)


def phrase_of(caption: str) -> str:
    """What a caption shows, without its opening: "a photo of a rusty chip" -> "rusty chip"."""
    return CAPTION_PREFIX.sub("", caption.strip())


def fill(template: str, token: str, condition: str = "") -> str:
    """The prompt that shows `token` (a word or placeholders) in a condition: ("a photo of a {}", "<t>", "rusty")."""
    return template.format(f"{condition} {token}".strip())


def placeholder(label: str) -> str:
    """The placeholder token of a class: a slug plus a short hash, so that two labels never collide.

    "M8 x 20 / zinc" -> "<m8-x-20-zinc-5f1c>"
    """
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:24]
    return f"<{slug or 'class'}-{hashlib.sha256(label.encode()).hexdigest()[:4]}>"


def vector_names(token: str, num_vectors: int) -> list[str]:
    """The vocabulary entries of a class token of n vectors: <t>, <t>_1, <t>_2, as diffusers names them."""
    return [token] + [f"{token}_{i}" for i in range(1, num_vectors)]
