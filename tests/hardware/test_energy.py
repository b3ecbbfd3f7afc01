"""Energy at published constants adds up to published sums."""

import pytest
import torch

from prunus import hardware
from prunus.hardware.energy import ElementPower, EventEnergy, eie_energy
from prunus.hardware.published import LAYERS


def test_the_parts_of_an_element_add_up_to_the_published_power():
    assert ElementPower().total == pytest.approx(9.157, abs=0.01)


def test_frames_per_joule_of_alex_7_are_those_of_table_5():
    cycles = round(12.2e-6 * 800e6)
    execution = hardware.Execution(hardware.Machine(), cycles, 0, 0, 0, 0)
    assert round(1 / execution.seconds) == 81_967
    assert round(1 / eie_energy(execution)) == 138_927


def test_power_times_time_is_the_energy_of_a_run():
    execution = hardware.run(hardware.Machine(), *LAYERS[1].random())
    assert eie_energy(execution) == pytest.approx(0.59 * execution.seconds)


def test_events_of_the_reference_take_its_energy_and_a_sparser_layer_takes_less():
    reference = hardware.run(hardware.Machine(), *LAYERS[1].random())
    events = EventEnergy.calibrated(reference)
    assert events.joules(reference) == pytest.approx(eie_energy(reference))
    sparser = hardware.run(hardware.Machine(), *LAYERS[4].random())
    assert events.joules(sparser) < events.joules(reference)


def test_a_layers_energy_is_arithmetic_and_one_read_of_its_weights():
    energy = hardware.layer_energy(1000, 3200, torch.float32)
    assert energy == pytest.approx(1000 * 4.6 + 100 * 640)
    assert hardware.layer_energy(1000, 0, torch.int8) == pytest.approx(230)
    assert hardware.layer_energy(1000, 0, torch.bfloat16) == pytest.approx(1500)
