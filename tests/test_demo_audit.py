"""The demo's --audit: AutoAttack finds what is there, stays in the ball, catches a false claim."""

import json
import logging
import random
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lipkernels import certify
from lipkernels.demo import audit, measure, report, story
from lipkernels.demo.__main__ import main
from lipkernels.demo.autoattack import Budget, autoattack_l2
from lipkernels.demo.preset import QUICK

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pyautoattack = pytest.importorskip("pyautoattack")

# On a linear net with orthonormal rows the nearest border is the runner-up's.
SMALL = Budget(targets=1, queries=20)


# ---------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """The JSON of one `--quick --audit` run."""
    out = tmp_path_factory.mktemp("audit")
    command = [sys.executable, "-m", "lipkernels.demo", "--threads", "1", "--quick", "--audit"]
    command += ["--epochs", "10", "--json", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "result.json").read_text()) == json.loads(done.stdout)
    return json.loads(done.stdout)


def test_accuracy_under_autoattack_lies_between_certified_and_clean(audited):
    for net in (audited["lipschitz"], audited["twin"]):
        held = net["autoattack"]
        assert list(held) == [f"{r:g}" for r in audited["radii"]]
        assert all(net["certified"][r] <= held[r] <= net["clean"] for r in held)
    # A certificate that is nearly tight leaves the attacker little room; the twin has none.
    ours, twin = audited["lipschitz"], audited["twin"]
    assert ours["autoattack"]["0.25"] - ours["certified"]["0.25"] < 0.03
    assert twin["autoattack"]["0.5"] < ours["certified"]["0.5"] - 0.2


def test_no_certificate_is_broken_by_an_attack_that_can_break(audited):
    found, ours = audited["autoattack"], audited["lipschitz"]
    assert found["broken"] == 0
    # Every image that the table calls certified was attacked at one of its radii.
    assert found["claims"] == round(ours["certified"]["0.125"] * audited["data"]["test"])
    own = found["own_radius"]
    assert own["attacked"] == 40 and 0.3 < own["least"] <= own["reach"] <= 1
    assert own["reach"] > 0.9
    assert own["control_factor"] == 1.05 and own["control"] > 0.5


def test_the_result_says_what_the_attack_was(audited):
    found = audited["autoattack"]
    assert found["package"] == f"pyautoattack {pyautoattack.__version__}"
    assert found["attacks"] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (found["norm"], found["clipped_to_0_1"], found["seed"]) == ("L2", False, 0)
    assert (found["radii"], found["images"]) == ([0.125, 0.25, 0.5, 0.75], 359)
    assert found["budget"] == {"targets": 2, "queries": 100}
    assert found["seconds"] > 0


def test_table_has_a_row_for_it(audited):
    rows = [line.split() for line in report.format_table(audited).splitlines()]
    shown = [row[2:] for row in rows if row[:2] == ["under", "AutoAttack"]]
    nets = (audited["lipschitz"], audited["twin"])
    assert shown == [[f"{100 * share:.1f}" for share in net["autoattack"].values()] for net in nets]
    own = audited["autoattack"]["own_radius"]
    assert f"and on 40 at {100 * own['reach']:.1f}% of their own: none broke" in (
        report.format_checks(audited)
    )


def test_exit_status_is_1_when_autoattack_breaks_a_certificate(monkeypatch, tmp_path, capsys):
    """Every radius doubled, and a first audit that sees nothing: AutoAttack must notice."""
    true_radius = certify.certified_radius
    monkeypatch.setattr(certify, "certified_radius", lambda *args: 2 * true_radius(*args))
    small = replace(
        QUICK, autoattack=SMALL, table_radii=(0.25, 0.75), audit_groups=1, audit_group_size=5
    )
    monkeypatch.setattr(story, "QUICK", small)
    blind = measure.Audit(attacked=1, broken=0, furthest=1.0, control_factor=1.05, control=1.0)
    monkeypatch.setattr(measure, "audit", lambda *arguments: blind)
    arguments = ["--quick", "--epochs", "4", "--audit", "--json", "--out", str(tmp_path)]
    assert main(arguments) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["autoattack"]["broken"] > result["autoattack"]["claims"] / 2
    assert f"{result['autoattack']['broken']} BROKE" in report.format_checks(result)


