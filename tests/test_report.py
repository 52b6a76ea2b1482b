"""The report: one file that needs nothing else, says what is missing, and agrees with the scores."""

import base64
import csv
import dataclasses
import html.parser
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
import xarray as xr
from matplotlib import _pylab_helpers
from PIL import Image

from physml.errors import ConfigError, DataError, SpecError
from physml.evaluate import evaluate_stepper, save_scores
from physml.fields import Axis, Channel, Grid, Spec, Window
from physml.report import (
    animation,
    correlation_times,
    drawing,
    error_curves,
    field_panels,
    report,
    spectra,
    training_curve,
)
from physml.report.drawing import color_scale, time_scale
from physml.report.ensembles import rank_histograms
from physml.report.fields import panel_leads
from physml.report.page import number
from physml.report.runs import entries, read_runs
from physml.steppers.floors import ExtrapolationConfig, PersistenceConfig

SECTIONS = (
    "summary",
    "errors",
    "correlation",
    "spectra",
    "fields",
    "drift",
    "training",
    "animation",
    "numbers",
    "provenance",
)


class Waves:
    """A `contracts.Dataset` of eight trajectories of waves that travel and turn."""

    def __init__(self):
        axes = (Axis.uniform("x", 12), Axis.uniform("y", 10))
        self.spec, self.lengths = Spec(Grid(axes), (Channel("u", "m s-1"), Channel("v"))), (12,) * 8
        x, y = (np.asarray(axis.centers) for axis in axes)
        phase = np.random.default_rng(0).uniform(0, 6, (8, 1, 1, 1)) + np.arange(12)[:, None, None] * 0.3
        wave = np.sin(2 * np.pi * (x[:, None] + 2 * y) + phase) + 0.3 * np.cos(6 * np.pi * x[:, None] - 2 * phase)
        self.frames = np.stack([wave, wave**2], -1).astype(np.float32)

    def read(self, trajectory, frames):
        window = Window.of(self.frames[trajectory : trajectory + 1, frames.start : frames.stop], self.spec)
        return jax.tree.map(lambda a: a[0], window)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A complete run folder of a two-channel flow."""
    return make_run(tmp_path_factory.mktemp("runs") / "waves", Waves())


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    """The report of that run, alone in its folder."""
    return report(run, tmp_path_factory.mktemp("page") / "report.html")


def make_run(folder, data, rows=5):
    folder.mkdir(parents=True)
    floors = {"persistence": PersistenceConfig().fit(data)}
    scores = evaluate_stepper(
        ExtrapolationConfig().fit(data), data, 5, starts=2, floors=floors, name="waves", sample=folder / "sample.nc",
        metrics=("rmse", "correlation", "bias"), draws=50,
    )  # fmt: skip
    save_scores(scores, folder)
    (folder / "config.yaml").write_text("name: waves\nseed: 7\ndata: {kind: <script>alert(1)</script>}\n")
    (folder / "environment.json").write_text(
        json.dumps(
            {"version": "0.1.0", "packages": {"jax": "0.10.2"}, "devices": ["cpu:0"], "git": {"commit": "abc123"}}
        )
    )
    lines = [{"kind": "train", "step": i, "loss": 1 / i} for i in range(1, rows + 1)]
    lines += [{"kind": "valid", "step": rows, "valid/loss": 0.3}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    return folder


class Page(html.parser.HTMLParser):
    """Collects what the page refers to, and checks that tags close."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.references, self.images, self.ids, self.open, self.tags = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.references += [value for key, value in attrs.items() if key in ("src", "href", "srcset", "data", "action")]
        if tag == "img":
            self.images.append(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read_page(path):
    text = path.read_text()
    return text, Page(text)


def test_page_is_one_file_with_every_section(page):
    text, found = read_page(page)
    assert set(SECTIONS) <= set(found.ids)
    for reference in found.references:
        assert reference.startswith(("#", "data:image/png;base64,", "data:image/gif;base64,")), reference[:60]
        if reference.startswith("#"):
            assert reference[1:] in found.ids
    assert not re.search(r"https?://|url\(|@import", text)
    assert "script" not in found.tags
    assert "&lt;script&gt;" in text
    assert 'class="missing"' not in text
    assert sorted(p.name for p in page.parent.iterdir()) == ["metrics.csv", "metrics.json", "report.html"]


def test_pictures_have_alternative_texts_and_decode(page):
    _, found = read_page(page)
    assert len(found.images) >= 10
    for image in found.images:
        assert len(image["alt"]) > 20
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",", 1)[1])))
        assert min(picture.size) > 50
        assert np.ptp(np.asarray(picture.convert("L"))) > 100, "an empty picture"
    assert any(image["src"].startswith("data:image/gif") for image in found.images)


