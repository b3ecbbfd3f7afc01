"""Inputs of weights that no module of theirs is called for, against a record kept by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunus
from prunus.calibration.input_pass import measure_inputs
from prunus.core.layers import all_layers
from prunus.stats import InputGram


def measured(model, batches):
    """Layer name -> (Gram matrix, samples)."""
    chosen = {x.name: x for x in all_layers(model) if not x.no_inputs()}
    stats = {x: InputGram(x.matrix_shape()[1]) for x in chosen.values()}
    filled, unreached = measure_inputs(model.eval(), stats, prunus.Calibration(batches))
    return {
        name: (filled[x].gram("cpu"), filled[x].count)
        for name, x in chosen.items()
        if x not in unreached
    }


def close(got, inputs):
    gram, count = got
    assert count == len(inputs)
    torch.testing.assert_close(gram, inputs.T @ inputs, rtol=1e-4, atol=1e-4)


def small_mixtral(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("this transformers has its experts in modules of their own")
    model.set_experts_implementation(implementation)
    return model


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_an_expert_is_measured_on_the_tokens_that_it_is_sent_however_it_is_computed(
    implementation, monkeypatch
):
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    model = small_mixtral("eager")
    experts, sent = model.model.layers[0].mlp.experts, {}
    real = F.linear

    def recording(x, w, bias=None):
        for name in ("gate_up_proj", "down_proj"):
            for e, expert in enumerate(getattr(experts, name)):
                if w.data_ptr() == expert.data_ptr():
                    sent[f"model.layers.0.mlp.experts.{name}[{e}]"] = x
        return real(x, w, bias)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", recording)
        model(input_ids=ids)
    got = measured(small_mixtral(implementation), [{"input_ids": ids}])
    assert sum(len(x) for x in sent.values()) == 2 * 2 * 18
    for name, inputs in sent.items():
        close(got[name], inputs)


class Uses(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.fc, self.use = nn.Linear(4, 6), use

    def forward(self, x):
        return self.use(self, x)


def in_half(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, m.fc.weight)


def without_gradients(m, x):
    with torch.inference_mode():
        return F.linear(x, m.fc.weight, m.fc.bias)


def by_vectors(m, x):
    return torch.stack([m.fc.weight @ row for row in x.flatten(0, 1)])


USES = {
    "linear": lambda m, x: F.linear(x, m.fc.weight),
    "matmul": lambda m, x: x @ m.fc.weight.T,
    "weight first": lambda m, x: m.fc.weight @ x.mT,
    "batched": lambda m, x: torch.baddbmm(m.fc.bias, x, m.fc.weight.T.expand(2, -1, -1)),
    "einsum": lambda m, x: torch.einsum("bti,oi->bot", x, m.fc.weight),
    "autocast": in_half,
    "inference mode": without_gradients,
    "vectors": by_vectors,
    "cast": lambda m, x: F.linear(x.double(), m.fc.weight.double()),
    "two halves": lambda m, x: F.linear(x, m.fc.weight.view(2, 3, 4).flatten(0, 1)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_whatever_multiplies_a_weight_shows_its_inputs(use):
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    if use is in_half:
        x = x.bfloat16().float()
    close(measured(Uses(use), [x])["fc"], x.flatten(0, 1))


def test_a_weight_of_which_only_some_rows_are_used_with_an_input_is_refused():
    def use(m, x):
        return F.linear(x, m.fc.weight[:4]) + F.linear(x.flip(0), m.fc.weight[2:])

    with pytest.raises(ValueError, match="fc: only some of its rows are multiplied with this"):
        measured(Uses(use), [torch.randn(3, 4)])


def test_a_weight_that_nothing_multiplies_is_told_as_unreached():
    assert measured(Uses(lambda m, x: x * m.fc.weight.sum()), [torch.randn(3, 4)]) == {}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_see_the_steps_of_packed_sequences_and_both_directions(kind):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(4, 3, bidirectional=True)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, [5, 2])
            return self.rnn(packed)[0].data

    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    got = measured(Packed(), [x])
    real = torch.cat([x[:, 0], x[:2, 1]])
    close(got["rnn.weight_ih_l0"], real)
    close(got["rnn.weight_ih_l0_reverse"], real)
    assert got["rnn.weight_hh_l0"][1] == 7


def test_kernels_that_are_off_meanwhile_are_on_again():
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
    got = measured(nn.Sequential(model, nn.RNN(4, 3)), [torch.randn(2, 5, 4)])
    assert {count for _, count in got.values()} == {10}
    assert len(got) == 6
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before
