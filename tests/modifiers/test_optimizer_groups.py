"""Settings of parameter groups, those that are added later too."""

import torch
from torch import nn

import prunus


def test_a_group_that_is_added_later_follows_the_schedule_and_one_without_decay_is_spared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0, weight_decay=0.5)
    recipe = "modifiers: [learning_rate: {to: 0.25}, weight_decay: {to: 0.125}]"
    with prunus.attach(model, optimizer, recipe):
        optimizer.step()
        optimizer.add_param_group({"params": model[1].parameters(), "lr": 2.0})
        optimizer.add_param_group({"params": model[2].parameters(), "weight_decay": 0.0})
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * 3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.125, 0.125, 0.0]


def test_groups_that_are_named_stay_those():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0)
    with prunus.attach(model, optimizer, "modifiers: [learning_rate: {to: 0.25, groups: [0]}]"):
        optimizer.add_param_group({"params": model[1].parameters(), "lr": 2.0})
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 2.0]
