"""A model whose output no longer depends on its input is found out, and no other."""

import logging

import pytest
import torch
from torch import nn

import prunus
from prunus import Calibration
from prunus.calibration.input_dependence import InputDependence, _two

GONE = "the output no longer depends on the input"


def bottleneck():
    """Pruned by half, the second layer reads only what the first no longer writes."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for layer, big in ((model[0], [True, True, False, False]), (model[2], None)):
            layer.weight.uniform_(0.5, 1.0)
            if big is None:
                layer.weight[:, :2] *= 1e-3
            else:
                layer.weight[~torch.tensor(big)] *= 1e-3
    return model


def inactive():
    """What stays after pruning by half is negative, so no unit is active for any input."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[:, :2], model[0].weight[:, 2:] = 0.5, -1.0
        model[0].bias.fill_(-0.1)
    return model


def batches(size=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, 4, generator=generator) + 0.2 for _ in range(2)]


ALL = {"sparsity": 0.5, "layers": ["0", "2"], "allocator": "uniform"}


@pytest.mark.parametrize("size", [4, 1])
def test_pruning_at_once_names_a_constant_output_in_log_result_and_report(size, caplog, tmp_path):
    pytest.importorskip("matplotlib")
    result = prunus.prune(bottleneck(), "magnitude", calibration=batches(size), **ALL)
    assert all(0 < row.zeros < row.size for row in result.rows)  # no layer is empty
    assert result.constant_output
    assert GONE in str(result)
    assert GONE in caplog.text
    assert "use an allocator such as" in caplog.text
    result.report(tmp_path)
    assert "<b>Constant output:</b>" in (tmp_path / "report.html").read_text()


def test_units_that_are_never_active_are_found_too(caplog):
    result = prunus.prune(
        inactive(), "magnitude", sparsity=0.5, layers=["0"], calibration=batches()
    )
    assert result.constant_output


@pytest.mark.parametrize(
    "calibration", [batches(), [(x, torch.zeros(4, 2)) for x in batches()]], ids=["x", "pairs"]
)
def test_a_model_that_still_listens_is_not_named(calibration, caplog, tmp_path):
    pytest.importorskip("matplotlib")
    data = Calibration(calibration, nn.functional.mse_loss)
    result = prunus.prune(bottleneck(), "magnitude", calibration=data, **{**ALL, "sparsity": 0.3})
    assert not result.constant_output
    assert GONE not in caplog.text + str(result)
    result.report(tmp_path)
    assert "Constant output" not in (tmp_path / "report.html").read_text()


def test_a_model_that_never_listened_is_not_blamed_on_pruning(caplog):
    model = bottleneck()
    with torch.no_grad():
        model[4].weight.zero_()
    assert not prunus.prune(model, "magnitude", calibration=batches(), **ALL).constant_output


@pytest.mark.parametrize("closing", [False, True])
def test_a_session_with_data_names_it_once(closing, caplog):
    model = bottleneck()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    window = "{from: 0step, to: 4step, every: 2step}"
    recipe = (
        "modifiers: [{prune: {allocator: uniform, layers: ['0', '2'], "
        f"sparsity: {{from: 0.1, to: 0.5}}, window: {window}}}}}]"
    )
    session = prunus.attach(model, optimizer, recipe, calibration=batches())
    states = []
    with session:
        for _ in range(1 if closing else 6):
            model(batches()[0]).sum().backward()
            optimizer.step()
            states.append(GONE in caplog.text)
    assert caplog.text.count(GONE) == 1
    assert closing or states == [False, False, False, True, True, True]
    assert sum(e["event"] == "constant_output" for e in session.recorder.events) == 1


def test_asking_disturbs_nothing():
    model, data = bottleneck().train(), Calibration(batches())
    model.append(nn.BatchNorm1d(2))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    ask = InputDependence(model, data)
    ask.ask_before()
    assert ask.before is True
    assert torch.equal(torch.rand(2), expected)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class Tokens(nn.Module):
    def __init__(self, listens=True):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.listens = listens

    def forward(self, input_ids, attention_mask=None, labels=None):
        h = self.embed(input_ids) * (1.0 if self.listens else 0.0)
        return {"logits": self.out(h), "loss": None}


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("listens", [True, False])
def test_batches_of_names_are_asked_by_what_they_put_out(examples, listens):
    ids = torch.arange(5 * examples).remainder(9).view(examples, 5)
    data = Calibration([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    ask = InputDependence(Tokens(listens), data)
    ask.ask_before()
    assert ask.before is listens


@pytest.mark.parametrize(
    "data",
    [
        None,
        Calibration([]),
        Calibration([torch.zeros(0, 4)]),
        Calibration([["words"]]),
        Calibration([torch.ones(2, 7)]),  # the model cannot run it
        Calibration(batches(), forward=lambda model, batch: model(batch).sum()),
        Calibration([{"attention_mask": torch.ones(1, 4)}]),
    ],
)
def test_what_cannot_be_tried_tells_nothing(data):
    ask = InputDependence(bottleneck(), data)
    ask.ask_before()
    assert ask.before is None
    assert not ask.lost


def test_the_other_batch_holds_real_examples_where_there_are_several():
    x = batches()[0]
    one, other = _two((x, "targets"))
    assert torch.equal(other[0], x.flip(0))
    assert other[1] == "targets"
    assert one[0] is x
    single = _two({"x": x[:1], "labels": torch.tensor([[1, 2]])})[1]
    assert not torch.equal(single["x"], x[:1])
    assert single["labels"].tolist() == [[1, 2]]


def test_block_by_block_and_without_data_it_is_not_asked(caplog):
    assert not prunus.prune(bottleneck(), "magnitude", **ALL).constant_output
    assert GONE not in caplog.text


def test_the_report_tells_what_is_not_seen(tmp_path):
    pytest.importorskip("matplotlib")
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "rnn": nn.LSTM(8, 8), "b": nn.Linear(8, 8)})
    result = prunus.prune(model, "magnitude", sparsity=0.5)
    if not result.unseen:
        pytest.skip("recurrent weights are layers")
    result.report(tmp_path)
    assert result.unseen.split(":")[0] in (tmp_path / "report.html").read_text()
    assert logging.getLogger("prunus")
