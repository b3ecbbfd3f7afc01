"""Gradient samples: right, and without a trace in the user's training."""

import copy
import logging
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import prunus
from prunus.calibration.example_gradients import (
    ExampleGradients,
    gradients_on,
    micro_batch_gradients,
)
from prunus.core.layers import all_layers

from tests.oracles.pruning import small_cnn, small_mlp

BODY = ["0", "2"]  # named, so that the first call of a loss that counts them is a gradient's

mse = nn.functional.mse_loss


def data(number=6, size=4, shape=(8,), dtype=torch.float32, outputs=4):
    return [
        (torch.randn(size, *shape, dtype=dtype), torch.randn(size, outputs, dtype=dtype))
        for _ in range(number)
    ]


def cap(**settings):
    return prunus.CAP(block_size=8, damp=1e-4, **settings)


def test_a_pruning_step_leaves_all_but_the_weights_as_it_was():
    model = small_cnn().train()
    model[3].eval()  # a mode of its own
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    mse(model(torch.randn(4, 3, 8, 8)), torch.randn(4, 4)).backward()
    frozen = model[8].weight.requires_grad_(False)
    batches = data(shape=(3, 8, 8))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    modes = {name: m.training for name, m in model.named_modules()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    def loss(output, y):
        random.random(), np.random.rand(), torch.rand(1)
        return mse(output, y)

    prunus.prune(model, cap(), sparsity=0.5, calibration=prunus.Calibration(batches, loss))
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if n in grads)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(grads)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert not frozen.requires_grad
    assert not torch.is_autocast_enabled("cpu")
    assert optimizer.state == {}


def test_training_with_a_pruning_pause_that_prunes_nothing_is_training_without_it():
    def train(recipe):
        torch.manual_seed(0)
        model = small_cnn()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        loader = DataLoader(TensorDataset(torch.randn(32, 3, 8, 8), torch.randn(32, 4)), 4, True)
        calibration = prunus.Calibration(loader, mse)
        session = recipe and prunus.attach(model, optimizer, recipe, calibration=calibration)
        for _ in range(2):
            for x, y in loader:  # the session reads the same loader in the middle
                mse(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        if session:
            session.close()
        return model.state_dict()

    schedule = prunus.modifiers.prune.Schedule(values=(0.0, 0.0))
    window = prunus.modifiers.timing.Window("2step", "10step", "4step")
    plain = train(None)
    paused = train(prunus.Recipe((prunus.PruningModifier(cap(), schedule, window=window),)))
    assert all(torch.equal(plain[name], t) for name, t in paused.items())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_the_users_iteration_of_the_same_loader_goes_on(persistent):
    dataset = TensorDataset(torch.arange(24.0).reshape(24, 1).expand(24, 8), torch.zeros(24, 4))
    model = small_mlp()

    def read(pause):
        loader = DataLoader(
            dataset,
            4,
            shuffle=True,
            num_workers=1,
            persistent_workers=persistent,
            generator=torch.Generator().manual_seed(1),
            multiprocessing_context="fork",
        )
        seen = []
        for i, (x, _) in enumerate(loader):
            seen.append(x[:, 0].tolist())
            if i == 2 and pause:
                calibration = prunus.Calibration(loader, mse, num_batches=2)
                prunus.prune(copy.deepcopy(model), cap(), sparsity=0.5, calibration=calibration)
        return seen + [x[:, 0].tolist() for x, _ in loader]

    assert read(pause=True) == read(pause=False)


def by_batch_sampler(dataset):
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(5))
    return DataLoader(dataset, batch_sampler=BatchSampler(sampler, 4, False))


@pytest.mark.parametrize("load", [lambda d: DataLoader(d, 4, shuffle=True), by_batch_sampler])
def test_every_pass_sees_the_same_batches_of_a_shuffling_loader(load):
    dataset = TensorDataset(torch.randn(32, 8), torch.randn(32, 4))
    loader = load(dataset)
    model = small_mlp()
    results = []
    for memory in (None, 30_000):
        torch.manual_seed(3)
        pruned = copy.deepcopy(model)
        calibration = prunus.Calibration(loader, mse, memory=memory)
        prunus.prune(pruned, cap(), sparsity=0.5, calibration=calibration)
        results.append(pruned.state_dict())
    for name, t in results[0].items():
        torch.testing.assert_close(results[1][name], t)


def test_recomputations_read_on_where_the_last_stopped():
    batches, seen = data(number=7), []

    def forward(model, batch):
        seen.append(next(i for i, b in enumerate(batches) if b is batch))
        return mse(model(batch[0]), batch[1])

    calibration = prunus.Calibration(batches, forward=forward)
    pruner = cap(num_grads=3, num_recomputations=4)
    prunus.prune(small_mlp(), pruner, sparsity=0.5, layers=BODY, calibration=calibration)
    assert seen == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]


# bad data


def scaled(bad):
    def loss(output, y):
        loss.calls += 1
        return mse(output, y) * (math.nan if loss.calls in bad else 1.0)

    loss.calls = 0
    return loss


