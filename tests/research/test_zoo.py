"""The zoo, three of its architectures, and its table."""

import pytest

from research.zoo.all import ARCHITECTURES
from research.zoo.pool import results
from research.zoo.table import BEGIN, END, page, shortened
from research.zoo.trial import METHODS, trial

# transformers' progress bars
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def rows():
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    names = "bert-answers", "llama4", "timm vit"
    return [row for name in names for row in trial(name, ARCHITECTURES[name])]


def test_every_method_prunes_as_asked_or_says_why_not(rows):
    assert [row["method"] for row in rows] == list(METHODS) * 3
    assert not [row for row in rows if "fault" in row]
    for row in rows:
        assert row.get("refused") or 0 < row["share"] < 0.55
    assert all("share" in row for row in rows if row["name"] == "timm vit")
    text = page(f"before {BEGIN} old {END} after", rows)
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert "old" not in text
    assert "| timm vit | reads `patch_embed.proj`; writes `head` |" in text
    assert "3 architectures; of 18 trials" in text
    assert page(text, rows) == text


def test_there_are_a_hundred_architectures_and_more():
    assert len(ARCHITECTURES) >= 100


def test_what_hangs_is_a_fault_and_the_others_go_on():
    found = list(results(["llama", "t5"], 2, 0.05))
    assert sorted(row["fault"] for (row,) in found) == ["not done after 0.05 s"] * 2


def test_the_same_reason_reads_the_same_in_every_model():
    for name in ("blocks.0.conv_dw", "a.b.c[3]", "fc"):
        message = f"{name}: pattern 2:4 does not divide 3 input channels; exclude it; nor x.y"
        assert shortened(message) == "*layer*: pattern 2:4 does not divide the input channels"
        message = f"sequential: {name}, x is in no block of 'a.b'; exclude it"
        assert shortened(message) == "sequential: *layer* is in no block of the list"
        message = f"no calibration batch reached a.b, {name}; nothing was pruned: exclude"
        assert shortened(message) == "no calibration batch reached *layer*; nothing was pruned"
