"""The loss against its formula by hand, against pytorch-metric-learning, and against what it must never do."""

import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import SupConLoss

from kernels.supcon import OOD_COLUMNS, masks, reference_level, supcon

TAU = 0.2


def batch(images=9, width=6, classes=3, ood=(1, 4), views=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(views * images, width, generator=g, dtype=torch.float64).requires_grad_()
    labels = (torch.arange(images) % classes).repeat(views)
    is_ood = torch.zeros(images, dtype=torch.bool)
    is_ood[list(ood)] = True
    return x, labels, is_ood.repeat(views)


def by_hand(z, labels, is_ood, views, columns, ood_weight, beta, ood_anchors=False):
    """The formula of kernels/supcon.py, one term at a time."""
    R = len(z)
    images, s = R // views, (z @ z.T / TAU).tolist()
    y, o = labels.tolist(), is_ood.tolist()
    losses = []
    for i in range(R):
        if o[i] and not ood_anchors:
            continue
        if o[i]:
            positives = [j for j in range(R) if j != i and j % images == i % images]
        else:
            positives = [j for j in range(R) if j != i and not o[j] and y[j] == y[i]]
        if not positives:
            continue
        rule = {"none": lambda j: False, "global": lambda j: True}
        rule |= {"own_class": lambda j, i=i: y[j] == y[i], "foreign_class": lambda j, i=i: y[j] != y[i]}
        negatives = [(j, 1.0) for j in range(R) if j not in (i, *positives) and not o[j]]
        negatives += [(j, ood_weight) for j in range(R) if j not in (i, *positives) and o[j] and rule[columns](j)]
        total = sum(c for _, c in negatives)
        normalizer = sum(c * math.exp(beta * s[i][j]) for j, c in negatives)
        denominator = sum(math.exp(s[i][p]) for p in positives)
        denominator += sum(c * total * math.exp((1 + beta) * s[i][j]) / normalizer for j, c in negatives)
        losses.append(math.log(denominator) - sum(s[i][p] for p in positives) / len(positives))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("columns", OOD_COLUMNS)
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("ood_anchors", [False, True])
def test_equals_the_formula_term_by_term(columns, beta, ood_anchors):
    x, labels, is_ood = batch()
    z = F.normalize(x.detach(), dim=1)
    settings = dict(ood_columns=columns, ood_weight=0.7, hardness=beta, ood_anchors=ood_anchors)
    loss = supcon(z, labels, is_ood, temperature=TAU, **settings)
    assert loss.item() == pytest.approx(by_hand(z, labels, is_ood, 2, columns, 0.7, beta, ood_anchors), rel=1e-12)


@pytest.mark.parametrize("ood", [(), (0,), (1, 4, 5)])
def test_value_and_gradient_equal_pytorch_metric_learning(ood):
    """Its labels know no OOD: a label of its own for every OOD view makes it a negative without positives."""
    x, labels, is_ood = batch(ood=ood)
    loss = supcon(F.normalize(x, dim=1), labels, is_ood, temperature=TAU)
    (gradient,) = torch.autograd.grad(loss, x)
    unique = torch.where(is_ood, 100 + torch.arange(len(labels)), labels)
    oracle = SupConLoss(temperature=TAU)(x, unique)
    (oracle_gradient,) = torch.autograd.grad(oracle, x)
    torch.testing.assert_close(loss, oracle, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, oracle_gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("settings", [{}, {"ood_columns": "own_class", "ood_weight": 0.5}, {"ood_anchors": True}])
def test_gradient_is_that_of_the_value(settings):
    x, labels, is_ood = batch(images=5, classes=2, ood=(1,))
    assert torch.autograd.gradcheck(lambda x: supcon(F.normalize(x, dim=1), labels, is_ood, **settings), x)


def test_gradient_is_the_symmetric_expression_of_the_docstring():
    x, labels, is_ood = batch()
    z = F.normalize(x.detach(), dim=1).requires_grad_()
    supcon(z, labels, is_ood, temperature=TAU, ood_weight=0.7).backward()
    positive, negative, ood_negative = masks(labels, is_ood, 2, "global")
    weight = (positive | negative).double() + (0.7 - 1) * ood_negative
    q = weight * torch.exp(z.detach() @ z.detach().T / TAU)
    anchor = positive.any(1)
    q = q / q.sum(1, keepdim=True).clamp(min=1e-300)
    g = (q - positive / positive.sum(1, keepdim=True).clamp(min=1)) * anchor[:, None] / anchor.sum()
    torch.testing.assert_close(z.grad, (g + g.T) @ z.detach() / TAU)


def test_without_ood_rows_it_is_the_plain_loss():
    x, labels, is_ood = batch(ood=())
    z = F.normalize(x.detach(), dim=1)
    losses = {columns: supcon(z, labels, is_ood, ood_columns=columns).item() for columns in OOD_COLUMNS}
    assert len(set(losses.values())) == 1


@pytest.mark.parametrize("columns", OOD_COLUMNS)
@pytest.mark.parametrize("hardness", [0.0, 2.0])
def test_coinciding_embeddings_give_the_reference_level(columns, hardness):
    _, labels, is_ood = batch()
    z = torch.full((18, 4), 0.5, dtype=torch.float64)
    settings = dict(ood_columns=columns, ood_weight=0.5)
    loss = supcon(z, labels, is_ood, hardness=hardness, **settings)
    torch.testing.assert_close(loss, reference_level(labels, is_ood, **settings).double(), rtol=1e-6, atol=0)
    if columns == "global":  # 7 ID images and 2 OOD images, two views each
        assert loss.item() == pytest.approx(math.log(14 - 1 + 0.5 * 4))


def test_the_other_view_is_a_positive_and_ood_rows_of_class_zero_never_are():
    _, labels, is_ood = batch(images=6, classes=2, ood=(0, 2))
    positive, negative, _ = masks(labels, is_ood, 2, "global")
    images = torch.arange(6)[~is_ood[:6]]
    assert positive[images, images + 6].all()
    assert (labels[is_ood] == 0).all() and not positive[is_ood].any() and not positive[:, is_ood].any()
    assert not (positive & negative).any() and not (positive | negative).diagonal().any()


def test_ood_rows_do_not_pull_or_push_each_other():
    x, labels, is_ood = batch(images=4, classes=2, ood=(0, 1))
    z = F.normalize(x.detach(), dim=1).requires_grad_()
    supcon(z, labels, is_ood, temperature=TAU).backward()
    others = z.detach()[~is_ood]  # an OOD row's gradient is a combination of ID rows alone
    residual = z.grad[is_ood] - z.grad[is_ood] @ torch.linalg.pinv(others) @ others
    assert others.shape[0] < z.shape[1] and z.grad[is_ood].norm() > 0
    assert residual.abs().max() < 1e-12


def test_anchors_without_a_positive_leave_the_mean():
    x, labels, is_ood = batch(images=5, classes=5, ood=(), views=1)
    labels[1] = 0  # rows 0 and 1 are class-mates, the others alone
    z = F.normalize(x.detach(), dim=1)
    loss = supcon(z, labels, is_ood, num_views=1, temperature=TAU)
    assert loss.item() == pytest.approx(by_hand(z, labels, is_ood, 1, "global", 1.0, 0.0), rel=1e-12)


def test_no_anchor_at_all_is_zero_with_zero_gradient():
    x, labels, _ = batch(ood=())
    loss = supcon(F.normalize(x, dim=1), labels, torch.ones(18, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and x.grad.abs().max() == 0


def test_ood_weight_zero_is_no_ood_column_also_under_reweighting():
    x, labels, is_ood = batch(images=3, classes=1, ood=(2,))
    z = F.normalize(x.detach(), dim=1)
    for hardness in (0.0, 1.0):
        zero = supcon(z, labels, is_ood, ood_weight=0.0, hardness=hardness)
        torch.testing.assert_close(zero, supcon(z, labels, is_ood, ood_columns="none", hardness=hardness))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_temperature_from_half_precision_stays_finite(dtype):
    x, labels, is_ood = batch()
    z = F.normalize(x.detach(), dim=1).to(dtype).requires_grad_()
    loss = supcon(z, labels, is_ood, temperature=0.05)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert z.grad.dtype == dtype and torch.isfinite(z.grad).all()


def test_autocast_does_not_round_the_similarities():
    x, labels, is_ood = batch(images=40, width=32)
    z = F.normalize(x.detach().float(), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = supcon(z, labels, is_ood)
    assert under_autocast == supcon(z, labels, is_ood)


def replace(**changes):
    x, labels, is_ood = batch()
    arguments = dict(z_RE=F.normalize(x.detach(), dim=1).float(), labels_R=labels, is_ood_R=is_ood)
    return supcon(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(z_RE=torch.ones(18, 4, dtype=torch.int64)),
            r"z_RE is int64\[18, 4\] on cpu; expected float32 or .*\[any, any\]",
        ),
        (dict(z_RE=torch.ones(18)), r"z_RE is float32\[18\]"),
        (dict(labels_R=torch.zeros(17, dtype=torch.int64)), r"labels_R is int64\[17\] on cpu; expected int64\[18\]"),
        (dict(labels_R=torch.zeros(18)), r"labels_R is float32\[18\]"),
        (dict(labels_R=torch.full((18,), -1)), r"labels_R \[18\] is -1 in row 0; expected source classes >= 0"),
        (dict(labels_R=torch.full((18,), 2**30)), r"labels_R \[18\] is 1073741824 in row 0; .* below 2\*\*30"),
        (dict(is_ood_R=torch.zeros(18)), r"is_ood_R is float32\[18\] on cpu; expected bool\[18\]"),
        (dict(z_RE=torch.full((18, 4), torch.nan)), r"z_RE \[18, 4\] is not finite in 18 rows, first 0"),
        (dict(labels_R=torch.zeros(18, dtype=torch.int64, device="meta")), r"labels_R .* on meta; expected .* on cpu"),
        (dict(num_views=4), r"z_RE has 18 rows; expected a positive multiple of num_views = 4"),
        (dict(temperature=0.0), r"temperature is 0.0; expected \(0, inf\]"),
        (dict(temperature=math.nan), r"temperature is nan"),
        (dict(ood_columns="all"), r"ood_columns is 'all'; expected one of none, global, own_class, foreign_class"),
        (dict(ood_weight=-1.0), r"ood_weight is -1.0; expected \[0, inf\]"),
        (dict(hardness=-0.5), r"hardness is -0.5"),
        (dict(num_views=1, labels_R=torch.arange(18)), r"labels_R \[18\] has no two ID rows of one class"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(**changes)


def test_values_are_not_checked_when_the_caller_guards_the_loss_itself():
    assert torch.isnan(replace(z_RE=torch.full((18, 4), torch.nan), check_values=False))
