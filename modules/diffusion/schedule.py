"""Time grids and solver steps as rows of one table, so that slots on any grid, solver and step share one update.

Every solver used here, deterministic or stochastic, takes steps that are linear combinations. With alpha = sqrt(abar),
sigma = sqrt(1 - abar) and x0 the image predicted at t (x0 = (z - sigma eps) / alpha, or alpha z - sigma v):

    z_next = a z + b x0 + c x0_prev + d noise

So a step is a row (a, b, c, d), and all a slot needs to know is its row number. Timesteps and noise levels come from
diffusers' schedulers, which define the grids; the coefficients are computed here in float64. Euler steps are written in
the variance-preserving form of DDIM (z = alpha x, while diffusers keeps x = z / alpha): same images, one code path.

In a slot's first step there is no x0_prev, and DPM-Solver++(2M) takes a first-order step; so each grid has a second set
of rows for starts. Row 0 of the table is the idle row, which leaves a slot unchanged.

Shapes: R rows of the table, N steps of a grid.
"""

import inspect
from dataclasses import dataclass

import numpy as np
import torch

from modules.errors import ConfigError, DataError
from modules.ranges import CHOICES
from modules.rules import lowest_strength, steps_taken

COLUMNS = ("alpha", "sigma", "a", "b", "c", "d", "alpha_next", "sigma_next")
IDLE = (1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SOLVERS = CHOICES["generation.solver"]


@dataclass(frozen=True)
class Grid:
    """The time grid of one solver: T_n steps from noise to image."""

    solver: str
    num_inference_steps: int  # T_n
    timesteps: tuple[float, ...]  # the UNet's timestep at each step, descending
    steps_N8: torch.Tensor  # float32 rows of COLUMNS
    starts_N8: torch.Tensor  # the same for a slot's first step
    guided_steps: int  # number of steps, from the noisy end, that are guided
    most_steps: int | None = None  # the preset's limit on num_inference_steps; None: no limit

    @property
    def key(self) -> tuple[str, int, int]:
        """What identifies the grid among those of one pipeline."""
        return self.solver, self.num_inference_steps, self.guided_steps

    @property
    def stochastic(self) -> bool:
        """Whether steps add fresh noise."""
        return bool((self.steps_N8[:, COLUMNS.index("d")] != 0).any())

    def start(self, strength: float) -> int:
        """The index of the first step taken at strength s: T_n - n with n = min(int(T_n s), T_n), as in diffusers.

        Raises:
            ConfigError: n is 0, which would return the source image.
        """
        count = steps_taken(self.num_inference_steps, strength)
        if count < 1:
            remedy = "raise generation.num_inference_steps"
            if self.most_steps and int(self.most_steps * strength) < 1:
                remedy = f"set pipeline.preset to exact, as this preset takes at most {self.most_steps} steps"
            raise ConfigError(
                f"strength {strength:g} on a grid of {self.num_inference_steps} steps takes int({self.num_inference_steps}"
                f" x {strength:g}) = 0 steps and returns the source; use a strength of at least "
                f"{lowest_strength(self.num_inference_steps):g} or {remedy}"
            )
        return self.num_inference_steps - count

    def amplitude(self, index: int) -> float:
        """sqrt(abar) at a step: the share of the source's amplitude that is left in a slot starting there."""
        return float(self.steps_N8[index, 0])


@dataclass(frozen=True)
class Grids:
    """Which time grid an image takes, and from which step on, by its strength.

    A strength s is counted in steps of the grid `full`: n = min(int(T_n s), T_n) of them, at least one. An image takes
    these n steps, or what `shorter` has in their place.
    """

    full: Grid
    shorter: tuple[tuple[Grid, int], ...] = ()  # the n-th: a grid and its first step, which replace n steps of `full`

    def at(self, strength: float) -> tuple[Grid, int]:
        """The grid of a strength in (0, 1], and the index of the first step taken on it.

        Raises:
            ConfigError: as `Grid.start`.
        """
        start = self.full.start(strength)
        return self.shorter[self.full.num_inference_steps - start - 1] if self.shorter else (self.full, start)

    @property
    def every(self) -> list[Grid]:
        """All grids that some strength takes."""
        return list({grid.key: grid for grid, _ in self.shorter}.values()) or [self.full]

    @property
    def lowest_strength(self) -> float:
        """A strength that takes one step of `full`; 1 / T_n rounded up, as int(T_n (1 / T_n)) is 0 for T_n such as 49."""
        return (1 + 1e-9) / self.full.num_inference_steps


def time_grid(scheduler: dict, solver: str, num_inference_steps: int, guided_steps: int | None = None) -> Grid:
    """The grid of T_n steps that diffusers' scheduler for `solver` takes with a pipeline's scheduler config.

    Args:
        scheduler: a scheduler_config.json. Settings written for another scheduler class apply if the solver's class
            has them too (spacing, final sigma), as with `from_config` in diffusers.
        guided_steps: number of steps, from the noisy end, that are guided; None: all.

    Raises:
        ConfigError: an unknown solver, or more steps than the training schedule has.
        DataError: diffusers cannot use the scheduler config.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"generation.solver is {solver!r}; choose one of {', '.join(SOLVERS)}")
    total = scheduler.get("num_train_timesteps", 1000)
    if not isinstance(total, int):
        raise DataError(f"scheduler_config.json has num_train_timesteps {total!r}; expected a whole number")
    if not 1 <= num_inference_steps <= total:
        raise ConfigError(f"generation.num_inference_steps is {num_inference_steps}; this model has 1 to {total}")
    try:
        timesteps, levels, steps, starts = _BUILDERS[solver](scheduler, num_inference_steps)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise DataError(
            f"scheduler_config.json cannot be used with generation.solver {solver} ({error}); fetch the scheduler part again"
        ) from error
    following = np.append(levels[1:, 0], 1.0), np.append(levels[1:, 1], 0.0)
    tables = [
        torch.from_numpy(np.column_stack([levels, rows, *following])).float().contiguous() for rows in (steps, starts)
    ]
    guided = num_inference_steps if guided_steps is None else min(guided_steps, num_inference_steps)
    return Grid(solver, num_inference_steps, tuple(float(t) for t in timesteps), *tables, guided)


def build_scheduler(scheduler: dict, solver: str):
    """diffusers' scheduler object for a solver, made from a pipeline's scheduler config.

    As in diffusers' own Stable Diffusion pipelines, the offset is set to 1 and latents are not clipped.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler

    kinds = {
        "ddim": (DDIMScheduler, {"clip_sample": False}),
        "euler": (EulerDiscreteScheduler, {}),
        "dpmpp_2m": (
            DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"},
        ),
        "lcm": (LCMScheduler, {"clip_sample": False}),
    }
    kind, fixed = kinds[solver]
    accepted = inspect.signature(kind.__init__).parameters
    known = {key: value for key, value in scheduler.items() if key in accepted}
    return kind(**(known | {"steps_offset": 1} | fixed))


def alphas_cumprod(scheduler: dict) -> torch.Tensor:
    """abar_t of the training schedule in a scheduler config, float32 [T]."""
    return build_scheduler(scheduler, "ddim").alphas_cumprod


def _first_order(now: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Rows (a, b, 0, 0) of DDIM steps from noise levels `now` to levels `after`, both [N, 2] of (alpha, sigma).

    z_next = alpha' x0 + sigma' (z - alpha x0) / sigma. First-order DPM-Solver++ and Euler take the same step.
    Source: DDIM, 2010.02502 eq. 12 with eta = 0; DPM-Solver++, 2211.01095 eq. 9.
    """
    alpha, sigma = now.T
    alpha_after, sigma_after = after.T
    zero = np.zeros_like(alpha)
    return np.column_stack([sigma_after / sigma, alpha_after - sigma_after * alpha / sigma, zero, zero])


def _ddim(config: dict, count: int) -> tuple[np.ndarray, ...]:
    scheduler = build_scheduler(config, "ddim")
    scheduler.set_timesteps(count)
    timesteps = scheduler.timesteps.numpy()
    abar = scheduler.alphas_cumprod.double().numpy()
    if timesteps[0] >= len(abar):
        raise ConfigError(
            f"generation.num_inference_steps is {count}; this grid would start at t = {timesteps[0]}, and the model was "
            f"trained to {len(abar) - 1}; use at most {len(abar) // 2}"
        )
    before = timesteps - scheduler.config.num_train_timesteps // count
    after = np.where(before >= 0, abar[np.maximum(before, 0)], float(scheduler.final_alpha_cumprod))
    levels = _levels_of_abar(abar[timesteps])
    rows = _first_order(levels, _levels_of_abar(after))
    return timesteps, levels, rows, rows


def _euler(config: dict, count: int) -> tuple[np.ndarray, ...]:
    scheduler = build_scheduler(config, "euler")
    scheduler.set_timesteps(count)
    levels = _levels_of_sigma(scheduler.sigmas.double().numpy())
    rows = _first_order(levels[:-1], levels[1:])
    rows[-1] /= levels[-1, 0]  # diffusers returns x = z / alpha, which differs from z if the last sigma is not zero
    return scheduler.timesteps.numpy(), levels[:-1], rows, rows


def _dpmpp_2m(config: dict, count: int) -> tuple[np.ndarray, ...]:
    """Source: DPM-Solver++, 2211.01095 algorithm 2 (2M), midpoint form; the final order is lowered as in diffusers."""
    scheduler = build_scheduler(config, "dpmpp_2m")
    scheduler.set_timesteps(count)
    levels = _levels_of_sigma(scheduler.sigmas.double().numpy())
    starts = _first_order(levels[:-1], levels[1:])
    with np.errstate(divide="ignore"):
        log_snr = np.log(levels[:, 0]) - np.log(levels[:, 1])
    steps = starts.copy()
    last_is_first_order = (
        scheduler.config.euler_at_final
        or (scheduler.config.lower_order_final and count < 15)
        or scheduler.config.final_sigmas_type == "zero"
    )
    for i in range(1, count - bool(last_is_first_order)):
        ratio = (log_snr[i] - log_snr[i - 1]) / (log_snr[i + 1] - log_snr[i])
        correction = starts[i, 1] / (2 * ratio)
        steps[i, 1] += correction
        steps[i, 2] = -correction
    return scheduler.timesteps.numpy(), levels[:-1], steps, starts


def _lcm(config: dict, count: int) -> tuple[np.ndarray, ...]:
    """Source: Latent Consistency Models, 2310.04378 algorithm 3, with boundary scalings for sigma_data = .5."""
    scheduler = build_scheduler(config, "lcm")
    if count > scheduler.config.original_inference_steps:
        raise ConfigError(
            f"generation.num_inference_steps is {count}; lcm was distilled on {scheduler.config.original_inference_steps}"
        )
    scheduler.set_timesteps(count)
    timesteps = scheduler.timesteps.numpy()
    levels = _levels_of_abar(scheduler.alphas_cumprod.double().numpy()[timesteps])
    scaled = timesteps * float(scheduler.config.timestep_scaling)
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
    alpha, sigma = np.append(levels[1:, 0], 1.0), np.append(levels[1:, 1], 0.0)  # the last step adds no noise
    rows = np.column_stack([alpha * skip, alpha * out, np.zeros(count), sigma])
    return timesteps, levels, rows, rows


_BUILDERS = {"ddim": _ddim, "euler": _euler, "dpmpp_2m": _dpmpp_2m, "lcm": _lcm}


def _levels_of_abar(abar: np.ndarray) -> np.ndarray:
    """(alpha, sigma) [N, 2] from abar [N]."""
    return np.column_stack([np.sqrt(abar), np.sqrt(1 - abar)])


def _levels_of_sigma(ratio: np.ndarray) -> np.ndarray:
    """(alpha, sigma) [N, 2] from the ratio sigma / alpha [N]."""
    alpha = 1 / np.sqrt(ratio**2 + 1)
    return np.column_stack([alpha, ratio * alpha])


class StepTable:
    """Several grids as one table on the device: a slot holds a row number and moves on to the row's successor.

    Row 0 is idle. Then each grid has N rows for steps that continue and N rows for steps that start. The successor of a
    grid's last step is the idle row.
    """

    def __init__(self, grids: list[Grid], device: torch.device | str = "cpu"):
        tables, timesteps, successors, guided = [torch.tensor([IDLE])], [0.0], [0], [False]
        self.grids = {g.key: g for g in grids}
        self.longest = max((g.num_inference_steps for g in grids), default=0)  # steps of the longest grid
        self._first = {}
        for key, grid in self.grids.items():
            count = grid.num_inference_steps
            first = len(timesteps)
            self._first[key] = first
            later = [*range(first + 1, first + count), 0]
            for table in (grid.steps_N8, grid.starts_N8):
                tables.append(table)
                timesteps += grid.timesteps
                successors += later
                guided += [i < grid.guided_steps for i in range(count)]
        self.table_R8 = torch.cat(tables).to(device)
        self.timestep_R = torch.tensor(timesteps, device=device)
        self.successor_R = torch.tensor(successors, device=device)
        self.guided_R = torch.tensor(guided, device=device)
        self.guidance_ends = not all(guided[1:])  # whether some grid has steps without guidance
        noises = [0]  # row -> which of an image's step noises it adds; rows without noise multiply the first by d = 0
        for grid in self.grids.values():
            noises += [i if grid.stochastic else 0 for i in range(grid.num_inference_steps)] * 2
        self.noise_R = torch.tensor(noises, device=device)

    def start_row(self, key: tuple[str, int, int], start: int) -> int:
        """The row of a slot that begins at step `start` of the grid named by `key` (see `Grid.key`)."""
        return self._first[key] + self.grids[key].num_inference_steps + start