def test_a_bad_gradient_is_left_out_and_counted(caplog):
    batches, model = data(number=40), small_mlp()
    good = [batch for i, batch in enumerate(batches, 1) if i != 7]
    expected = copy.deepcopy(model)
    prunus.prune(expected, cap(), sparsity=0.5, calibration=prunus.Calibration(good, mse))
    calibration = prunus.Calibration(batches, scaled({7}))
    prunus.prune(model, cap(), sparsity=0.5, layers=BODY, calibration=calibration)
    assert "1 of 40 gradients of 0 were NaN or infinite and left out, the first from batch 7" in (
        caplog.text
    )
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_more_than_a_few_bad_gradients_name_the_batch_and_change_nothing():
    model = small_mlp()
    before = copy.deepcopy(model.state_dict())
    calibration = prunus.Calibration(data(number=40), scaled({7, 9, 11}))
    with pytest.raises(ValueError, match="3 of 40 gradients of 0 are NaN .* first from batch 7"):
        prunus.prune(model, cap(), sparsity=0.5, layers=BODY, calibration=calibration)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_bad_batch_is_named_by_its_place_in_the_data_at_every_stage(caplog):
    batches = data(number=60)
    batches[25][0][0, 0] = math.nan
    pruner = cap(num_recomputations=3, num_grads=20)
    calibration = prunus.Calibration(batches, mse)
    prunus.prune(small_mlp(), pruner, sparsity=0.5, calibration=calibration)
    assert "1 of 20 gradients of 0 were NaN or infinite and left out, the first from batch 26" in (
        caplog.text
    )


def test_what_is_left_out_does_not_depend_on_the_plan(caplog):
    """Infinite in one layer only: the other layers keep the sample, whatever passes there are."""
    results = []
    for memory in (None, 20_000):
        torch.manual_seed(0)
        model = small_mlp()

        def forward(model, batch):
            loss = mse(model(batch[0]), batch[1])
            bad = float(batch[0][0, 0]) == 9.0
            return loss + (model[2].weight.sum() * (math.inf if bad else 0.0))

        batches = data(number=60)
        batches[8][0][0, 0] = batches[30][0][0, 0] = 9.0
        calibration = prunus.Calibration(batches, forward=forward, memory=memory)
        prunus.prune(model, cap(), sparsity=0.5, calibration=calibration)
        results.append(model.state_dict())
    assert "gradients of 2 were NaN" in caplog.text
    for name, t in results[0].items():
        torch.testing.assert_close(results[1][name], t)


def test_a_layer_that_no_loss_depends_on_is_named():
    model = nn.ModuleDict({"used": nn.Linear(8, 4), "idle": nn.Linear(8, 4)})
    calibration = prunus.Calibration(data(), forward=lambda m, b: mse(m["used"](b[0]), b[1]))
    with pytest.raises(ValueError, match="the loss of no calibration batch depends on idle"):
        prunus.prune(model, cap(), sparsity=0.5, layers="*", calibration=calibration)


def test_no_batches_and_no_loss_are_errors_that_say_what_to_pass():
    with pytest.raises(ValueError, match="the calibration data is empty; nothing was pruned"):
        prunus.prune(small_mlp(), cap(), sparsity=0.5, calibration=prunus.Calibration([], mse))
    with pytest.raises(ValueError, match=r"loss of one number, .* gave shape \(4, 4\); pass"):
        calibration = prunus.Calibration([batch[0] for batch in data()])
        prunus.prune(small_mlp(), cap(), sparsity=0.5, calibration=calibration)


def test_fewer_batches_than_gradients_are_logged(caplog):
    caplog.set_level(logging.INFO, "prunus")
    calibration = prunus.Calibration(data(number=5), mse)
    prunus.prune(small_mlp(), cap(num_grads=99), sparsity=0.5, calibration=calibration)
    assert "num_grads=99, and the calibration data gave 5 gradients" in caplog.text


# examples


class Tricky(nn.Module):
    """A layer called twice, another whose weight is used outside its module, and in-place ops."""

    def __init__(self, outside):
        super().__init__()
        self.twice, self.once = nn.Linear(8, 8), nn.Linear(8, 4)
        self.outside = outside

    def forward(self, x):
        x = torch.relu_(self.twice(torch.relu_(self.twice(x))))
        return nn.functional.linear(x, self.once.weight) if self.outside else self.once(x)