def test_a_missing_package_is_named_before_anything_is_trained(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert main(["--audit", "--out", str(tmp_path / "none")]) == 2
    said = capsys.readouterr()
    assert "pip install pyautoattack==0.2.0" in said.err
    assert "pip install 'lipkernels[audit]'" in said.err
    assert said.out == "" and not (tmp_path / "none").exists()


# ---------------------------------------------------------------- the attack


@pytest.fixture
def linear():
    """A linear classifier with orthonormal rows, images, classes, distances to the border."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with torch.no_grad():
        net[1].weight.copy_(torch.linalg.qr(torch.randn(36, 4, generator=generator))[0].T)
        images = torch.rand(40, 1, 6, 6, generator=generator)
        logits = net(images).double()
    top = logits.topk(2, dim=1)
    return net, images, top.indices[:, 0], (top.values[:, 0] - top.values[:, 1]) / 2**0.5


def _length(points, images):
    return (points.double() - images.double()).flatten(1).norm(dim=1)


def test_it_finds_what_is_just_there_and_no_more(linear):
    net, images, labels, distance = linear
    eps = distance.median().item() * 1.01
    points = autoattack_l2(net, images, labels, eps, budget=SMALL)
    fell = ~measure.correct(net, points, labels)
    assert fell[distance < 0.998 * eps].all() and not fell[distance > eps].any()
    assert fell.any() and not fell.all()
    # Nothing found: the image itself.
    assert torch.equal(points[~fell], images[~fell])


def test_points_stay_in_the_ball_and_may_leave_the_box(linear):
    net, images, labels, distance = linear
    eps = distance.max().item()
    points = autoattack_l2(net, images, labels, eps, budget=SMALL)
    length = _length(points, images)
    assert (length <= eps).all() and length.max() > 0.99 * eps
    assert points.min() < 0 and points.max() > 1


@pytest.mark.parametrize("threshold", [0.1, 1.0])
def test_the_box_protects_nobody(threshold):
    """The class changes where one black pixel falls below -threshold, and nowhere else."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[1, 7] = -1.0
        net[1].bias.copy_(torch.tensor([threshold, 0.0, -1.0, -2.0]))
    images = torch.zeros(3, 1, 6, 6)
    labels = torch.zeros(3, dtype=torch.long)
    beyond = autoattack_l2(net, images, labels, 1.1 * threshold, budget=SMALL)
    assert (beyond.flatten(1)[:, 7] < -threshold).all()
    short = autoattack_l2(net, images, labels, 0.9 * threshold, budget=SMALL)
    assert torch.equal(short, images)


def test_it_leaves_the_network_the_generators_and_the_tracer_alone(linear):
    net, images, labels, _ = linear
    net[1].bias.requires_grad_(False)
    before = images.clone()
    state, dice = torch.random.get_rng_state(), random.getstate()
    loggers = logging.getLogger("auto-attack").handlers[:]

    def trace(frame, event, argument):
        return None

    sys.settrace(trace)
    try:
        first = autoattack_l2(net, images, labels, 0.1, seed=3, budget=SMALL)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(None)
    assert torch.equal(first, autoattack_l2(net, images, labels, 0.1, seed=3, budget=SMALL))
    assert torch.equal(images, before)
    assert torch.equal(torch.random.get_rng_state(), state) and random.getstate() == dice
    assert logging.getLogger("auto-attack").handlers == loggers
    assert net[1].weight.requires_grad and not net[1].bias.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_what_it_cannot_attack_is_refused(linear):
    net, images, labels, _ = linear
    assert autoattack_l2(net, images[:0], labels[:0], 0.1).shape == (0, 1, 6, 6)
    for eps in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"eps must be positive and finite, got {eps}"):
            autoattack_l2(net, images, labels, eps)
    with pytest.raises(TypeError, match=r"expected torch.float32, got torch.float64"):
        autoattack_l2(net.double(), images.double(), labels, 0.1)
    net.float()
    with pytest.raises(ValueError, match=r"expected pixels in \[0, 1\], got 1 to 2"):
        autoattack_l2(net, torch.linspace(1, 2, 36).reshape(1, 1, 6, 6), labels[:1], 0.1)
    with pytest.raises(ValueError, match="at least 4 classes, got 3"):
        three = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        autoattack_l2(three, images, labels, 0.1)