def test_numbers_of_the_page_are_those_of_the_scores(run, page):
    text, _ = read_page(page)
    loaded = read_runs(run)[0]
    value = float(loaded.scores["score"].sel(model="waves", metric="rmse", channel="u")[0])
    assert number(value) in text
    rows = json.loads((page.parent / "metrics.json").read_text())
    row = next(r for r in rows if (r["model"], r["metric"], r["channel"], r["step"]) == ("waves", "rmse", "u", 1))
    assert row["score"] == pytest.approx(value)
    table = list(csv.DictReader(io.StringIO((page.parent / "metrics.csv").read_text())))
    assert len(table) == len(rows) == loaded.scores["score"].size
    assert float(table[rows.index(row)]["score"]) == pytest.approx(value)


def test_best_of_each_lead_is_bold(run, page):
    text, _ = read_page(page)
    table = re.search(r"<caption>RMSE, u \(m s-1\)</caption>.*?</table>", text, re.S).group()
    scores = read_runs(run)[0].scores["score"].sel(metric="rmse", channel="u")
    bold = [
        ["best" in cell for cell in re.findall(r"<td[^>]*>", row)]
        for row in re.findall(r'<tr><th scope="row">.*?</tr>', table)
    ]
    assert (np.array(bold) == (scores.values == scores.values.min(0))).all()


@pytest.fixture
def quick(monkeypatch):
    """Makes figures but does not render them, where only the page around them is tested."""
    monkeypatch.setattr(drawing, "png", lambda figure, dpi=130: b"")


@pytest.mark.parametrize("lost", ["sample.nc", "metrics.jsonl", "config.yaml", "environment.json", "scores.nc"])
def test_missing_pieces_are_named_and_survived(run, tmp_path, lost, quick):
    folder = tmp_path / "partial"
    folder.mkdir()
    for file in run.iterdir():
        if file.name != lost:
            (folder / file.name).write_bytes(file.read_bytes())
    text, page = read_page(report(folder, tmp_path / "page.html"))
    assert set(SECTIONS) <= set(page.ids)
    expected = {"sample.nc": "No sample fields", "metrics.jsonl": "No training log", "config.yaml": "No config.yaml"}
    assert expected.get(lost, "No scores" if lost == "scores.nc" else "physml") in text


def test_scores_alone_make_a_page(run, tmp_path, quick):
    scores = read_runs(run)[0].scores
    _, page = read_page(report(scores, tmp_path / "page.html"))
    assert set(SECTIONS) <= set(page.ids)


def test_runs_may_have_names(run, tmp_path, quick):
    scores = read_runs(run)[0].scores
    assert [r.name for r in read_runs({"a": scores, "b": run})] == ["a", "b"]
    assert [r.name for r in read_runs({"a": run, "b": run})] == ["a", "b"]
    text, _ = read_page(report({"mine": scores}, tmp_path / "page.html"))
    assert "Run mine" in text
    for wrong in (3, [scores["score"]], {"a": None}):
        with pytest.raises(ConfigError, match="run folders, files scores.nc or datasets"):
            report(wrong, tmp_path / "page.html")


