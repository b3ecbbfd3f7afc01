import json
import re
import subprocess
import sys

import pytest
import torch

import prunus
from prunus.report import write_report
from prunus.report.figure import draw
from prunus.report.records import FILE
from prunus.report.summary import Summary, in_units

from tests.oracles.pruning import small_mlp

GRADUAL = """
modifiers:
  - prune:
      sparsity: {from: 0.2, to: 0.8}
      window: {from: 1step, to: 5step, every: 2step}
"""


def trained(directory=None, **arguments):
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with prunus.attach(model, optimizer, GRADUAL, output_dir=directory, **arguments) as session:
        for step in range(6):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=1 / (step + 1), accuracy=step / 6)
    return session


def page_of(directory):
    return (directory / "report.html").read_text()


def test_a_session_reports_on_one_self_contained_page(tmp_path):
    trained().report(tmp_path)
    page = page_of(tmp_path)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"<script|<link|@import|url\((?!#)", page)
    for text in ("79.9 %", "sparsity of 2 layers<", "final loss", "final accuracy", "magnitude",
                 "to: 0.8", "every: 2step"):  # fmt: skip
        assert text in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_the_size_before_and_after(tmp_path):
    session = trained()
    session.report(tmp_path)
    before, after = Summary(session.recorder.events).size
    prunus.save(session.model, tmp_path / "m.safetensors", pruning=session, compact=True)
    assert before == sum(p.nbytes for p in session.model.parameters())
    body = sum(t.nbytes for t in packed(tmp_path / "m.safetensors").values())
    assert after == body
    assert f"{in_units(before)} → {in_units(after)}" in page_of(tmp_path)


