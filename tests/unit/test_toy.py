"""The toy regressions against what can be worked out on paper, and the command that draws them."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from qyolo_deploy.qat.toy import Grid, Regression, ema, run_fixed_scale, run_learned_scales
from qyolo_deploy.qat.toy_demo import simulate_oscillation

SCALE = 0.5
# w* and its distance from the nearest level, which is below it, above it, and below zero.
DISTANCES = {0.53: 0.03, 1.1: 0.1, 0.85: 0.15, -0.2: 0.2, -1.57: 0.07}
BATCH = 128  # of the simulation; x^2 of a uniform x with E[x^2] = 1 has a variance of 9 / 5 - 1


def simulate(rate, seed=3, steps=30_000, start=10_000, **change):
    settings = {"steps": steps, "start": start, "decay": 0.999, "seed": seed} | change
    return run_fixed_scale(list(DISTANCES), [rate] * len(DISTANCES), SCALE, **settings)


@pytest.fixture(scope="module")
def runs():
    """Runs by learning rate, a hundred times apart at the ends."""
    return {rate: simulate(rate) for rate in (0.3, 0.03, 0.003)}


@pytest.fixture(scope="module")
def shares():
    """Distances in levels: the predicted frequencies."""
    return np.array(list(DISTANCES.values())) / SCALE


def tolerance(shares, steps):
    """Four standard deviations of the frequency over so many steps, and two oscillations cut off at the ends.

    Climbs and falls cancel, each weighed by the E[x^2] of its batch, whose standard deviation is r: that makes
    r sqrt(p (1 - p) / steps).
    """
    r = (0.8 / BATCH) ** 0.5
    return 4 * r * np.sqrt(shares * (1 - shares) / steps) + 2 / steps


@pytest.mark.parametrize("rate", [0.3, 0.03, 0.003])
def test_the_frequency_is_the_distance_in_levels_whatever_the_rate(runs, shares, rate):
    run = runs[rate]
    steps = len(run.latent) - run.start
    assert (np.abs(run.frequency() - shares) <= tolerance(shares, steps)).all()


def test_the_tolerance_tells_the_targets_apart(shares):
    assert (tolerance(shares, 20_000) < 0.002).all()
    assert np.diff(np.sort(shares)).min() > 0.05


def test_the_rate_sets_the_amplitude_of_the_latent_weight(runs):
    """The path of the latent weight is as wide as a climb and a fall, so it goes with the rate."""
    wide, narrow = (np.ptp(runs[rate].latent[runs[rate].start :], axis=0) for rate in (0.3, 0.03))
    np.testing.assert_allclose(wide / narrow, 10, rtol=0.25)


def test_the_latent_weight_stays_at_the_threshold(runs, shares):
    """A threshold lies in the middle of two levels, on the other side of w* than the nearest level."""
    run = runs[0.003]
    nearest = np.array([0.5, 1.0, 1.0, 0.0, -1.5])
    thresholds = nearest + np.sign(run.targets - nearest) * SCALE / 2
    assert (np.abs(run.latent[run.start :] - thresholds) < 2 * 0.003 * SCALE).all()


@pytest.mark.parametrize("rate", [0.3, 0.03, 0.003])
def test_errors_of_raw_and_averaged_weights(runs, shares, rate):
    """Raw: (s - d)^2 for a share d / s of the steps and d^2 else, which makes d (s - d). EMA: always d^2."""
    run, d = runs[rate], shares * SCALE
    steps = len(run.latent) - run.start
    slack = tolerance(shares, steps) * ((SCALE - d) ** 2 - d**2)
    raw = run.squared_error(run.quantized)
    assert (np.abs(raw - d * (SCALE - d)) <= slack).all()
    averaged = run.squared_error(run.averaged_quantized)
    np.testing.assert_allclose(averaged, d**2, rtol=1e-9)
    assert (averaged < raw).all()


def test_a_target_on_a_level_does_not_oscillate():
    run = run_fixed_scale([1.0], [0.1], SCALE, steps=500, start=0, decay=0.9, seed=0)
    assert run.frequency() == [0.0]
    assert run.squared_error(run.quantized) == [0.0]


def test_ema_of_a_step_approaches_geometrically():
    values = np.array([0.0, *[1.0] * 20])
    np.testing.assert_allclose(ema(values, 0.9), 1 - 0.9 ** np.arange(21), atol=1e-15)


# --- learned scales -----------------------------------------------------------------------------------------


def test_lsq_by_hand():
    """Inside, rounded down and up; clipped at both ends."""
    quantized, to_value, to_scale = Grid(-4, 3).apply(np.array([0.6, 0.9, -9.0, 9.0]), 0.5)
    np.testing.assert_allclose(quantized, [0.5, 1.0, -2.0, 1.5])
    np.testing.assert_allclose(to_value, [1, 1, 0, 0])
    np.testing.assert_allclose(to_scale, [-0.2, 0.2, -4, 3], atol=1e-12)


def test_gradients_are_those_of_autograd():
    """The same loss in torch, with a rounding that lets gradients through."""
    torch = pytest.importorskip("torch")
    problem = Regression(np.array([0.9, -0.5, 0.3]), Grid(-2, 1), Grid(0, 7))
    state = np.array([0.8, -0.45, 0.33, 0.4, 0.11])  # 0.8 is clipped, and so are inputs above 0.77
    inputs = np.random.default_rng(0).random((16, 3))

    def quantize(v, scale, qmin, qmax):
        ratio = torch.clamp(v / scale, qmin, qmax)
        return scale * (ratio + (torch.round(ratio) - ratio).detach())

    w, w_scale, x_scale = (torch.tensor(part, requires_grad=True) for part in (state[:3], state[3], state[4]))
    x = torch.tensor(inputs)
    error = quantize(x, x_scale, 0, 7) @ quantize(w, w_scale, -2, 1) - x @ torch.tensor(problem.targets)
    (error**2).mean().div(2).backward()
    expected = [*w.grad.tolist(), w_scale.grad.item() / (3 * 1) ** 0.5, x_scale.grad.item() / (3 * 7) ** 0.5]
    np.testing.assert_allclose(problem.gradient(state, inputs), expected, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module", params=[0, 1])
def learned(request):
    return simulate_oscillation(request.param).learned


def test_raw_scales_and_weights_jump_and_their_ema_does_not(learned):
    last = slice(-len(learned.raw_error), None)
    assert learned.change_rates(learned.raw).max() > 0.1
    assert (learned.change_rates(learned.averaged) == 0).all()
    for column in (-2, -1):
        jumps, drift = (np.abs(np.diff(states[last, column])).mean() for states in (learned.raw, learned.averaged))
        assert drift < jumps / 20
        assert learned.averaged[last, column].std() < learned.raw[last, column].std() / 2
    assert (learned.raw[:, -2:] > 0).all()


def test_the_error_of_the_ema_is_lower_and_steady(learned):
    assert learned.averaged_error.mean() < learned.raw_error.mean() / 2
    assert learned.averaged_error.std() < learned.raw_error.std() / 20


def test_with_a_single_weight_the_scale_ends_the_oscillation():
    """Why the demonstration has several weights."""
    problem = Regression(np.array([0.7]), Grid(-4, 3), Grid(0, 15))
    run = run_learned_scales(problem, rate=0.1, scale_rate=0.1, steps=3000, last=500, decay=0.99, seed=0)
    assert run.change_rates(run.raw) == [0.0]


def test_the_same_seed_gives_the_same_numbers():
    first, second, other = (simulate_oscillation(seed).to_json() for seed in (5, 5, 6))
    assert first == second
    assert first["learned_scales"] != other["learned_scales"]


# --- the command --------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Counts elements, and keeps whatever could make a browser load something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.labels = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "srcset", "data", "action", "xlink:href"):
                self.links.append(value)
            if tag == "svg" and name == "aria-label":
                self.labels.append(value)


@pytest.fixture(scope="module")
def drawn(qyolo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, qyolo("demo", "oscillation", "--json", cwd=folder)


def test_the_command_writes_one_page_that_loads_nothing(drawn):
    folder, outcome = drawn
    assert outcome.code == 0, outcome.stderr
    assert [path.name for path in folder.iterdir()] == ["oscillation.html"]
    text = (folder / "oscillation.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == 7
    assert len(set(page.labels)) == 7
    assert page.tags.count("table") == 2
    assert not page.links
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "$" not in text
    assert "nan" not in re.findall(r"[a-z]+", " ".join(re.findall(r'points="([^"]*)"', text)))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_the_command_prints_tables_and_one_json_object(drawn):
    _, outcome = drawn
    lines = outcome.stdout.splitlines()
    assert [line for line in lines if line.startswith("{")] == [lines[-1]]
    found = outcome.json
    assert (found["page"], found["seed"]) == ("oscillation.html", 0)
    runs = found["fixed_scale"]["runs"]
    assert {run["learning_rate"] for run in runs} == {0.1, 0.01}
    for run in runs:
        levels = abs(run["target"]) / found["fixed_scale"]["scale"]
        distance = abs(levels - round(levels))
        assert run["predicted_frequency"] == pytest.approx(distance)
        assert run["measured_frequency"] == pytest.approx(distance, abs=0.002)
        assert f"{run['measured_frequency']:.4f}" in outcome.stdout
    learned = found["learned_scales"]
    assert learned["ema"]["squared_error_mean"] < learned["raw"]["squared_error_mean"]
    for kind in ("raw", "ema"):
        assert f"{learned[kind]['squared_error_mean']:.5f} ± " in outcome.stdout


def test_another_seed_and_place(qyolo, drawn, tmp_path):
    outcome = qyolo("demo", "oscillation", "--seed", 1, "--out", tmp_path / "new" / "page.html")
    assert outcome.code == 0, outcome.stderr
    assert not [line for line in outcome.stdout.splitlines() if line.startswith("{")]
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "Seed 1." in text
    assert text != (drawn[0] / "oscillation.html").read_text(encoding="utf-8")


def test_a_place_that_cannot_be_written_and_a_bad_seed(qyolo, tmp_path):
    (tmp_path / "taken").mkdir()
    outcome = qyolo("demo", "oscillation", "--out", tmp_path / "taken", "--json")
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: ")
    assert outcome.json["exit_code"] == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["taken"]
    assert qyolo("demo", "oscillation", "--seed", -1, cwd=tmp_path).code == 2


def test_neither_torch_nor_matplotlib_nor_jinja2_is_imported(tmp_path):
    code = (
        "import sys; from qyolo_deploy.stages.demo import run_oscillation; run_oscillation(sys.argv[1]);"
        "print(sorted({'torch', 'matplotlib', 'jinja2', 'onnx'} & set(sys.modules)))"
    )
    arguments = [sys.executable, "-c", code, tmp_path / "page.html"]
    outcome = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == "[]"