@pytest.mark.parametrize("dim", ["model", "metric", "channel", "lead"])
def test_a_part_of_the_scores_makes_a_page(run, tmp_path, quick, dim):
    scores = read_runs(run)[0].scores
    with pytest.raises(DataError, match=f"lost the dimension '{dim}'.*isel\\({dim}="):
        report(scores.isel({dim: 0}), tmp_path / "page.html")
    _, page = read_page(report(scores.isel({dim: [0]}), tmp_path / "page.html"))
    assert set(SECTIONS) <= set(page.ids)


def test_several_runs_make_a_comparison(run, tmp_path, quick):
    other = tmp_path / "other"
    other.mkdir()
    for file in run.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.yaml").write_text("name: other\n")
    loaded = read_runs([run, other])
    assert [entry.label for entry in entries(loaded)] == ["waves", "other", "persistence"]  # one floor for both
    text, _ = read_page(report([run, other], tmp_path / "compare.html"))
    assert "Comparison of waves, other" in text
    assert "compare.metrics.csv" in text
    rows = json.loads((tmp_path / "compare.metrics.json").read_text())  # other pages of the folder have their own
    assert {row["model"] for row in rows} == {"waves", "other", "persistence"}
    twice = read_runs([run, run])
    assert [r.name for r in twice] == ["waves #1", "waves #2"]


def test_floors_that_differ_are_kept_apart(run):
    loaded = read_runs([run, run])
    loaded[1].scores["score"].loc[{"model": "persistence"}] *= 1.5
    assert [entry.label for entry in entries(loaded)][2:] == ["persistence", "persistence (waves #2)"]


def test_nothing_and_damage_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="at least one run"):
        report([], tmp_path)
    with pytest.raises(DataError, match="no run folder"):
        report(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds none of"):
        report(tmp_path / "empty", tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "scores.nc").write_bytes((run / "scores.nc").read_bytes()[:500])
    with pytest.raises(DataError, match="damaged"):
        report(damaged, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def sample_of(shape, dims, frames=6, unit="Pa"):
    truth = np.random.default_rng(0).standard_normal((frames, *shape)).astype(np.float32)
    coords = {dim: np.linspace(30.0, 40.0, n) for dim, n in zip(dims, shape)}
    coords["lead"] = np.arange(1, frames + 1) * np.timedelta64(6, "h")
    fields = {"p_truth": truth, "p_forecast": truth + 0.1}
    return xr.Dataset({n: (("lead", *dims), v, {"units": unit}) for n, v in fields.items()}, coords)


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((), ()),
        ((20,), ("x",)),
        ((8, 9), ("latitude", "longitude")),
        ((6, 7), ("x", "y")),
        ((3, 6, 7), ("z", "y", "x")),
    ],
)
def test_fields_of_any_rank_are_drawn(shape, dims):
    sample = sample_of(shape, dims)
    figure = field_panels(sample, "p")
    assert len(figure.axes) >= 1
    figure.canvas.draw()
    assert bool(animation(sample, "p")) == (len(shape) > 0)
    assert not _pylab_helpers.Gcf.get_all_fig_managers(), "pyplot was used"


def test_a_slice_of_three_axes_says_where_it_is(run, tmp_path, quick):
    sample = sample_of((3, 6, 7), ("z", "y", "x"))
    sample["z"].attrs["units"] = "m"
    titles = [axes.get_title() for axes in field_panels(sample, "p").axes[:3]]
    assert titles == ["truth, z = 35 m", "forecast, z = 35 m", "forecast minus truth, z = 35 m"]
    assert field_panels(sample.drop_vars("z"), "p").axes[0].get_title() == "truth, z cell 1 of 3"
    folder = shutil.copytree(run, tmp_path / "cube")
    sample.to_netcdf(folder / "sample.nc")
    assert "p, waves, slice at z = 35 m</figcaption>" in report(folder, tmp_path / "r.html").read_text()


