import json
import re
import sys

import pytest
import torch

import prunus
from oracles import small_mlp
from prunus.records import FILE
from prunus.report import write_report

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
    assert "<script" not in page
    assert "@import" not in page
    for text in ("79.9 %", "layers pruned", "final loss", "final accuracy", "magnitude",
                 "to: 0.8", "every: 2step"):  # fmt: skip
        assert text in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_the_size_before_and_after(tmp_path):
    from prunus.report.summary import Summary, in_units

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
    assert "error" in page


def test_one_shot_records_stream_to_their_directory(tmp_path):
    prunus.prune(small_mlp(), "magnitude", sparsity=0.5, output_dir=tmp_path)
    assert write_report(tmp_path) == tmp_path / "report.html"


def events(layers=0, metrics=0):
    names = {f"blocks.{i}.mlp.a_rather_long_name_of_a_layer.fc": i / layers for i in range(layers)}
    start = {"event": "start", "step": 0, "bytes": 4096, "recipe": "<b>&", "time": 1e9}
    prune = {"event": "prune", "step": 3, "pruner": "m", "pattern": "p", "target": None,
             "sparsity": 0.5, "layers": names, "saved": {}}  # fmt: skip
    logged = [{"event": "metrics", "step": i, "loss": 1.0} for i in range(metrics)]
    return [start, *([prune] if layers else []), *logged]


@pytest.mark.parametrize(("layers", "metrics"), [(0, 0), (0, 5), (2, 0), (2, 1), (60, 0), (300, 3)])
def test_any_run_has_a_page(tmp_path, layers, metrics):
    lines = [json.dumps(event) for event in events(layers, metrics)]
    (tmp_path / FILE).write_text("\n".join(lines))
    write_report(tmp_path)
    assert page_of(tmp_path).count('class="bar"') == layers
    assert "&lt;b&gt;&amp;" in page_of(tmp_path)


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
