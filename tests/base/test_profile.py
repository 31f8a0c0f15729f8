"""profile adds up, counts operations as they are counted by hand, and advises by what it measured."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import trainer
from modules.commands import advice, profile
from modules.commands.advice import Facts, advise
from modules.commands.profile_trace import covered, short_name
from modules.config import Config
from modules.console import Console
from modules.errors import ConfigError
from modules.settings import with_settings
from modules.training import costs
from tests.base.tinyset import write_config

META = torch.device("meta")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """(report, text, folder) of a profile of the tiny set."""
    folder, stream = tmp_path_factory.mktemp("profile"), io.StringIO()
    report = profile.command(write_config(folder), ["--steps=4"], Console(stream), None, trainer.step)
    return report, stream.getvalue(), folder / "runs" / "tiny" / "profile"


def test_phases_add_up_to_the_step(profiled):
    timing = profiled[0]["timing"]
    assert set(timing["phase_ms"]) == {"generate", "mix", "augment", "encode", "loss", "backward", "optimize"}
    assert 0.8 * timing["step_ms"] < sum(timing["phase_ms"].values()) <= timing["step_ms"]
    assert 0 < sum(timing["part_ms"].values()) <= timing["phase_ms"]["generate"]
    assert timing["part_ms"]["unet"] > 0 and timing["part_ms"]["vae"] > 0


def test_parts_stand_against_ceilings_of_the_same_run(profiled):
    report, text, _ = profiled
    peak = report["ceilings"]["generator"]["tflop_per_s"]
    for part in report["parts"]:
        assert part["of_ceiling"] == pytest.approx(part["rate"] / peak)
        assert 0 <= part["of_ceiling"] < 1
    assert {row["name"] for row in report["bandwidth"]} == {"mix", "augment", "optimize"}
    assert "UNet, 8 rows a call" in text and "ceilings, learner" in text


def test_trace_and_operations(profiled):
    report, text, folder = profiled
    names = {event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {"generate", "backward", "part.unet"} <= names
    listed = [operation["name"] for operation in report["operations"]]
    assert "aten::mkldnn_convolution" in listed or "aten::convolution_backward" in listed
    assert not {"generate", "part.unet"} & set(listed)
    assert [o["ms"] for o in report["operations"]] == sorted((o["ms"] for o in report["operations"]), reverse=True)
    assert "top operators under the profiler" in text


def test_a_cpu_has_no_launches_to_be_bound_by(profiled):
    report, text, _ = profiled
    assert report["syncs"] is None and report["device_busy_share"] is None
    assert "launch-bound: does not apply" in text and "waits for the device in a step: does not apply" in text


def test_three_changes_with_reasons(profiled):
    report, text, _ = profiled
    assert len(report["advice"]) == 3
    for found in report["advice"]:
        assert found["saves_ms"] > 0 and ("% of a step" in found["reason"] or "cores" in found["reason"])
    assert "  1. " in text and "  3. " in text
    assert "memory by part" in text and "needed at once" in text


def test_without_generation(tmp_path):
    stream = io.StringIO()
    path = write_config(tmp_path, generation={"synthetic_fraction": 0})
    report = profile.command(path, ["--steps=2"], Console(stream), None, trainer.step)
    assert [part["name"].split(",")[0] for part in report["parts"]] == ["encoder forward", "encoder backward"]
    with pytest.raises(ConfigError, match="--steps is 'x'"):
        profile.command(path, ["--steps=x"], Console(stream), None, trainer.step)


def test_operations_of_a_product_and_a_convolution_by_hand():
    linear = torch.nn.Linear(30, 50, bias=False, device=META)
    x = torch.empty(7, 30, device=META)
    assert costs.cost_of(lambda: linear(x), [*linear.parameters(), x]).flop == 2 * 7 * 30 * 50
    convolution = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False, device=META)
    image = torch.empty(2, 3, 10, 10, device=META)
    found = costs.cost_of(lambda: convolution(image), [*convolution.parameters(), image])
    assert found.flop == 2 * 2 * 8 * 10 * 10 * 3 * 9


def test_attention_is_counted_without_its_scores():
    q, k, v = (torch.empty(2, 4, n, 8, device=META) for n in (100, 60, 60))
    found = costs.cost_of(lambda: F.scaled_dot_product_attention(q, k, v), [q, k, v])
    assert found.flop == 2 * (2 * 4 * 100 * 60 * 8) * 2
    assert found.peak_bytes == q.numel() * 4  # the result alone, no 100 x 60 matrix


def test_peak_follows_what_is_dropped():
    x = torch.empty(1000, device=META)

    def work():
        a = x + 1
        b = a + 1  # a and b
        del a
        c = b + 1  # b and c
        return c.view(10, 100)  # a view holds nothing of its own

    with torch.no_grad():
        assert costs.cost_of(work, [x]).peak_bytes == 2 * 4000


def test_peak_of_training_holds_what_backward_needs():
    model = torch.nn.Sequential(*(torch.nn.Tanh() for _ in range(5)))
    x = torch.empty(1000, device=META, requires_grad=True)
    kept = costs.cost_of(lambda: model(x).sum().backward(), [x]).peak_bytes
    with torch.no_grad():
        dropped = costs.cost_of(lambda: model(x), [x]).peak_bytes
    assert dropped == 2 * 4000 and kept >= 6 * 4000


@pytest.mark.slow
def test_sd15_unet_and_decoder_are_counted_as_published():
    """803 and 2,515 GFLOP a sample at 512 px (counted independently of this code)."""
    from modules.config import Pipeline
    from modules.diffusion.pipeline import load_pipeline

    pipeline = load_pipeline(Pipeline(weights="random"))
    assert costs.unet_cost(pipeline, 1).flop / 1e9 == pytest.approx(803, rel=0.02)
    assert costs.decode_cost(pipeline, 1).flop / 1e9 == pytest.approx(2515, rel=0.02)


def test_union_of_intervals():
    assert covered([]) == 0
    assert covered([(5, 8), (0, 2), (1, 3), (6, 7)]) == 6


def test_kernel_names_are_readable():
    assert short_name("void at::native::vectorized_elementwise_kernel<4, at::native::F>(int)") == (
        "vectorized_elementwise_kernel"
    )
    assert len(short_name("x" * 200)) == 56


FACTS = Facts(
    config=Config(),
    on_gpu=True,
    step_ms=100.0,
    phase_ms={"generate": 60.0, "mix": 1.0, "augment": 4.0, "encode": 10.0, "backward": 20.0, "optimize": 2.0},
    part_ms={"unet": 45.0, "vae": 12.0, "text": 0.0},
    needed=32.0,
    unconditional_rows=16,
    arch="small_resnet",
    precision="bf16",
    pipeline_dtype="fp16",
    auto_precision="bf16",
    auto_pipeline_dtype="fp16",
    kl_decoder=True,
    family="sd1",
    busy=0.97,
    unet_utilization=0.5,
)


def changes(count: int = 15, settings: dict | None = None, **values) -> dict[str, advice.Advice]:
    facts = replace(FACTS, **values)
    if settings:
        facts = replace(facts, config=with_settings(Config(), settings))
    return {found.change.split(" ")[0]: found for found in advise(facts, count)}


def test_the_largest_likely_saving_comes_first():
    found = advise(FACTS)
    gains = [advice.saves_ms * advice.likely for advice in found]
    assert len(found) == 3 and gains == sorted(gains, reverse=True)
    assert found[0].change == "pipeline.preset fast"  # 17 of 46 rows, see below, at .7


def test_ratio_goes_no_lower_than_max_uses_allows():
    assert "generation.images_per_step" not in changes()  # 32 rows / 8 uses = 4: no room
    roomy = changes(settings={"generation.max_uses": 12})["generation.images_per_step"]
    assert roomy.change.endswith("4 -> 2.67") and roomy.saves_ms == pytest.approx(60 / 3)
    assert "12.0 batches instead of 8.0" in roomy.reason


def test_the_ratio_that_is_advised_feeds_a_batch():
    settings = {"generation.images_per_step": 3.0, "generation.max_uses": 15}  # 32 / 15 = 2.1333
    change = changes(settings=settings)["generation.images_per_step"].change
    assert change.endswith("3 -> 2.14")
    with_settings(Config(), settings | {"generation.images_per_step": float(change.split()[-1])})


def test_recipes_without_a_unet_call_are_traced_for_three_steps():
    requests = SimpleNamespace(request=lambda index: SimpleNamespace(cost=0))
    state = SimpleNamespace(config=Config(), generator=SimpleNamespace(recipes=requests))
    assert profile._traced_steps(state) == 3


@pytest.mark.parametrize(
    ("name", "saves", "on", "off"),
    [
        ("pipeline.preset", 45 * 29 / 46, {}, {"settings": {"pipeline.preset": "fast"}}),  # (6 + 11) of (16 + 30) rows
        ("pipeline.preset", 45 * 29 / 46, {}, {"family": "turbo"}),
        ("pipeline.preset", 45 * 10 / 16, {"settings": {"near_ood.recipes": {"jigsaw": 1.0}}}, {"part_ms": {}}),
        ("generation.guidance_scale", 22.5, {}, {"unconditional_rows": 0}),
        ("generation.guidance_scale", 22.5, {}, {"settings": {"near_ood.recipes": {"negative_guidance": 1.0}}}),
        ("pipeline.vae:", 11.28, {}, {"kl_decoder": False}),
        ("pipeline.vae:", 11.28, {}, {"part_ms": FACTS.part_ms | {"vae": 4.0}}),
        ("pipeline.compile", 40.0, {"busy": 0.5, "settings": {"pipeline.compile": "off"}}, {"busy": 0.95}),
        ("generation.slots", 11.25, {"unet_utilization": 0.2}, {"unet_utilization": 0.6}),
        ("generation.slots", 25.0, {"busy": 0.5}, {"busy": 0.9}),
        ("generation.mode", 10.0, {"settings": {"generation.mode": "sequential"}}, {}),
        ("remove", 10.0, {"syncs": ("trainer.py:40",)}, {}),
        ("run.precision", 15.0, {"precision": "fp32"}, {"precision": "fp32", "auto_precision": "fp32"}),
        ("run.precision", 9.0, {"precision": "fp32", "on_gpu": False}, {"on_gpu": False}),
        ("pipeline.dtype", 18.0, {"pipeline_dtype": "fp32"}, {"pipeline_dtype": "fp32", "auto_pipeline_dtype": "fp32"}),
        ("encoder.channels_last", 4.5, {"settings": {"encoder.channels_last": False}}, {}),
        ("run.kernels", 14.0, {"phase_ms": FACTS.phase_ms | {"augment": 20.0}},
                              {"phase_ms": FACTS.phase_ms | {"augment": 20.0}, "views": "triton"}),
        ("learning.optimizer", 14.0, {"phase_ms": FACTS.phase_ms | {"optimize": 20.0},
                                      "settings": {"learning.optimizer": "adamw8bit"}}, {}),
        ("run.threads", 45.0, {"on_gpu": False, "threads": 1, "cores": 4}, {"on_gpu": False, "threads": 4, "cores": 4}),
        ("encoder.width", 13.125, {}, {"arch": "resnet18"}),
        ("encoder.arch", 16.5, {"arch": "resnet50"}, {}),
        ("data.image_size", 14.875, {}, {"settings": {"data.image_size": 32}}),
        ("data.image_size", 34 * 5 / 9, {"settings": {"data.image_size": 48}}, {"settings": {"data.image_size": 42}}),
    ],
)  # fmt: skip
def test_each_rule_fires_on_its_fact_alone_and_says_what_it_saves(name, saves, on, off):
    found = changes(**on)
    assert found[name].saves_ms == pytest.approx(saves) and 0 < found[name].likely <= 1
    assert len(found[name].reason) > 20 and "None" not in found[name].reason
    assert name not in changes(**off)
