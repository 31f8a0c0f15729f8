"""The encoder: shapes, cost, deterministic weights, torchvision's names, statistics of generated rows apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules.config import Encoder as Settings
from modules.learning.backbones import RowSplit, SplitBatchNorm2d
from modules.learning.encoder import build_encoder, choose_arch
from modules.runtime import ONE_PIXEL_UP_TO, stream


def images(rows=4, size=64):
    return torch.randn(rows, 3, size, size, generator=stream(0, "x"))


def state(encoder):
    return {key: value.clone() for key, value in encoder.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("arch", "size", "chosen"),
    [
        ("auto", 64, "small_resnet"),
        ("auto", 96, "small_resnet"),
        ("auto", 128, "resnet18"),
        ("auto", 224, "resnet50"),
        ("resnet18", 64, "resnet18"),
    ],
)
def test_the_stem_follows_the_resolution_unless_named(arch, size, chosen):
    choice = choose_arch(arch, size)
    assert choice.value == chosen
    assert choice.reason == ("encoder.arch" if arch != "auto" else choice.reason) and choice.reason


@pytest.mark.parametrize(("arch", "size", "width"), [("auto", 64, 256), ("resnet18", 32, 512), ("resnet50", 32, 2048)])
def test_outputs(arch, size, width):
    encoder = build_encoder(Settings(arch=arch, head_dim=16), size, 5, seed=0)
    x = images(2, size)
    features = encoder(x)
    assert encoder.feature_width == width and features.shape == (2, width)
    embeddings, logits = encoder(x, "embeddings"), encoder(x, "logits")
    assert embeddings.shape == (2, 16) and logits.shape == (2, 5)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_embeddings_are_fp32_unit_rows_under_autocast():
    encoder = build_encoder(Settings(), 64, 5, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, logits = encoder(images(), "embeddings"), encoder(images(), "logits")
    assert embeddings.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("arch", ["small_resnet", "resnet18"])
def test_views_in_half_precision_are_what_autocast_makes_of_them(arch):
    """A step hands them over rounded already: half as much is written, and nothing else changes."""
    encoder = build_encoder(Settings(arch=arch), 64, 4, seed=0)
    x = torch.randn(4, 3, 64, 64, generator=stream(0, "x")).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        whole, rounded = (encoder(views, "embeddings") for views in (x, x.bfloat16()))
    assert torch.equal(whole, rounded)


@pytest.mark.parametrize("size", [ONE_PIXEL_UP_TO + 1, 32, 40])
@pytest.mark.parametrize("arch", ["small_resnet", "resnet18"])
def test_gradients_under_autocast_are_those_of_fp32_down_to_the_smallest_images_that_train_so(arch, size):
    """oneDNN leaves parts of a 16-bit weight gradient unwritten where a convolution's input is smaller than its stride."""
    encoder = build_encoder(Settings(arch=arch, width=16), size, 5, seed=0)
    target = torch.randn(16, 5, generator=stream(0, "target"))

    def gradients(enabled):
        encoder.zero_grad()
        held = [torch.full((2**16,), torch.nan) for _ in range(40)]
        del held  # what was not written shows
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (encoder(images(16, size), "logits") * target).sum().backward()
        return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}

    exact = gradients(False)
    for _ in range(3):
        for name, gradient in gradients(True).items():
            assert (gradient - exact[name]).norm() <= 0.75 * exact[name].norm(), name  # rounded activations alone: .4


def test_the_small_encoder_costs_at_most_60_mflop_an_image():
    total = 0

    def count(module, _, output):
        nonlocal total
        kernel = module.weight.shape[1:].numel()
        total += 2 * kernel * output[0].numel()

    encoder = build_encoder(Settings(), 64, 20, seed=0)
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    encoder(images(2), "embeddings")
    assert 10e6 < total <= 60e6


def test_weights_depend_on_the_seed_alone_and_torchs_generator_is_left_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = state(build_encoder(Settings(), 64, 5, seed=0))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, state(build_encoder(Settings(), 64, 5, seed=0)))
    assert not same(first, state(build_encoder(Settings(), 64, 5, seed=1)))


