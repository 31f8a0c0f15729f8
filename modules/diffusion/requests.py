"""What to paint, written down: a request is an image's whole provenance.

From a request, the run's seed and the files it names by hash, the image can be made again; nothing else enters it. So
a request is plain data: it goes through a checkpoint, a metrics row or a caption unchanged.
"""

from dataclasses import asdict, dataclass

from modules.rules import FREE_RECIPES


@dataclass(frozen=True)
class Prompt:
    """A template in a condition, and the token vectors that stand in it."""

    template: str = ""  # "a photo of a {}"; empty: the empty prompt
    condition: str = ""  # "rusty"
    classes: tuple[int, ...] = ()  # classes whose tokens are mixed; none with a template: the initializer word
    weights: tuple[float, ...] = ()  # of the mixture, adding to 1
    noise: float = 0.0  # added to the vectors, in units of their norm
    outlier_quantile: float = 0.0  # > 0: the vectors are moved to where class tokens are rare

    @property
    def fixed(self) -> bool:
        """Whether the prompt is the same each time: at most one class, its vectors as they were learned."""
        return len(self.classes) < 2 and not self.noise and not self.outlier_quantile


@dataclass(frozen=True)
class Request:
    """One image to be made."""

    image_index: int  # position in the sequence of all images; names the image's random stream
    source: int  # row of the source image in the train set
    label: int  # class of the source
    is_ood: bool
    recipe: str  # positive, or one of near_ood.recipes
    prompt: Prompt = Prompt()
    strength: float = 0.0
    start: int = 0  # first step taken of the grid
    t0: float = 0.0  # its timestep
    sqrt_abar: float = 1.0  # share of the source's amplitude kept there
    solver: str = ""
    num_inference_steps: int = 0  # T_n
    guided_steps: int = 0  # steps from the noisy end of the grid that guidance acts on
    guidance_scale: float = 1.0
    mask_edit: str = "none"  # none | object | background: what may change
    mask_dilation_px: int = 0
    jigsaw_grid: int = 0
    attempt: int = 0  # > 0: drawn again after a rejection, with noise of its own
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
        """UNet calls the image takes."""
        return self.num_inference_steps - self.start if self.denoises else 0

    @property
    def identity(self) -> tuple[int, ...]:
        """What names the image's random stream beside the seed."""
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