def packed(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_a_one_shot_run_reports_its_layers(tmp_path):
    result = prunus.prune(small_mlp(), "magnitude", sparsity=0.5)
    result.report(tmp_path)
    page = page_of(tmp_path)
    assert "50.0 %" in page
    assert "<td>2</td>" in page
    assert "final" not in page


def test_a_sweep_reports_what_each_sparsity_costs(tmp_path):
    swept = prunus.sweep(small_mlp(), "magnitude", [0.9, 0.5], lambda m: {"error": 0.25})
    swept.report(tmp_path)
    page = page_of(tmp_path)
    assert page.index("0.5000") < page.index("0.8997")
    for text in ("error", "highest sparsity of 2 layers<", "Layers, at 90.0 %", "size, compact"):
        assert text in page


def test_sweeps_of_two_pruners_are_two_lines(tmp_path):
    model, data = small_mlp(), [(torch.randn(4, 8), torch.randn(4, 4))]
    calibration = prunus.Calibration(data, torch.nn.functional.mse_loss)
    first, second = (
        prunus.sweep(model, name, [0.5], lambda m: {"error": 0.25}, calibration=calibration)
        for name in ("magnitude", "obs")
    )
    for event in second.recorder.events:
        first.recorder(event)
    first.report(tmp_path)
    page = page_of(tmp_path)
    assert "<td>magnitude</td>" in page
    assert "<td>obs</td>" in page


def test_one_shot_records_stream_to_their_directory(tmp_path):
    prunus.prune(small_mlp(), "magnitude", sparsity=0.5, output_dir=tmp_path)
    assert write_report(tmp_path) == tmp_path / "report.html"


def events(layers=0, metrics=0):
    names = {f"blocks.{i}.mlp.a_rather_long_name_of_a_layer.fc": i / layers for i in range(layers)}
    start = {"event": "start", "step": 0, "bytes": 4096, "recipe": "<b>&", "time": 1e9}
    prune = {"event": "prune", "step": 3, "pruner": "m", "pattern": "p", "target": None,
             "sparsity": 0.5, "layers": names, "sizes": dict.fromkeys(names, 64),
             "saved": {}}  # fmt: skip
    logged = [{"event": "metrics", "step": i, "loss": 1.0} for i in range(metrics)]
    return [start, *([prune] if layers else []), *logged]


@pytest.mark.parametrize(("layers", "metrics"), [(0, 0), (0, 5), (2, 0), (2, 1), (60, 0), (300, 3)])
def test_any_run_has_a_page(tmp_path, layers, metrics):
    lines = [json.dumps(event) for event in events(layers, metrics)]
    (tmp_path / FILE).write_text("\n".join(lines))
    write_report(tmp_path)
    assert page_of(tmp_path).count('class="bar"') == layers
    assert "&lt;b&gt;&amp;" in page_of(tmp_path)


def test_layers_that_no_entry_shares_count_together():
    first, second = events(2)[1], events(3)[1]
    first |= {"layers": {"a": 0.5}, "sizes": {"a": 30}, "sparsity": 0.5, "step": 2}
    second |= {"layers": {"b": 0.9}, "sizes": {"b": 10}, "sparsity": 0.9, "step": 4}
    summary = Summary([first, second, first | {"layers": {"a": 0.7}, "step": 6}])
    assert summary.progress() == [
        (2, pytest.approx(15 / 40)), (4, pytest.approx(24 / 40)), (6, pytest.approx(30 / 40))
    ]  # fmt: skip
    assert summary.sparsity == pytest.approx(30 / 40)
    assert [len(part) for part in summary.parts()] == [2, 1]


@pytest.mark.parametrize(("names", "labels"), [
    (["a.0", "a.1"], ["a.0", "a.1"]),
    ([f"h.{i}.{k}" for i in range(40) for k in "qkv"], [f"h.*.{k}  ×40" for k in "qkv"]),
    ([f"s{i}.{j}.{k}{i}" for i in range(70) for j in range(2) for k in "abc"],
     [f"s*.*.{k}*  ×140" for k in "abc"]),
    ([str(i) for i in range(100)], [f"{i}  ×2" for i in range(0, 100, 2)]),
])  # fmt: skip
def test_many_layers_show_as_bars_of_their_kinds(names, labels):
    prune = events(1)[1] | {"layers": dict.fromkeys(names, 0.5), "sizes": dict.fromkeys(names, 2)}
    bars = Summary([prune]).bars()
    assert len(bars) <= 60
    assert sum(int((re.findall(r"×(\d+)", bar.label) or [1])[0]) for bar in bars) == len(names)
    assert [bar.label for bar in bars] == labels


def test_a_bar_of_several_layers_weighs_them_by_size_and_shows_the_range():
    names = [f"h.{i}.{k}" for i in range(40) for k in "qkv"]
    values = {name: 0.9 if name.startswith("h.7.") else 0.4 for name in names}
    sizes = {name: 390 if name.startswith("h.7.") else 10 for name in names}
    for bar in Summary([events(1)[1] | {"layers": values, "sizes": sizes}]).bars():
        assert bar.sparsity == pytest.approx(0.65)
        assert (bar.low, bar.high) == (0.4, 0.9)


def test_numbers_that_are_not_finite_and_odd_names_are_shown(tmp_path):
    session = trained()
    for value in (float("nan"), float("inf")):
        session.log(**{"$odd_{": value, "<i>": 1.0})
    session.report(tmp_path)
    assert "&lt;i&gt;" in page_of(tmp_path)
    assert "<i>" not in page_of(tmp_path)


def test_the_same_records_give_the_same_page(tmp_path):
    pages = []
    trained().report(tmp_path)
    for _ in range(2):
        write_report(tmp_path)
        pages.append(page_of(tmp_path))
    assert pages[0] == pages[1]


def test_a_report_does_not_touch_pyplot_or_the_settings_of_matplotlib(tmp_path):
    code = """if True:
        import sys, matplotlib, prunus.report
        before = matplotlib.rcParams.copy()
        prunus.report.write_report(sys.argv[1])
        assert "matplotlib.pyplot" not in sys.modules
        assert matplotlib.rcParams.copy() == before
    """
    (tmp_path / FILE).write_text("\n".join(json.dumps(event) for event in events(2, 2)))
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_no_records_and_empty_records_are_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no records.jsonl in"):
        write_report(tmp_path)
    (tmp_path / FILE).write_text("")
    with pytest.raises(ValueError, match="is empty"):
        write_report(tmp_path)


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    (tmp_path / FILE).write_text(json.dumps(events()[0]))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'prunus\[report\]'"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        [1e308] * 5,
        [1e308, -1e308],
        [-1e308] * 3,
        [1.7e308, 1.0],
        [1e99, -1e99],
        [5e-324, 1e-320],
        [float("inf")] * 3,
        [float("nan"), 1.0],
        [10**400, 1],
        [None, 0.5],
        ["x", 0.5],
    ],
)
def test_a_report_stands_whatever_was_logged(tmp_path, values):
    lines = [{"event": "metrics", "step": i, "loss": v, "time": 1.0} for i, v in enumerate(values)]
    swept = {
        "layers": {"a": 0.5},
        "sizes": {"a": 4},
        "saved": {"a": 1},
        "sparsity": 0.5,
        "pattern": "row",
    }
    for value in values:
        event = {"event": "sweep", "step": 0, "pruner": "obs", "values": {"acc": value}}
        lines.append({**event, **swept})
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(tmp_path)
    assert "loss" in page_of(tmp_path)


def test_a_picture_says_how_many_values_it_leaves_out():
    points = [(1, 0.5), (2, 1e308), (3, float("nan")), (4, float("-inf"))]
    metrics = [{"event": "metrics", "step": i, "loss": value} for i, value in points]
    figure = draw(Summary(metrics))
    label = figure.axes[0].get_xlabel()
    assert label == "optimizer step; not drawn: 3 NaN, infinite or beyond 1e100"
    assert figure.axes[0].lines[0].get_ydata()[0] == 0.5