def test_arms_start_from_the_same_backbone():
    plain, other = (build_encoder(settings, 64, 5, 0) for settings in (Settings(), Settings(head_dim=32)))
    assert same(plain.backbone.state_dict(), other.backbone.state_dict())
    assert torch.equal(plain.linear.weight, other.linear.weight)
    split = build_encoder(Settings(separate_batchnorm=True), 64, 5, 0)
    assert same(plain.backbone_state(), split.backbone_state())


def test_the_export_loads_into_torchvision():
    from torchvision.models import resnet18

    encoder = build_encoder(Settings(arch="resnet18", separate_batchnorm=True), 224, 5, seed=0).eval()
    theirs = resnet18(weights=None)
    missing, unexpected = theirs.load_state_dict(encoder.backbone_state(), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    theirs.fc = nn.Identity()
    x = images(1, 64)
    torch.testing.assert_close(theirs.eval()(x), encoder.features(x))


def test_channels_last_changes_layout_not_values():
    plain, other = (build_encoder(Settings(channels_last=flag), 64, 5, 0) for flag in (False, True))
    assert plain.backbone.stem.weight.is_contiguous()
    assert other.backbone.stem.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain(images()), other(images()), rtol=1e-4, atol=1e-5)


def test_a_split_norm_by_hand():
    norm = SplitBatchNorm2d(2, split=RowSplit(generated=2))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
    x = torch.randn(5, 2, 3, 3, generator=stream(0, "x"))
    out = norm(x)
    for rows in (slice(0, 3), slice(3, 5)):
        part = x[rows]
        mean, variance = part.mean((0, 2, 3), keepdim=True), part.var((0, 2, 3), keepdim=True, unbiased=False)
        expected = (part - mean) / (variance + norm.eps).sqrt() * norm.weight.view(1, 2, 1, 1)
        torch.testing.assert_close(out[rows], expected)
    torch.testing.assert_close(norm.running_mean, 0.1 * x[:3].mean((0, 2, 3)))
    torch.testing.assert_close(norm.generated_mean, 0.1 * x[3:].mean((0, 2, 3)))
    torch.testing.assert_close(norm.generated_var, 0.9 + 0.1 * x[3:].var((0, 2, 3)))


def test_generated_rows_do_not_touch_real_rows_or_their_statistics():
    def run(shift):
        encoder = build_encoder(Settings(separate_batchnorm=True), 64, 5, seed=0)
        x = images(8)  # two views of real, generated, real, generated
        x[1::2] += shift
        return encoder(x, "embeddings", [False, True, False, True]), encoder.backbone_state()

    (near, near_state), (far, far_state) = run(0.0), run(5.0)
    torch.testing.assert_close(near[0::2], far[0::2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(near[1::2], far[1::2], atol=1e-3)
    assert same(near_state, far_state)


def test_rows_come_back_in_their_order():
    encoder = build_encoder(Settings(separate_batchnorm=True), 64, 5, seed=0)
    flags = [False, True, True, False, False]
    x = images(5)
    with torch.no_grad():
        together = encoder(x, "features", flags)
        real = encoder(x[[0, 3, 4]], "features", [False] * 3)
    torch.testing.assert_close(together[[0, 3, 4]], real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", [[True] * 4, [False] * 4, None])
def test_batches_of_one_kind(flags):
    encoder = build_encoder(Settings(separate_batchnorm=True), 64, 5, seed=0)
    plain = build_encoder(Settings(), 64, 5, seed=0)
    torch.testing.assert_close(encoder(images(), "features", flags), plain(images()), rtol=1e-4, atol=1e-5)


def test_evaluation_uses_the_statistics_of_real_rows():
    encoder = build_encoder(Settings(separate_batchnorm=True), 64, 5, seed=0)
    encoder(images(), "features", [False, False, True, True])
    encoder.eval()
    torch.testing.assert_close(encoder(images(), "features", [True] * 4), encoder(images(), "features", [False] * 4))


def test_it_learns():
    """A few steps separate two classes that differ in color: gradients reach every part that the output uses."""
    encoder = build_encoder(Settings(width=8), 64, 2, seed=0)
    labels = torch.tensor([0, 1] * 4)
    x = images(8) * 0.5 + labels[:, None, None, None] * 2 - 1
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(encoder(x, "logits"), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.backbone.parameters())
