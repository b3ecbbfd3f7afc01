"""What a forward pass shows of a network's ends, in networks small enough to see it."""

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus
from prunus.core.default_dense_layers import READS, ROUTES, WRITES, dense_line, left_dense
from prunus.core.layers import all_layers
from prunus.report.summary import Summary

from tests.oracles.pruning import small_mlp


def spared(model, *inputs):
    """By one forward pass, and by structure; as names of each reason."""
    layers, found = list(all_layers(model)), []
    for run in (lambda: model(*inputs), None) if inputs else (None,):
        reasons = left_dense(model, layers, run)
        found.append({why: [n for n in reasons if reasons[n] == why] for why in reasons.values()})
    return found


class Net(nn.Module):
    """Modules by name, and a forward of them."""

    def __init__(self, compute, **modules):
        super().__init__()
        self.compute = compute
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs):
        return self.compute(self, *inputs)


def mlp(*widths):
    linears = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(m for linear in linears for m in (linear, nn.ReLU())))[:-1]


def test_an_actor_and_its_critic_are_two_heads():
    def shared(net, x):
        h = net.trunk(x).tanh()
        return net.policy(h), net.value(h)

    parts = {"trunk": mlp(8, 32, 32), "policy": nn.Linear(32, 4), "value": nn.Linear(32, 1)}
    expected = {WRITES: ["policy", "value"]}
    assert spared(Net(shared, **parts), torch.randn(2, 8)) == [expected, expected]
    apart = Net(lambda n, x: (n.actor(x), n.critic(x)), actor=mlp(8, 32, 4), critic=mlp(8, 32, 1))
    expected = {WRITES: ["actor.2", "critic.2"]}
    assert spared(apart, torch.randn(2, 8)) == [expected, expected]


def test_the_first_layer_of_an_mlp_is_no_stem_and_that_of_patches_is():
    flat = nn.Sequential(nn.Flatten(), *mlp(192, 32, 4))
    assert spared(flat, torch.randn(2, 3, 8, 8)) == [{WRITES: ["3"]}] * 2

    def patches(net, x):
        x = F.unfold(x, 4, stride=4).mT
        return net.out(net.patch_embed(x).relu().mean(1))

    net = Net(patches, patch_embed=nn.Linear(48, 16), out=nn.Linear(16, 4))
    expected = {READS: ["patch_embed"], WRITES: ["out"]}
    assert spared(net, torch.randn(2, 3, 8, 8)) == [expected, expected]


def test_convolutions_that_read_pixels_are_stems_wherever_they_stand():
    def branches(net, x):
        return net.out((net.wide(x) + net.narrow(x)).relu().mean((2, 3)))

    parts = {"wide": nn.Conv2d(3, 8, 3, padding=1), "narrow": nn.Conv2d(3, 8, 1)}
    net = Net(branches, **parts, out=nn.Linear(8, 4))
    expected = {READS: ["wide", "narrow"], WRITES: ["out"]}
    assert spared(net, torch.randn(2, 3, 8, 8)) == [expected, expected]

    def after_text(net, ids, x):
        return net.out(net.text(net.words(ids)).mean(1) + net.pixels(x).mean((2, 3)))

    parts = {"words": nn.Embedding(9, 8), "text": nn.Linear(8, 8), "pixels": nn.Conv2d(3, 8, 3)}
    net = Net(after_text, **parts, out=nn.Linear(8, 4))
    expected = {READS: ["pixels"], WRITES: ["out"]}
    batch = torch.tensor([[1, 2], [3, 4]]), torch.randn(2, 3, 8, 8)
    assert spared(net, *batch) == [expected, expected]


def test_a_convolution_after_an_embedding_is_no_stem():
    def mixer(net, ids):
        return net.out(net.conv(net.words(ids).mT).mT)

    parts = {"words": nn.Embedding(9, 8), "conv": nn.Conv1d(8, 8, 3, padding=1, groups=8)}
    net = Net(mixer, **parts, out=nn.Linear(8, 9))
    assert spared(net, torch.tensor([[1, 2, 3]])) == [{WRITES: ["out"]}] * 2


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 16),
            nn.Linear(16, width),
        )

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def backbone(net, x):
    x = net.embed(x)
    for block in net.blocks:
        x = block(x)
    return net.norm(x)


def test_a_backbone_that_returns_its_stream_has_no_head():
    parts = {"embed": nn.Linear(4, 8), "blocks": nn.ModuleList([Block(8), Block(8)])}
    net = Net(backbone, **parts, norm=nn.LayerNorm(8))
    assert spared(net, torch.randn(2, 4)) == [{}, {}]


def test_heads_after_blocks_are_each_the_last_of_their_part():
    def heads(net, x):
        x = backbone(net, x)
        return {"logits": net.classes(x), "boxes": net.boxes(x).sigmoid(), "hidden_states": (x,)}

    parts = {"embed": nn.Linear(4, 8), "blocks": nn.ModuleList([Block(8), Block(8)])}
    parts |= {"norm": nn.LayerNorm(8), "classes": nn.Linear(8, 5), "boxes": mlp(8, 16, 4)}
    expected = {WRITES: ["classes", "boxes.2"]}
    assert spared(Net(heads, **parts), torch.randn(2, 4)) == [expected, expected]


