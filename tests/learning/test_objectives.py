"""Each term against its formula written out in loops, in fp64, with autograd's gradient beside the docstring's."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from modules.config import Learning
from modules.learning.objectives import build_objective, prototype_push
from modules.runtime import stream

TAU = 0.5
LABELS_B = torch.tensor([0, 0, 1, 2, 0, 1])
IS_OOD_B = torch.tensor([False, False, False, False, True, True])
NO_OOD_B = torch.zeros(6, dtype=torch.bool)
BASE = Learning(temperature=TAU)


def embeddings(rows=12, width=5, seed=0):
    z = torch.randn(rows, width, dtype=torch.float64, generator=stream(seed, "z"))
    return F.normalize(z, dim=1)


def by_hand(z_RE, labels, is_ood, *, columns="global", weight=1.0, ood_anchors=False):
    """The formula of kernels/supcon.py, anchor by anchor, with two views of len(labels) images."""
    B, R = len(labels), 2 * len(labels)
    labels, is_ood = labels.tolist() * 2, is_ood.tolist() * 2
    similarity = (z_RE @ z_RE.T / TAU).tolist()
    terms = []
    for i in range(R):
        if is_ood[i]:
            positives = [(i + B) % R] if ood_anchors else []
        else:
            positives = [p for p in range(R) if p != i and not is_ood[p] and labels[p] == labels[i]]
        if not positives:
            continue
        denominator = 0.0
        for a in range(R):
            seen = {"none": False, "global": True}.get(columns)
            if seen is None:
                seen = (labels[a] == labels[i]) == (columns == "own_class")
            if a == i:
                continue
            if not is_ood[a] or a in positives:
                denominator += math.exp(similarity[i][a])
            elif seen:
                denominator += weight * math.exp(similarity[i][a])
        terms.append(math.log(denominator) - sum(similarity[i][p] for p in positives) / len(positives))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("columns", ["none", "global", "own_class", "foreign_class"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_supcon_with_ood_rows_by_hand(columns, weight):
    objective = build_objective(dataclasses.replace(BASE, ood_columns=columns, ood_weight=weight))
    loss, logs = objective(embeddings(), LABELS_B, IS_OOD_B)
    assert loss.item() == pytest.approx(by_hand(embeddings(), LABELS_B, IS_OOD_B, columns=columns, weight=weight))
    assert logs["loss"].item() == loss.item()


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_ood_instance_by_hand(weight):
    objective = build_objective(dataclasses.replace(BASE, ood_variant="ood_instance", ood_weight=weight))
    expected = by_hand(embeddings(), LABELS_B, IS_OOD_B, weight=weight, ood_anchors=True)
    assert objective(embeddings(), LABELS_B, IS_OOD_B)[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("variant", ["none", "ood_instance"])
def test_value_and_gradient_of_pytorch_metric_learning(variant):
    """A class of its own for each OOD view (none), or for each OOD image (ood_instance)."""
    from pytorch_metric_learning.losses import SupConLoss

    alone = torch.arange(12) + 100 if variant == "none" else torch.arange(6).repeat(2) + 100
    labels_R = torch.where(IS_OOD_B.repeat(2), alone, LABELS_B.repeat(2))
    ours, theirs = embeddings().requires_grad_(), embeddings().requires_grad_()
    loss, _ = build_objective(dataclasses.replace(BASE, ood_variant=variant))(ours, LABELS_B, IS_OOD_B)
    expected = SupConLoss(temperature=TAU)(theirs, labels_R)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    # their embeddings are normalized once more inside, which removes the gradient along each row
    tangent = ours.grad - (ours.grad * ours.detach()).sum(1, keepdim=True) * ours.detach()
    torch.testing.assert_close(tangent, theirs.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("variant", "apart"), [("none", True), ("prototype_push", True), ("ood_instance", False)])
def test_ood_rows_get_gradient_from_id_rows_only_unless_they_are_anchors(variant, apart):
    """ID rows lie in the first dimensions and near-OOD rows in the others, so a gradient tells where it came from."""
    z = embeddings(width=8)
    z[~IS_OOD_B.repeat(2), 4:] = 0
    z[IS_OOD_B.repeat(2), :4] = 0
    z = F.normalize(z, dim=1).requires_grad_()
    build_objective(dataclasses.replace(BASE, ood_variant=variant))(z, LABELS_B, IS_OOD_B)[0].backward()
    gradient = z.grad[IS_OOD_B.repeat(2)]
    assert gradient[:, :4].abs().sum() > 0
    assert (gradient[:, 4:].abs().sum() == 0) == apart


def test_simclr_is_supcon_with_a_class_an_image():
    objective = build_objective(dataclasses.replace(BASE, method="simclr"))
    loss, _ = objective(embeddings(), LABELS_B, NO_OOD_B)
    assert loss.item() == pytest.approx(by_hand(embeddings(), torch.arange(6), NO_OOD_B))
    shuffled, _ = objective(embeddings(), LABELS_B.flip(0), NO_OOD_B)
    assert shuffled == loss


def test_prototype_push_value_and_gradient_by_hand():
    z_RE = embeddings().requires_grad_()
    labels_R, is_ood_R = LABELS_B.repeat(2), IS_OOD_B.repeat(2)
    push = prototype_push(z_RE, labels_R, is_ood_R, TAU)
    z = z_RE.detach()
    means = torch.stack([F.normalize(z[(labels_R == c) & ~is_ood_R].mean(0), dim=0) for c in range(3)])
    rows = is_ood_R.nonzero().squeeze(1)
    scores = z[rows] @ means.T / TAU
    assert push.item() == pytest.approx(scores.logsumexp(1).mean().item(), rel=1e-6)
    push.backward()
    expected = torch.zeros_like(z)
    expected[rows] = scores.softmax(1) @ means / TAU / len(rows)
    torch.testing.assert_close(z_RE.grad, expected, rtol=1e-5, atol=1e-7)


def test_prototype_push_is_added_and_is_nothing_without_ood_rows():
    plain, pushed = build_objective(BASE), build_objective(dataclasses.replace(BASE, ood_variant="prototype_push"))
    z = embeddings()
    loss, logs = pushed(z, LABELS_B, IS_OOD_B)
    expected = prototype_push(z, LABELS_B.repeat(2), IS_OOD_B.repeat(2), TAU)
    assert loss.item() == pytest.approx(plain(z, LABELS_B, IS_OOD_B)[0].item() + expected.item())
    assert logs["prototype_push"] == expected
    z = embeddings().requires_grad_()
    loss, _ = pushed(z, LABELS_B, NO_OOD_B)
    assert loss.item() == plain(z.detach(), LABELS_B, NO_OOD_B)[0].item()
    loss.backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("method", ["supcon", "simclr"])
@pytest.mark.parametrize("variant", ["none", "ood_instance", "prototype_push"])
def test_reference_level_is_the_loss_of_coinciding_embeddings(method, variant):
    learning = dataclasses.replace(BASE, method=method, ood_variant=variant, ood_weight=0.7)
    _, logs = build_objective(learning)(embeddings(), LABELS_B, IS_OOD_B)
    same = F.normalize(torch.ones_like(embeddings()), dim=1)
    loss, _ = build_objective(learning)(same, LABELS_B, IS_OOD_B)
    assert logs["reference_level"].item() == pytest.approx(loss.item(), rel=1e-5)
    if variant == "prototype_push":
        return
    # 8 ID rows and 4 OOD rows: |I| - 1 + lambda |O|; an OOD anchor sees 8 ID rows, its other view and 2 others
    terms = [math.log(7 + 0.7 * 4)] * 8 + ([math.log(8 + 1 + 0.7 * 2)] * 4 if variant == "ood_instance" else [])
    assert logs["reference_level"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_figures_by_hand():
    z = embeddings()
    _, logs = build_objective(dataclasses.replace(BASE, ood_weight=0.7))(z, LABELS_B, IS_OOD_B)
    labels, is_ood = LABELS_B.repeat(2).tolist(), IS_OOD_B.repeat(2).tolist()
    ids = [r for r in range(12) if not is_ood[r]]
    pairs = [(i, j) for i in ids for j in ids if i != j]
    mates = [(i, j) for i, j in pairs if labels[i] == labels[j]]
    square = lambda i, j: (z[i] - z[j]).square().sum().item()  # noqa: E731
    heat = lambda i, j: math.exp((z[i] @ z[j]).item() / TAU)  # noqa: E731
    shares = []
    for i in ids:
        ood = 0.7 * sum(heat(i, o) for o in range(12) if is_ood[o])
        shares.append(ood / (ood + sum(heat(i, a) for a in ids if a != i)))
    expected = {
        "alignment": sum(square(i, j) for i, j in mates) / len(mates),
        "uniformity": math.log(sum(math.exp(-2 * square(i, j)) for i, j in pairs) / len(pairs)),
        "ood_share": sum(shares) / len(shares),
        "id_cosine": sum((z[i] @ z[j]).item() for i, j in pairs) / len(pairs),
        "id_spread": z[ids].std(0, unbiased=False).mean().item() * 5**0.5,
    }
    assert {name: logs[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)


def test_figures_at_their_ends():
    one_point = torch.ones(12, 4) / 2
    _, logs = build_objective(BASE)(one_point, LABELS_B, NO_OOD_B)
    assert logs["id_cosine"].item() == pytest.approx(1) and logs["id_spread"] == 0
    assert logs["alignment"] == logs["uniformity"] == logs["ood_share"] == 0
    spread = F.normalize(torch.randn(400, 64, generator=stream(0, "z")), dim=1)
    _, logs = build_objective(BASE)(spread, torch.arange(200), torch.zeros(200, dtype=torch.bool))
    assert logs["id_spread"].item() == pytest.approx(1, abs=0.02) and abs(logs["id_cosine"].item()) < 0.01


def test_the_loss_alone_where_nothing_is_logged():
    for learning in (BASE, dataclasses.replace(BASE, method="cross_entropy")):
        loss, logs = build_objective(learning)(embeddings(), LABELS_B, IS_OOD_B, log=False)
        assert list(logs) == ["loss"] and torch.equal(logs["loss"], loss)


@pytest.mark.parametrize("method", ["supcon", "simclr", "cross_entropy"])
def test_figures_carry_no_gradient(method):
    learning = dataclasses.replace(BASE, method=method, ood_variant="none", outlier_exposure=0.5)
    z = embeddings().float().requires_grad_()
    loss, logs = build_objective(learning)(z, LABELS_B, IS_OOD_B)
    assert loss.requires_grad and not any(value.requires_grad for value in logs.values())
    assert all(value.ndim == 0 for value in logs.values())


def test_a_loss_that_is_not_finite_is_returned_for_the_guard_to_find():
    z = embeddings().float()
    z[3] = torch.nan
    loss, _ = build_objective(BASE)(z, LABELS_B, IS_OOD_B)
    assert loss.isnan()


def test_half_precision_embeddings_at_low_temperature_stay_finite():
    z = F.normalize(torch.randn(12, 8, generator=stream(0, "z")), dim=1).half().requires_grad_()
    for variant in ("none", "ood_instance", "prototype_push"):
        learning = dataclasses.replace(BASE, temperature=0.05, ood_variant=variant)
        loss, logs = build_objective(learning)(z, LABELS_B, IS_OOD_B)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all() and all(v.isfinite() for v in logs.values())


@pytest.mark.parametrize("exposure", [0.0, 0.5])
def test_cross_entropy_value_and_gradient_by_hand(exposure):
    logits = torch.randn(12, 3, generator=stream(0, "logits")).requires_grad_()
    learning = dataclasses.replace(BASE, method="cross_entropy", outlier_exposure=exposure)
    loss, logs = build_objective(learning)(logits, LABELS_B, IS_OOD_B)
    is_ood_R, labels_R = IS_OOD_B.repeat(2), LABELS_B.repeat(2)
    x = logits.detach()
    expected = F.cross_entropy(x[~is_ood_R], labels_R[~is_ood_R])
    expected = expected + exposure * F.cross_entropy(x[is_ood_R], torch.full((4, 3), 1 / 3))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradient = x.softmax(1)
    gradient[~is_ood_R] = (gradient - F.one_hot(labels_R, 3))[~is_ood_R] / 8
    gradient[is_ood_R] = exposure * (gradient[is_ood_R] - 1 / 3) / 4
    torch.testing.assert_close(logits.grad, gradient)
    confidence = x.softmax(1).amax(1)
    torch.testing.assert_close(logs["id_confidence"], confidence[~is_ood_R].mean())
    torch.testing.assert_close(logs["ood_confidence"], confidence[is_ood_R].mean())
    accuracy = (x.argmax(1) == labels_R)[~is_ood_R].float().mean()
    assert logs["batch_accuracy"] == accuracy
    assert logs["reference_level"].item() == pytest.approx(math.log(3) * (1 + exposure))


def test_cross_entropy_without_ood_rows_is_torchs():
    logits = torch.randn(12, 3, generator=stream(0, "logits"))
    learning = dataclasses.replace(BASE, method="cross_entropy", outlier_exposure=0.5)
    loss, logs = build_objective(learning)(logits, LABELS_B, NO_OOD_B)
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS_B.repeat(2)))
    assert logs["reference_level"].item() == pytest.approx(math.log(3)) and logs["ood_confidence"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ood_variant": "ood_instance"},
        {"ood_variant": "prototype_push"},
        {"hardness": 1.0},
        {"method": "simclr"},
        {"method": "cross_entropy", "outlier_exposure": 0.5},
    ],
)
def test_a_step_on_a_gpu_waits_for_nothing(changes):
    objective = build_objective(dataclasses.replace(BASE, **changes))
    z = embeddings().float().cuda().requires_grad_()
    labels_B, is_ood_B = LABELS_B.cuda(), IS_OOD_B.cuda()
    objective(z, labels_B, is_ood_B)[0].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(z, labels_B, is_ood_B)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