# ---------------------------------------------------------------- the audit


def test_nearest_adversarial_decides_every_image_at_every_radius(linear):
    net, images, labels, distance = linear
    wrong = labels.clone()
    wrong[:3] = (wrong[:3] + 1) % 4
    # The middle between two distances, so that no image lies on a radius.
    order = distance.sort().values
    radii = [((order[k] + order[k + 1]) / 2).item() for k in (5, 18, 30)]
    lines = []
    closest = audit.nearest_adversarial(net, images, wrong, radii, 0, SMALL, lines.append)
    assert closest[:3].isinf().all()  # misclassified: never attacked
    for radius in radii:
        assert torch.equal(closest[3:] > radius, distance[3:] > radius)
    assert (closest >= distance * (1 - 1e-6)).all()
    # From the largest radius down, and only what had fallen at the one before.
    for line, radius in zip(lines, sorted(radii, reverse=True), strict=True):
        assert line.startswith(f"  at {radius:g}: ")
    assert lines[0].startswith(f"  at {max(radii):g}: 37 attacked, ")
    attacked = [int(line.split(": ")[1].split()[0]) for line in lines]
    stood = [int(line.split("attacked, ")[1].split()[0]) for line in lines]
    assert attacked[1] <= attacked[0] - stood[0] and attacked[2] <= attacked[1] - stood[1]


def test_neighbours_are_runs_in_the_order_of_the_radii():
    radius = torch.rand(97, generator=torch.Generator().manual_seed(0))
    radius[::10] = 0
    groups = audit.neighbours(radius, 4, 6, seed=0)
    rank = torch.empty(97, dtype=torch.long)
    rank[radius.argsort()] = torch.arange(97)
    assert [len(group) for group in groups] == [6] * 4
    for group in groups:
        assert (radius[group] > 0).all()
        assert (rank[group].diff() == 1).all()
    assert len(torch.cat(groups).unique()) == 24
    for group, again in zip(groups, audit.neighbours(radius, 4, 6, seed=0), strict=True):
        assert torch.equal(group, again)
    starts = {audit.neighbours(radius, 1, 6, seed)[0][0].item() for seed in range(8)}
    assert len(starts) > 3


def test_neighbours_of_few_or_none():
    assert audit.neighbours(torch.zeros(5), 3, 2, seed=0) == []
    groups = audit.neighbours(torch.tensor([0.0, 3.0, 1.0]), 3, 2, seed=0)
    assert [group.tolist() for group in groups] == [[2], [1]]


@pytest.mark.parametrize(("factor", "caught"), [(0.999, 0.0), (1.05, 1.0)])
def test_own_radius_audit_breaks_an_over_claim(linear, factor, caught):
    """Groups of one: every image at exactly its own radius."""
    net, images, _, distance = linear
    spec = SimpleNamespace(audit_groups=4, audit_group_size=1, autoattack=SMALL)
    done, closest = audit.at_own_radius(net, images, factor * distance, spec, seed=0)
    assert (done.attacked, done.reach, done.least) == (4, 1.0, 1.0)
    assert int((closest <= factor * distance).sum()) == 4 * caught
    assert done.control == 1.0  # 1.05 * 0.999 is still beyond the border


def test_own_radius_audit_of_nothing(linear):
    net, images, _, distance = linear
    spec = SimpleNamespace(audit_groups=3, audit_group_size=2, autoattack=SMALL)
    done, closest = audit.at_own_radius(net, images, torch.zeros_like(distance), spec, seed=0)
    assert (done.attacked, done.reach, done.least, done.control) == (0, 0, 0, 0)
    assert closest.isinf().all()