MODELS = {
    "mlp": (small_mlp, (8,)),
    "twice": (lambda d: Tricky(False).to(d), (8,)),
    "tokens": (
        lambda d: nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Flatten(), nn.Linear(30, 4)).to(d),
        (5, 8),
    ),
    "conv": (
        lambda d: nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 5, 2),
            nn.Flatten(),
            nn.Linear(45, 4),
        ).to(d),
        (3, 8, 8),
    ),
    "grouped": (small_cnn, (3, 8, 8)),
    "outside": (lambda d: Tricky(True).to(d), (8,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_examples_are_those_of_passes_of_their_own(name):
    build, shape = MODELS[name]
    model = build(torch.float64).eval()
    layers = list(all_layers(model))
    (batch,) = data(number=1, size=7, shape=shape, dtype=torch.float64)
    calibration = prunus.Calibration([batch], mse)
    with gradients_on(model, layers):
        take = ExampleGradients(model, layers, calibration, 3)
        packets = list(take(batch))
        singles = [
            micro_batch_gradients(
                model, layers, calibration, (batch[0][i : i + 1], batch[1][i : i + 1])
            )
            for i in range(7)
        ]
    assert take.by_hooks == (name not in ("grouped", "outside"))
    assert [len(packet[0]) for packet in packets] == [3, 3, 1]
    for i in range(len(layers)):
        mine = torch.cat([packet[i] for packet in packets])
        theirs = torch.cat([single[i] for single in singles])
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_examples_count_towards_the_number_of_gradients():
    model = small_mlp()
    stat = prunus.fisher(
        model,
        prunus.Calibration(data(number=9, size=4), mse),
        settings=prunus.OBS(block_size=8, num_grads=10, samples="example"),
    )
    assert stat["2"].count == 10


def test_a_sum_over_the_batch_is_found_out(caplog):
    calibration = prunus.Calibration(data(), lambda output, y: (output - y).square().sum())
    pruner = cap(samples="example")
    prunus.prune(small_mlp(), pruner, sparsity=0.5, calibration=calibration)
    assert "one backward pass for each example, because the loss is no mean" in caplog.text


def test_a_mean_over_tokens_is_found_out(caplog):
    """Examples of different lengths weigh differently in it."""
    lengths = [5, 1, 9, 2, 8, 5, 4, 6]
    x, y = torch.randn(8, 9, 8), torch.randint(4, (8, 9))
    for i, length in enumerate(lengths):
        y[i, length:] = -100

    def loss(output, y):
        return nn.functional.cross_entropy(output.flatten(0, 1), y.flatten())

    calibration = prunus.Calibration([(x, y)], loss)
    prunus.prune(small_mlp(), cap(samples="example"), sparsity=0.5, calibration=calibration)
    assert "the loss is no mean over examples" in caplog.text


def test_hooks_are_not_trusted_before_they_could_be_checked():
    model = Tricky(outside=True)
    batches = data(number=30)
    batches[0][0][:] = math.nan
    settings = prunus.OBS(block_size=8, samples="example")
    calibration = prunus.Calibration(batches, mse)
    stat = prunus.fisher(model, calibration, layers="*", settings=settings)
    assert stat["once"].count == 29 * 4  # the weight that its module's hook never sees


def test_sums_are_exact_inside_autocast():
    model, batches = small_mlp(), data(number=9)

    def forward(model, batch):
        with torch.autocast("cpu", enabled=False):
            return mse(model(batch[0]), batch[1])

    for settings in (prunus.OBS(), prunus.OBS(samples="example")):
        calibration = prunus.Calibration(batches, forward=forward)
        with torch.autocast("cpu", torch.bfloat16):
            inside = prunus.fisher(model, calibration, settings=settings)
            assert torch.is_autocast_enabled("cpu")
        outside = prunus.fisher(model, calibration, settings=settings)
        torch.testing.assert_close(inside.diag()["2"], outside.diag()["2"], rtol=1e-5, atol=1e-9)


def test_dictionaries_are_taken_apart_too():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x, y):
            return {"error": mse(self.layer(x), y)}

    batches = [{"x": x, "y": y} for x, y in data()]
    calibration = prunus.Calibration(batches, lambda output, batch: output["error"])
    model = Named()
    prunus.prune(model, cap(samples="example"), sparsity=0.5, layers="*", calibration=calibration)
    assert (model.layer.weight == 0).sum() == 16


class _Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.a, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, x):
        return self.out(self.a(self.embed(x)).tanh()).transpose(1, 2)


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_texts_of_unequal_lengths_in_any_batch_have_gradients_of_their_own(first):
    torch.manual_seed(0)
    model = _Tagger().double()
    x = [torch.randint(0, 11, (5, 7)) for _ in range(4)]
    y = [t.roll(-1, 1).clone() for t in x]
    for labels in y[1:]:  # the first batch has texts of one length
        for i in range(5):
            labels[i, 1 + i :] = -100
    loss = nn.functional.cross_entropy
    slow = torch.zeros(8, 8, dtype=torch.float64)
    for text, labels in zip(torch.cat(x), torch.cat(y), strict=True):
        (grad,) = torch.autograd.grad(loss(model(text[None]), labels[None]), [model.a.weight])
        slow += grad.square() / 20
    order = [(first + i) % 4 for i in range(4)]
    settings = prunus.OBS(num_grads=20, samples="example", block_size=8, damp=1e-12)
    batches = prunus.Calibration([(x[i], y[i]) for i in order], loss)
    fast = prunus.fisher(model, batches, layers="a", settings=settings).diag()["a"]
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11)