def test_wavenumbers_of_a_small_grid_have_few_labels(run):
    """All digits between two powers of ten were written over each other."""
    figure = spectra(run, "u")
    figure.canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = zip(axes.xaxis.get_majorticklocs(), axes.xaxis.get_majorticklabels())
        shown = [label.get_text() for place, label in ticks if low <= place <= high]
        assert 1 <= len(shown) <= 4
        assert all(float(text) > 0 for text in shown)
        assert not any(label.get_text() for label in axes.xaxis.get_minorticklabels())


def test_stages_of_a_curriculum_are_marked(run, tmp_path):
    """Their losses are of other rollouts: one line through all looked like a training that diverged."""
    folder = shutil.copytree(run, tmp_path / "staged")
    steps = {10: 1, 20: 1, 30: 2, 40: 2, 50: 3}
    records = [{"step": step, "loss": stage * 1.0, "stage": stage} for step, stage in steps.items()]
    records += [{"step": 50, "valid/loss": 1.0}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    axes = training_curve([folder]).axes[0]
    drawn = [line.get_xdata().tolist() for line in axes.lines if line.get_linestyle() == "-"]
    assert drawn == [[10, 20], [30, 40], [50]]
    assert [text.get_text() for text in axes.texts] == ["stage 2", "stage 3"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation"]
    assert not training_curve([run]).axes[0].texts


def test_the_page_says_what_its_intervals_rest_on(run, tmp_path, quick):
    scores = read_runs(run)[0].scores
    text = report(scores, tmp_path / "r.html").read_text()
    assert "bootstrap interval over 8 groups (trajectory): few, so the interval is rough" in text
    text = report(scores.assign_attrs(bootstrap_groups=40), tmp_path / "r.html").read_text()
    assert "bootstrap interval over 40 groups (trajectory)." in text


def test_maps_have_degrees_common_limits_and_gray_land():
    sample = sample_of((8, 9), ("latitude", "longitude"))
    for name in ("p_truth", "p_forecast"):
        sample[name][:, 2:4, 3:5] = np.nan
    figure = field_panels(sample, "p", leads=[0, 5])
    maps = [
        axes
        for axes in figure.axes
        if axes.collections and axes.get_title() in ("truth", "forecast", "forecast minus truth")
    ]
    limits = {axes.get_title(): axes.collections[0].get_clim() for axes in maps}
    assert limits["truth"] == limits["forecast"]
    low, high = limits["forecast minus truth"]
    assert low == -high
    figure.canvas.draw()
    labels = [label.get_text() for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    assert any(label.endswith("°N") for label in labels)
    assert any(label.endswith("°E") for label in labels)
    assert maps[0].collections[0].get_array().mask.sum() == 4
    assert maps[0].get_facecolor()[:3] == pytest.approx((0.741, 0.741, 0.741), abs=0.01)


def test_x_runs_to_the_right_whatever_the_order():
    sample = sample_of((6, 9), ("x", "y"))
    axes = field_panels(sample, "p", leads=[0]).axes[0]
    drawn = np.asarray(axes.collections[0].get_array()).reshape(9, 6)
    np.testing.assert_array_equal(drawn, sample["p_truth"][0].values.T)
    assert len(Image.open(io.BytesIO(animation(sample, "p"))).getpalette()) > 0


def test_animation_shows_every_lead_with_stable_colors():
    picture = Image.open(io.BytesIO(animation(sample_of((8, 8), ("y", "x"), frames=7), "p")))
    assert picture.n_frames == 7
    many = Image.open(io.BytesIO(animation(sample_of((8, 8), ("y", "x"), frames=90), "p")))
    assert many.n_frames == 60


def test_error_curves_hold_the_scores_and_their_band(run):
    lines = entries(read_runs(run))
    axes = error_curves(lines, "rmse", "u").axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    for entry in lines:
        np.testing.assert_allclose(drawn[entry.label], entry.of("score").sel(metric="rmse", channel="u"))
    assert len(axes.collections) == len(lines)
    assert axes.get_xlabel() == "lead time"
    bars = correlation_times(lines, "u").axes[0].patches
    assert len(bars) == len(lines) * 3


def test_spectra_of_runs_are_compared_at_equal_leads(run):
    loaded = read_runs([run, run])
    kept = loaded[1].scores.isel(spectrum_lead=[1, 2]).assign_attrs(loaded[1].scores.attrs)
    runs = [loaded[0], dataclasses.replace(loaded[1], scores=kept)]
    panels = spectra(entries(runs), "u").axes
    drawn = [{line.get_label() for line in axes.lines} for axes in panels]
    assert "waves #2" not in drawn[0]
    assert "waves #2" in drawn[1] & drawn[2]
    one, two = (next(a for a in panels[1].lines if a.get_label() == f"waves #{i}") for i in (1, 2))
    np.testing.assert_allclose(one.get_ydata(), two.get_ydata())


def test_ensembles_have_a_section_of_their_own(run, tmp_path, quick):
    """Bars of the last lead are the rank histogram; a single model has none."""
    assert "ensembles" not in SECTIONS
    scores = read_runs(run)[0].scores
    with pytest.raises(SpecError, match="no model is an ensemble"):
        rank_histograms(scores, "u")
    shares = np.full((scores.sizes["model"], 2, scores.sizes["lead"], 4), np.nan)
    shares[0] = [0.1, 0.2, 0.3, 0.4]
    ranked = scores.assign(rank_histogram=(("model", "channel", "lead", "rank"), shares))
    coverage = scores.assign_coords(metric=["coverage_90", *scores["metric"].values[1:]])
    (axes,) = error_curves(coverage, "coverage_90", "u").axes
    assert [0.9, 0.9] in [list(line.get_ydata()) for line in axes.lines]  # what a perfect ensemble has
    panels = rank_histograms(ranked, "u").axes
    assert len(panels) == 3
    np.testing.assert_allclose([bar.get_height() for bar in panels[2].patches], [0.1, 0.2, 0.3, 0.4])
    text = report(ranked, tmp_path / "page.html").read_text()
    assert "Rank histogram, u" in text
    assert "Rank histogram" not in report(scores, tmp_path / "single.html").read_text()


def test_figures_take_scores_and_name_what_is_missing(run):
    scores = read_runs(run)[0].scores
    assert error_curves(scores, "rmse", "v").axes[0].lines
    with pytest.raises(SpecError, match="Did you mean 'rmse'"):
        error_curves(scores, "rmsee", "u")
    with pytest.raises(SpecError, match="Valid: u, v"):
        spectra(scores, "w")


def test_lead_times_read_well():
    days, unit = time_scale(np.arange(1, 4) * np.timedelta64(1, "D"))
    assert unit == "days"
    assert days.tolist() == [1, 2, 3]
    assert time_scale(np.arange(1, 5) * np.timedelta64(6, "h"))[1] == "hours"
    assert time_scale(np.arange(1, 60) * np.timedelta64(6, "h"))[1] == "days"
    assert time_scale(np.array([0.2, 0.4]), "s")[1] == "s"
    assert panel_leads(3) == [0, 1, 2]
    assert panel_leads(200)[0] == 0
    assert panel_leads(200)[-1] == 199
    assert panel_leads(1) == [0]


def test_numbers_read_well():
    assert [number(v) for v in (461.63, 1050.4, 0.0043494, 0.0, -0.5, np.nan, np.inf)] == [
        "461.6", "1050", "0.004349", "0", "−0.5000", "–", "∞",
    ]  # fmt: skip
    assert number(3e-9) == "3.000e−09"


def test_signed_fields_get_a_centered_scale():
    norm, colors, _ = color_scale(np.linspace(-3, 2, 50))
    assert norm.vmin == -norm.vmax
    assert colors == "RdBu_r"
    assert color_scale(np.linspace(95000, 103000, 50))[1] == "viridis"
    assert color_scale(np.full(4, np.nan))[0].vmax == 1
