"""One step of every slot against its formula, against diffusers' schedulers, and in place."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from kernels.guided_step import guided_step

S, SHAPE = 3, (4, 6, 5)
IDLE = torch.tensor([[1.0, 0, 1, 0, 0, 0, 1, 0]])


def normal(*leading, seed=0):
    return torch.randn(*leading, *SHAPE, generator=torch.Generator().manual_seed(seed))


def table(rows=4, seed=9):
    return torch.rand(rows, 8, generator=torch.Generator().manual_seed(seed)) + 0.2


def step(**changes):
    arguments = dict(
        conditional_Schw=normal(S, seed=1),
        unconditional_Uchw=normal(S, seed=2),
        z_Schw=normal(S, seed=3),
        x0_prev_Schw=normal(S, seed=4),
        table_K8=table(),
        row_S=torch.tensor([2, 0, 3]),
        guidance_S=torch.tensor([7.5, 1.0, -1.0]),
    )
    arguments.update(changes)
    arguments["z_Schw"], arguments["x0_prev_Schw"] = arguments["z_Schw"].clone(), arguments["x0_prev_Schw"].clone()
    guided_step(**arguments)
    return arguments["z_Schw"], arguments["x0_prev_Schw"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_slot_follows_its_own_row_and_guidance(prediction_type):
    z, x0_prev = step(prediction_type=prediction_type)
    for s, (row, w) in enumerate(((2, 7.5), (0, 1.0), (3, -1.0))):
        alpha, sigma, a, b, c = table()[row, :5]
        u, conditional, before = normal(S, seed=2)[s], normal(S, seed=1)[s], normal(S, seed=3)[s]
        e = u + w * (conditional - u)
        x0 = (before - sigma * e) / alpha if prediction_type == "epsilon" else alpha * before - sigma * e
        torch.testing.assert_close(x0_prev[s], x0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(z[s], a * before + b * x0 + c * normal(S, seed=4)[s], rtol=1e-5, atol=1e-5)


def test_guidance_one_is_the_conditional_prediction_whatever_the_other_says():
    with_nan = step(unconditional_Uchw=torch.full((S, *SHAPE), torch.nan), guidance_S=torch.ones(S))
    torch.testing.assert_close(with_nan[0], step(unconditional_Uchw=None)[0], rtol=0, atol=0)


def test_fewer_unconditional_rows_than_slots():
    expected = step()[0]
    u = normal(S, seed=2)
    mapped = step(unconditional_Uchw=u[[2, 0]], unconditional_row_S=torch.tensor([1, -1, 0]))[0]
    assert torch.equal(mapped, expected)  # slot 1 has guidance 1 and needs no row
    unguided = step(unconditional_Uchw=u[[2, 0]], unconditional_row_S=torch.tensor([-1, -1, -1]))[0]
    assert torch.equal(unguided, step(unconditional_Uchw=None)[0])


def test_noise_is_taken_at_each_slots_own_step():
    noise = normal(S, 2, seed=5)
    z = step(noise_SNchw=noise, noise_step_S=torch.tensor([1, 0, 1]))[0]
    d = table()[[2, 0, 3], 5].view(S, 1, 1, 1)
    torch.testing.assert_close(z, step()[0] + d * noise[[0, 1, 2], [1, 0, 1]], rtol=1e-5, atol=1e-5)


def test_outside_the_mask_stands_the_source_at_the_next_noise_level():
    mask = torch.zeros(S, 1, 6, 5)
    mask[:, :, :3] = 1
    source, eps = normal(S, seed=6), normal(S, seed=7)
    z = step(mask_S1hw=mask, source_Schw=source, eps_Schw=eps)[0]
    alpha, sigma = table()[[2, 0, 3], 6:].unbind(1)
    kept = alpha.view(S, 1, 1, 1) * source + sigma.view(S, 1, 1, 1) * eps
    torch.testing.assert_close(z[:, :, 3:], kept[:, :, 3:], rtol=1e-5, atol=1e-5)
    assert torch.equal(z[:, :, :3], step()[0][:, :, :3])


def test_an_idle_row_leaves_the_latent():
    z, x0_prev = step(table_K8=IDLE, row_S=torch.zeros(S, dtype=torch.int64))
    assert torch.equal(z, normal(S, seed=3)) and torch.equal(x0_prev, z)


def test_channels_last_half_precision_predictions_as_a_unet_gives_them():
    half = {name: normal(S, seed=i).half() for i, name in ((1, "conditional_Schw"), (2, "unconditional_Uchw"))}
    last = {name: x.to(memory_format=torch.channels_last) for name, x in half.items()}
    for one, other in zip(step(**half), step(**last), strict=True):
        assert torch.equal(one, other) and one.dtype == torch.float32


def test_one_ddim_step_is_that_of_diffusers():
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(20)
    t, after = scheduler.timesteps[5], scheduler.timesteps[6]
    alpha, alpha_next = scheduler.alphas_cumprod[t].sqrt(), scheduler.alphas_cumprod[after].sqrt()
    sigma, sigma_next = (1 - alpha**2).sqrt(), (1 - alpha_next**2).sqrt()
    a = sigma_next / sigma
    row = torch.stack([alpha, sigma, a, alpha_next - a * alpha, *torch.zeros(2), alpha_next, sigma_next])[None]
    z, x0 = step(table_K8=row, row_S=torch.zeros(S, dtype=torch.int64), unconditional_Uchw=None)
    expected = scheduler.step(normal(S, seed=1), t, normal(S, seed=3))
    torch.testing.assert_close(z, expected.prev_sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-5, atol=1e-5)


def test_a_second_order_step_is_that_of_dpm_solver():
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(20)
    first = scheduler.step(normal(S, seed=1), scheduler.timesteps[0], normal(S, seed=3)).prev_sample
    expected = scheduler.step(normal(S, seed=2), scheduler.timesteps[1], first).prev_sample
    alpha = 1 / (scheduler.sigmas.double() ** 2 + 1).sqrt()
    sigma = scheduler.sigmas.double() * alpha
    log_snr = alpha[:3].log() - sigma[:3].log()
    x0_prev = (normal(S, seed=3) - sigma[0] * normal(S, seed=1)) / alpha[0]
    a = sigma[2] / sigma[1]
    first_order = alpha[2] - a * alpha[1]
    correction = first_order / (2 * (log_snr[1] - log_snr[0]) / (log_snr[2] - log_snr[1]))
    nothing = torch.zeros((), dtype=torch.float64)
    row = torch.stack([alpha[1], sigma[1], a, first_order + correction, -correction, nothing, alpha[2], sigma[2]])
    z, _ = step(
        conditional_Schw=normal(S, seed=2), unconditional_Uchw=None, z_Schw=first, x0_prev_Schw=x0_prev.float(),
        table_K8=row.float()[None], row_S=torch.zeros(S, dtype=torch.int64),
    )  # fmt: skip
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(conditional_Schw=normal(2)),
            r"conditional_Schw is float32\[2, 4, 6, 5\] on cpu; expected .*\[3, 4, 6, 5\]",
        ),
        (dict(unconditional_Uchw=normal(2)), r"unconditional_Uchw is float32\[2, 4, 6, 5\]"),
        (dict(z_Schw=normal(S).half()), r"z_Schw is float16"),
        (dict(x0_prev_Schw=normal(S).double()), r"x0_prev_Schw is float64"),
        (dict(table_K8=torch.ones(4, 6)), r"table_K8 is float32\[4, 6\] on cpu; expected float32\[any, 8\]"),
        (dict(row_S=torch.zeros(S)), r"row_S is float32\[3\] on cpu; expected int64\[3\]"),
        (dict(row_S=torch.zeros(S, dtype=torch.int64, device="meta")), r"row_S is int64\[3\] on meta"),
        (dict(guidance_S=torch.ones(2)), r"guidance_S is float32\[2\]"),
        (dict(prediction_type="sample"), r"prediction_type is 'sample'; expected one of epsilon, v_prediction"),
        (dict(noise_SNchw=normal(S, 2)), r"noise_step_S is None; expected a tensor, as for noise_SNchw"),
        (dict(mask_S1hw=torch.ones(S, 1, 6, 5)), r"source_Schw is None; expected a tensor, as for mask_S1hw"),
        (
            dict(unconditional_Uchw=None, unconditional_row_S=torch.zeros(S, dtype=torch.int64)),
            r"unconditional_Uchw is None; expected a tensor, as for unconditional_row_S",
        ),
        (dict(mask_S1hw=torch.ones(S, 4, 6, 5)), r"mask_S1hw is float32\[3, 4, 6, 5\]"),
        (
            dict(conditional_Schw=normal(S).transpose(2, 3).contiguous().transpose(2, 3)),
            r"contiguous or channels_last",
        ),
        (
            dict(row_S=torch.zeros(2 * S, dtype=torch.int64)[::2]),
            r"row_S \[3\] has strides \(2,\); expected contiguous",
        ),
        (dict(row_S=torch.tensor([0, 4, 1])), r"row_S is 4 in slot 1; table_K8 has 4"),
        (dict(row_S=torch.tensor([0, 1, -1])), r"row_S is -1 in slot 2; table_K8 has 4"),
        (
            dict(unconditional_Uchw=normal(2), unconditional_row_S=torch.tensor([2, 0, 1])),
            r"unconditional_row_S is 2 in slot 0; unconditional_Uchw has 2",
        ),
        (
            dict(noise_SNchw=normal(S, 2), noise_step_S=torch.tensor([0, 1, 2])),
            r"noise_step_S is 2 in slot 2; noise_SNchw has 2",
        ),
        (dict(guidance_S=torch.tensor(7.5).expand(S)), r"guidance_S \[3\] has strides \(0,\); expected contiguous"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        step(**changes)


def test_a_strided_state_is_refused_as_it_could_not_be_changed_in_place():
    z = normal(S).transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=r"z_Schw \[3, 4, 6, 5\] has strides .* expected contiguous"):
        guided_step(normal(S), None, z, normal(S), table(), torch.zeros(S, dtype=torch.int64), torch.ones(S))