def test_what_is_added_to_the_input_itself_is_a_head():
    denoiser = Net(
        lambda net, x: x - net.body(x),
        body=nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)),
    )
    expected = {READS: ["body.0"], WRITES: ["body.2"]}
    assert spared(denoiser, torch.randn(1, 3, 8, 8)) == [expected, expected]


def test_where_the_output_is_a_stream_the_structure_says_whether_there_is_a_head():
    def spectrum(net, x):
        coarse = net.coarse(x)
        return coarse + net.postnet(coarse)

    net = Net(spectrum, coarse=nn.Linear(8, 16), postnet=mlp(16, 32, 16))
    assert spared(net, torch.randn(2, 8)) == [{WRITES: ["postnet.2"]}] * 2


def test_boxes_refined_step_by_step_have_a_head_in_each_step():
    def refined(net, x):
        reference, boxes = net.start(x).detach(), []
        for head in net.heads:
            x = x + net.mix(reference)
            box = head(x) + reference
            reference = box.detach()
            boxes.append(box)
        return torch.stack(boxes)

    parts = {"start": nn.Linear(8, 4), "mix": nn.Linear(4, 8)}
    net = Net(refined, **parts, heads=nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)]))
    traced, _ = spared(net, torch.randn(2, 8))
    assert traced == {WRITES: ["heads.0", "heads.1"]}


def routed(net, x):
    gates, chosen = net.small(x).softmax(-1).topk(2, -1)
    out = torch.zeros_like(x)
    for i, part in enumerate(net.parts):
        here = (chosen == i).any(-1)
        out[here] = out[here] + part(x[here]) * gates[here, :1]
    return net.out(x + out)


@pytest.mark.parametrize("name", ["parts", "experts"])
def test_a_router_is_known_by_its_ranking_or_by_standing_beside_experts(name):
    listed = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
    net = Net(routed, small=nn.Linear(8, 4), out=nn.Linear(8, 3), **{name: listed})
    if name == "experts":
        net.parts = listed
    traced, structure = spared(net, torch.randn(6, 8))
    assert traced == {ROUTES: ["small"], WRITES: ["out"]}
    assert structure.get(ROUTES, []) == (["small"] if name == "experts" else [])


def test_shared_experts_have_gates_of_one_output_and_are_pruned_themselves():
    parts = {"experts": nn.ModuleList([mlp(8, 16, 8) for _ in range(4)]), "gate": nn.Linear(8, 4)}
    parts |= {"shared_experts": mlp(8, 4, 8), "shared_gate": nn.Linear(8, 1), "up": mlp(8, 4, 8)}
    net = nn.ModuleDict({"moe": nn.ModuleDict(parts), "out": nn.Linear(8, 3)})
    assert spared(net) == [{ROUTES: ["moe.gate", "moe.shared_gate"], WRITES: ["out"]}]


def test_weights_that_are_read_without_their_modules_are_followed_too():
    def functional(net, x):
        return F.linear(F.linear(x, net.first.weight).relu(), net.last.weight[:3])

    net = Net(functional, first=nn.Linear(8, 8), last=nn.Linear(8, 4), idle=nn.Linear(4, 4))
    traced, structure = spared(net, torch.randn(2, 8))
    assert traced == {WRITES: ["last", "idle"]}  # what is never run is left as its place says
    assert structure == {WRITES: ["idle"]}


def test_where_no_forward_pass_succeeds_the_structure_says_and_the_log_tells(caplog):
    caplog.set_level(logging.INFO, logger="prunus")
    model = small_mlp()
    layers = list(all_layers(model))
    by_structure = left_dense(model, layers)
    assert left_dense(model, layers, lambda: model(torch.randn(2, 3))) == by_structure
    assert "no forward pass shows the ends of the model" in caplog.text
    assert left_dense(model, layers, lambda: None) == by_structure


def test_watching_leaves_no_trace_in_the_model():
    model = small_mlp().train()
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    data = prunus.Calibration([torch.randn(2, 8)])
    rng = torch.get_rng_state()
    prunus.sweep(model, "magnitude", [0.5], lambda m: 0.0, calibration=data)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def two_heads():
    def run(net, x):
        return net.second(net.body(x)), net.first(net.body(x))

    return Net(run, first=nn.Linear(8, 4), body=mlp(8, 16, 8), second=nn.Linear(8, 2))


def test_results_logs_and_sessions_say_what_is_dense_and_why(caplog):
    caplog.set_level(logging.INFO, logger="prunus")
    data = prunus.Calibration([torch.randn(4, 8)])
    result = prunus.prune(two_heads(), "magnitude", sparsity=0.5, calibration=data)
    assert result.spared == {"first": WRITES, "second": WRITES}
    assert result.left_dense == ["first", "second"]
    assert "left dense: first, second (writes the output)" in " ".join(str(result).split())
    assert "left dense: first, second (writes the output)" in caplog.text
    assert result.recorder.events[0]["left_dense"] == result.spared
    assert Summary(result.recorder.events).left_dense == dense_line(result.spared)
    model = two_heads()
    recipe = "modifiers: [{prune: {sparsity: 0.5}}]"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with prunus.attach(model, optimizer, recipe, calibration=data) as session:
        assert session.runs[0].spared == {"first": WRITES, "second": WRITES}
    assert prunus.sparsity(model)["first"] == 0


def test_a_line_of_many_dense_layers_is_short():
    line = dense_line({f"blocks.{i}": ROUTES for i in range(20)} | {"head": WRITES})
    assert line.endswith("blocks.7 and 12 more (routes to experts); head (writes the output)")
