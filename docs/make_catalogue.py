"""Write recipe-catalogue.md: the tables from the files in recipes/, their frame from here.

The first line of a recipe's comment says what it is for.
"""

from __future__ import annotations

from pathlib import Path

import prunus
from prunus.modifiers import (
    Keep,
    LearningRate,
    NMTraining,
    PruningModifier,
    SemiSparseTraining,
)

DOCS = Path(__file__).parent
RECIPES = DOCS.parent / "recipes"
KINDS = (
    "one-shot",
    "one-shot + fine-tune",
    "gradual",
    "fine-tune only",
    "N:M training",
    "accelerated",
)
INTRO = """\
# Recipe catalogue

The files in [`recipes/`](../recipes), by family, for models whose layers are named as in timm
(from ViT to EfficientNet) or in transformers (from Llama on). Stem or embeddings and output head
stay dense. Windows and cycles are shares of training, so a recipe works for any number of epochs;
where one is given, the learning rate was chosen for it. Most have variables, `sparsity` or `lr`:
`Recipe.load(path, sparsity=0.8)`.

Every one-shot or gradual method but `magnitude` needs calibration data (`prunus.Calibration`).
`num_grads: 4096` asks for as many batches; fewer work, with a rougher Fisher matrix. OBS and CAP
take about 5 bytes x pruned weights x `block_size` of memory (ViT-B: 82 GB; `prunus check` tells);
what does not fit is measured in several passes. Their `damp` is absolute, so calibration batches
of another size may need another one.

Recipes with `sequential: true` go block by block, each block on the outputs of the pruned ones
before it, and measure inputs only: no labels and no gradients. For language models 128 windows of
text are common, as `{"input_ids": ..., "attention_mask": ...}`; the mask keeps padding out of the
statistics. Those with `permute` regroup input channels, which a finished model takes but training
does not.

Those called `nm-` [train N:M weights](nm-training.md) from the first step on, in the feed-forward
layers (`-ff`) or in q, k and v as well (`-ff-qkv`). `pattern` and `qkv_pattern` are variables
(`1:4` to `1:32`, `2:4`), and so are `dense` and `frozen`, where the window begins and ends:
`Recipe.load(path, pattern="1:16", frozen="85%")`.

Fine-tune only recipes prune nothing: the zeros that the loaded weights have stay, and the others
train.

This page is made from the files by `docs/make_catalogue.py`.
"""
FAMILIES = {
    "vit": ("ViT and DeiT", "`attn.qkv`, `attn.proj` and `mlp.fc*` of all blocks."),
    "swin": ("Swin", "`attn.qkv`, `attn.proj`, `mlp.fc*` and `downsample.reduction`."),
    "convnext": ("ConvNeXt", "`mlp.fc*` and `downsample`; depthwise convolutions stay dense."),
    "resnet": ("ResNet", "`conv*` and `downsample` of all layers; the stem stays dense."),
    "efficientnet": (
        "EfficientNet",
        "`blocks` and `conv_head`; depthwise convolutions stay dense. Also fits EfficientNetV2 and "
        "MobileNetV3.",
    ),
    "llama": ("Llama, Mistral and Gemma", "all `*_proj` of `self_attn` and `mlp`."),
    "qwen": ("Qwen", "all `*_proj` of `self_attn` and `mlp`, in Qwen2 and Qwen3."),
    "opt": ("OPT", "all `*_proj` of `self_attn`, `fc1` and `fc2`."),
    "gpt2": (
        "GPT-2",
        "`c_attn`, `c_fc` and both `c_proj` of all blocks; groups run along the inputs, the first "
        "dimension.",
    ),
    "bert": (
        "BERT",
        "`query`, `key`, `value` and every `dense` of the encoder's layers. Also fits RoBERTa and "
        "ELECTRA.",
    ),
}
"""folder: its heading, and which layers are pruned"""


def kind_of(recipe: prunus.Recipe) -> str:
    """One of `KINDS`."""
    pruning = [m for m in recipe.modifiers if isinstance(m, PruningModifier)]
    if any(isinstance(m, SemiSparseTraining) for m in recipe.modifiers):
        return "accelerated"
    if any(isinstance(m, NMTraining) for m in recipe.modifiers):
        return "N:M training"
    if not pruning:
        return "fine-tune only"
    if any(not m.at_once for m in pruning):
        return "gradual"
    trained = any(isinstance(m, LearningRate) for m in recipe.modifiers)
    return "one-shot + fine-tune" if trained else "one-shot"


def method_of(modifier: PruningModifier | NMTraining) -> str:
    """The pruner, or the masking that trains N:M weights."""
    how = modifier.masking if isinstance(modifier, NMTraining) else modifier.pruner
    return how.name


def target_of(modifier: PruningModifier | NMTraining) -> str:
    final = modifier.final_sparsity
    return modifier.pattern if final is None else f"{final:g}"


def row(path: Path) -> tuple[str, str, str, str, str]:
    """Link, method, kind, target and purpose of one recipe."""
    recipe = prunus.Recipe.load(path)
    pruning = [m for m in recipe.modifiers if isinstance(m, PruningModifier | NMTraining)]
    methods = " + ".join(dict.fromkeys(map(method_of, pruning)))
    targets = " + ".join(dict.fromkeys(map(target_of, pruning)))
    if not pruning and any(isinstance(m, Keep) for m in recipe.modifiers):
        methods, targets = Keep.name, "as loaded"
    purpose = path.read_text().splitlines()[0].removeprefix("# ").removesuffix(".")
    purpose = purpose if purpose[:2].isupper() else purpose[0].lower() + purpose[1:]
    link = f"[{path.stem}](../{path.relative_to(RECIPES.parent).as_posix()})"
    return link, methods, kind_of(recipe), targets, purpose


def family(folder: str) -> list[str]:
    """A heading, what is pruned, and the table."""
    title, pruned = FAMILIES[folder]
    rows = [row(path) for path in sorted((RECIPES / folder).glob("*.yaml"))]
    rows.sort(key=lambda cells: KINDS.index(cells[2]))
    return [
        f"## {title}",
        "",
        f"Pruned: {pruned}",
        "",
        "| recipe | method | kind | target | what for |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(cells)} |" for cells in rows),
        "",
    ]


def page() -> str:
    """Raises ValueError for a folder of recipes that has no heading here."""
    folders = {path.parent.name for path in RECIPES.rglob("*.yaml")}
    if unknown := folders - set(FAMILIES):
        raise ValueError(f"recipes/{min(unknown)} is not in FAMILIES; give it a heading there")
    lines = [line for folder in FAMILIES for line in family(folder)]
    return INTRO + "\n" + "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    (DOCS / "recipe-catalogue.md").write_text(page())
