"""A network trained with masks on its activations runs as a submanifold one, with the same values."""

import pytest
import torch
from torch import nn

import prunus
from prunus import spatial


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding="same", bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


LAYERS = ["3", "5"]


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, 10, 10, generator=generator), torch.arange(16) % 4


@pytest.mark.parametrize("choice", [{"share": 0.2}, {"threshold": 0.8}])
@pytest.mark.parametrize("flow", list(spatial.DATAFLOWS))
def test_running_sparse_changes_no_output_and_no_gradient(choice, flow):
    model, (x, y) = net().double(), data()
    masks = spatial.sparse_inputs(model, LAYERS, **choice)
    expected = model(x.double())
    nn.functional.cross_entropy(expected, y).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    if "share" in choice:
        assert masks.density == pytest.approx({"3": 0.2, "5": 0.2})
    model.zero_grad()
    spatial.run_sparse(model, masks, flow)
    output = model(x.double())
    torch.testing.assert_close(output, expected)
    nn.functional.cross_entropy(output, y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name.replace(".conv.", ".")])


def test_a_share_keeps_the_strongest_sites_of_each_example():
    x = torch.randn(3, 4, 5, 6)
    mask = spatial.SiteChoice(share=0.3).mask(x)
    assert mask.shape == (3, 1, 5, 6)
    assert mask.flatten(1).sum(1).tolist() == [9, 9, 9]
    norms = x.norm(dim=1, keepdim=True)
    for example, kept in zip(norms, mask, strict=True):
        assert example[kept].min() > example[~kept].max()


def test_removing_the_masks_gives_the_dense_network_back():
    model, (x, _) = net().eval(), data()
    expected = model(x)
    masks = spatial.sparse_inputs(model, LAYERS, share=0.1)
    assert not torch.allclose(model(x), expected)
    masks.remove()
    assert torch.equal(model(x), expected)


RECIPE = """modifiers:
  - sparse_activations:
      layers: ["3", "5"]
      share: {from: 1.0, to: 0.25, curve: linear}
      window: {to: 5ep}
"""


def train(epochs, model, optimizer, session):
    x, y = data()
    losses = []
    for _ in range(epochs):
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_a_recipe_makes_activations_sparse_while_training():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with prunus.attach(model, optimizer, RECIPE, steps_per_epoch=4, epochs=10) as session:
        (run,) = session.runs
        assert run.masks.choice.share == 1.0
        losses = train(10, model, optimizer, session)
        assert run.masks.choice.share == pytest.approx(1 - 0.75 * 10 / 20)
        losses += train(30, model, optimizer, session)
    assert run.masks.choice.share == 0.25
    assert losses[-1] < losses[0]
    x, _ = data(1)
    model.eval()
    expected = model(x)
    spatial.run_sparse(model, run.masks)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: spatial.sparse_inputs(m, ["9"], share=0.5), "'9' is Linear; sparse inputs are"),
        (lambda m: spatial.sparse_inputs(m, ["x"], share=0.5), "'x' is nothing"),
        (lambda m: spatial.sparse_inputs(m, ["3"]), "give either share= or threshold="),
        (lambda m: spatial.sparse_inputs(m, ["3"], share=0.0), "share=0.0; use more than 0"),
        (
            lambda m: spatial.sparse_inputs(m, ["3"], threshold=-1.0),
            "threshold=-1.0; use 0 or more",
        ),
        (
            lambda _: spatial.sparse_inputs(
                nn.Sequential(nn.Conv2d(2, 2, 3, stride=2)), ["0"], share=0.5
            ),
            "no centred convolution of stride 1",
        ),
    ],
)
def test_what_cannot_run_as_a_submanifold_convolution_is_refused(call, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        call(model)
    assert not any(m._forward_pre_hooks for m in model)
