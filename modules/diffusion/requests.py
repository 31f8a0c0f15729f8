"""A request says what image to make; it is also the image's complete provenance.

The image can be made again from the request, the run's seed and the files that the request names by hash; it depends on
nothing else. A request is plain data, so it passes through a checkpoint, a metrics row or a caption unchanged.
"""

from dataclasses import asdict, dataclass

from modules.rules import FREE_RECIPES


@dataclass(frozen=True)
class Prompt:
    """A template with a condition, and the token vectors that are inserted into it."""

    template: str = ""  # "a photo of a {}"; empty: the empty prompt
    condition: str = ""  # "rusty"
    classes: tuple[int, ...] = ()  # classes whose tokens are mixed; () with a template: the initializer word
    weights: tuple[float, ...] = ()  # of the mixture, summing to 1
    noise: float = 0.0  # added to the vectors, in units of their norm
    outlier_quantile: float = 0.0  # > 0: the vectors are moved to a region where class tokens are sparse

    @property
    def fixed(self) -> bool:
        """Whether the prompt has the same embedding each time: at most one class, with its vectors as learned."""
        return len(self.classes) < 2 and not self.noise and not self.outlier_quantile


@dataclass(frozen=True)
class Request:
    """One image to be made."""

    image_index: int  # position in the sequence of all images; selects the image's random stream
    source: int  # row of the source image in the train set
    label: int  # class of the source
    is_ood: bool
    recipe: str  # positive, or one of near_ood.recipes
    prompt: Prompt = Prompt()
    strength: float = 0.0
    start: int = 0  # index of the first step taken on the grid
    t0: float = 0.0  # timestep of that step
    sqrt_abar: float = 1.0  # share of the source's amplitude left at that step
    solver: str = ""
    num_inference_steps: int = 0  # T_n
    guided_steps: int = 0  # number of steps, from the noisy end of the grid, that are guided
    guidance_scale: float = 1.0
    mask_edit: str = "none"  # none | object | background: what may change
    mask_dilation_px: int = 0
    jigsaw_grid: int = 0
    attempt: int = 0  # > 0: made again after a rejection, with different noise
    resolution: int = 0
    preset: str = ""
    pipeline: str = ""  # digest of the pipeline's weights
    tokens: str = ""  # digest of the class tokens

    @property
    def grid(self) -> tuple[str, int, int]:
        """The key of the request's time grid (see `schedule.Grid.key`)."""
        return self.solver, self.num_inference_steps, self.guided_steps

    @property
    def denoises(self) -> bool:
        return self.recipe not in FREE_RECIPES

    @property
    def cost(self) -> int:
        """The number of UNet calls that the image takes."""
        return self.num_inference_steps - self.start if self.denoises else 0

    @property
    def identity(self) -> tuple[int, ...]:
        """What selects the image's random stream, together with the seed."""
        return (self.image_index, self.attempt) if self.attempt else (self.image_index,)

    def as_dict(self) -> dict:
        """Plain nested values, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> "Request":
        """The request that `as_dict` wrote; unknown keys raise TypeError."""
        prompt = dict(values["prompt"])
        prompt = Prompt(**(prompt | {"classes": tuple(prompt["classes"]), "weights": tuple(prompt["weights"])}))
        return Request(**(values | {"prompt": prompt}))
