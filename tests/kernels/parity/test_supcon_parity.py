"""The streaming loss against the definition in fp64: values and gradients, friendly and hostile batches."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.supcon import OOD_COLUMNS, supcon

# name -> (images, embedding width): one block, several, ragged, a single ID image beside a single near-OOD one
SHAPES = {"even": (16, 16), "ragged": (19, 20), "single": (2, 5)}
if not backend.interpreted():  # compiled, many blocks of the sizes that are trained with
    SHAPES |= {"trained": (160, 128), "widest": (75, 256)}


def batch(images: int, width: int, seed: int, classes: int = 4, ood: float = 0.3):
    g = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(2 * images, width, generator=g, dtype=torch.float64), dim=1)
    labels = torch.randint(0, classes, (images,), generator=g).repeat(2)
    return z, labels, (torch.rand(images, generator=g) < ood).repeat(2)


def loss_and_gradient(z, labels, is_ood, device, dtype, implementation, **settings):
    z = z.detach().to(device, dtype, copy=True).requires_grad_()
    loss = supcon(z, labels.to(device), is_ood.to(device), implementation=implementation, **settings)
    loss.backward()
    return loss.detach(), z.grad


def compare(check, device, dtype, rows, **settings):
    z, labels, is_ood = rows
    z = z.to(dtype).double()  # the truth sees the rounded input too
    kernel = loss_and_gradient(z, labels, is_ood, device, dtype, "triton", **settings)
    eager = loss_and_gradient(z, labels, is_ood, device, dtype, "torch", **settings)
    truth = loss_and_gradient(z, labels, is_ood, device, torch.float64, "torch", **settings)
    check(kernel, eager, truth, dtype, f"{settings} {dtype}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_types(shape, dtype, device, as_good_as_eager):
    z, labels, is_ood = batch(*SHAPES[shape], seed=1)
    if shape == "single":
        is_ood = torch.tensor([False, True] * 2)
    compare(as_good_as_eager, device, dtype, (z, labels, is_ood), temperature=0.07)


@pytest.mark.parametrize("columns, hardness", list(itertools.product(OOD_COLUMNS, (0.0, 1.5))))
def test_every_rule_for_near_ood_columns(columns, hardness, device, as_good_as_eager):
    settings = dict(temperature=0.1, ood_columns=columns, ood_weight=0.6, hardness=hardness)
    compare(as_good_as_eager, device, torch.float32, batch(10, 16, seed=2), **settings)


def test_near_ood_rows_as_anchors(device, as_good_as_eager):
    rows = batch(9, 16, seed=3)
    for columns in OOD_COLUMNS:
        compare(as_good_as_eager, device, torch.float32, rows, ood_columns=columns, ood_anchors=True, temperature=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["one_class", "all_ood", "no_ood", "coinciding", "opposed", "duplicates"])
def test_adversarial_batches(case, dtype, device, as_good_as_eager):
    z, labels, is_ood = batch(9, 8, seed=4)
    if case == "one_class":
        labels = torch.zeros_like(labels)
    elif case in ("all_ood", "no_ood"):
        is_ood = torch.full_like(is_ood, case == "all_ood")
    elif case == "coinciding":
        z = z[:1].repeat(len(z), 1)
    elif case == "opposed":  # views of an image point away from each other: positives far below negatives
        z = torch.cat([z[:9], -z[:9]])
    elif case == "duplicates":
        z = z[:3].repeat(6, 1)
    for hardness in (0.0, 2.0):
        rows = (z, labels, is_ood)
        if case == "coinciding":  # its true gradient is tangential noise: only the value says something
            value = loss_and_gradient(*rows, device, torch.float32, "triton", hardness=hardness)[0]
            truth = loss_and_gradient(*rows, device, torch.float64, "torch", hardness=hardness)[0]
            torch.testing.assert_close(value.double(), truth, rtol=2e-6 if device == "cpu" else 1e-5, atol=0)
        else:
            compare(as_good_as_eager, device, dtype, rows, temperature=0.05, hardness=hardness)


def test_hard_weights_far_below_the_positives_do_not_vanish(device, as_good_as_eager):
    """exp(6 * (-1/.05)) relative to a positive is 1e-52: lost in fp32 unless negatives keep a maximum of their own."""
    z = torch.zeros(8, 4, dtype=torch.float64)
    z[:, 0] = torch.tensor([1, 1, -1, -1, 1, 1, -1, -1.0])
    labels, is_ood = torch.tensor([0, 0, 1, 1] * 2), torch.zeros(8, dtype=torch.bool)
    compare(as_good_as_eager, device, torch.float32, (z, labels, is_ood), temperature=0.05, hardness=6.0)


def test_the_largest_labels_are_told_apart(device, as_good_as_eager):
    """The kernel packs a label and whether a row is near-OOD into 32 bits."""
    z, labels, is_ood = batch(8, 8, seed=7)
    for columns in ("own_class", "foreign_class"):
        compare(as_good_as_eager, device, torch.float32, (z, 2**30 - 1 - labels, is_ood), ood_columns=columns)


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [((3e-5, 200.0), torch.float32), ((1e-3, 1.0), torch.float16), ((1.0, 60.0), torch.bfloat16)],
)
def test_rows_of_any_length(lengths, dtype, device, as_good_as_eager):
    """The halves of float16 are scaled by the largest entry of a group of rows, which here are of very unlike lengths."""
    z, labels, is_ood = batch(40, 16, seed=8)
    z = z * torch.where(torch.arange(len(z)) < 45, *lengths)[:, None]
    for hardness in (0.0, 0.5):
        rows, settings = (z, labels, is_ood), dict(temperature=0.2 * max(lengths) ** 2, hardness=hardness)
        compare(as_good_as_eager, device, dtype, rows, **settings)


def test_rows_that_fill_the_last_block_weigh_nothing(device, as_good_as_eager):
    """A similarity of 0 with a row that is not there would outweigh true ones of -1/.004 beyond float32."""
    z = F.normalize(torch.tensor([[1.0, 0.01], [1.0, -0.01], [-1.0, 0.02], [-1.0, 0.0]], dtype=torch.float64), dim=1)
    labels, is_ood = torch.tensor([0, 1, 0, 1]), torch.zeros(4, dtype=torch.bool)
    settings = dict(temperature=0.004, num_views=1)
    compare(as_good_as_eager, device, torch.float32, (z[[0, 2]], labels[[0, 2]], is_ood[:2]), **settings)
    compare(as_good_as_eager, device, torch.float32, (z, labels, is_ood), **settings)


def test_one_row_alone_is_no_anchor(device):
    z, labels, is_ood = torch.ones(1, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
    settings = dict(num_views=1, check_values=False)
    loss, gradient = loss_and_gradient(z, labels, is_ood, device, torch.float32, "triton", **settings)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_the_loss(value, device):
    z, labels, is_ood = batch(9, 8, seed=9)
    z[3, 2] = value
    loss = loss_and_gradient(z, labels, is_ood, device, torch.float32, "triton", check_values=False)[0]
    assert not torch.isfinite(loss)


def test_equal_input_gives_equal_bits(device):
    z, labels, is_ood = batch(40, 16, seed=10)
    first, second = (loss_and_gradient(z, labels, is_ood, device, torch.float32, "triton") for _ in range(2))
    assert first[0] == second[0] and torch.equal(first[1], second[1])


def test_training_takes_the_same_course_with_the_kernel(device):
    """Eight steps of a small encoder: the loss traces of kernel and definition agree."""
    g = torch.Generator().manual_seed(5)
    x, labels, is_ood = torch.randn(16, 10, generator=g), torch.arange(8).remainder(3).repeat(2), torch.zeros(16) > 0
    is_ood[[5, 13]] = True
    start = torch.randn(10, 6, generator=g) * 0.3
    traces = {}
    for implementation in ("torch", "triton"):
        weight = start.clone().to(device).requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
        traces[implementation] = []
        for _ in range(8):
            z = F.normalize(x.to(device) @ weight, dim=1)
            loss = supcon(z, labels.to(device), is_ood.to(device), implementation=implementation, hardness=1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            traces[implementation].append(loss.item())
    assert traces["torch"][-1] < traces["torch"][0] - 0.5
    torch.testing.assert_close(torch.tensor(traces["triton"]), torch.tensor(traces["torch"]), rtol=1e-4, atol=1e-5)


def test_the_graph_keeps_no_square_matrix(device):
    R = 32 if backend.interpreted() else 512  # a multiple of the rows that are padded together
    z, labels, is_ood = batch(R // 2, 16, seed=6)
    loss = supcon(
        z.to(device, torch.float32).requires_grad_(), labels.to(device), is_ood.to(device), implementation="triton"
    )
    node = loss.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    numbers = sum(t.nbytes for t in node.saved_tensors) / 4
    assert numbers <= R * (16 + 8)  # the matrix alone would be R * R


def test_refuses_what_it_cannot_hold(device):
    labels, is_ood = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(4, dtype=torch.bool, device=device)
    for z in (torch.ones(4, 300), torch.ones(4, 8, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"z_RE is float(32|64)\[4, .*the kernel takes"):
            supcon(z.to(device), labels, is_ood, implementation="triton")
