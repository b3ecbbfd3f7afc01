"""A small Llama, trained in about two minutes on the text that comes with Python.

For trying out language-model pruning where there is no network: help topics and sources of the
standard library are the text, the tokenizer is made from it, and the folder holds what
`AutoModelForCausalLM` and `AutoTokenizer` read. The rest serves other models and texts as well.

Needs the extra `llm`; data sets of the Hub need `datasets` besides.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from prunus.core.progress import track

EOS = "<|endoftext|>"
TESTS = {"test", "tests", "idle_test"}
TABLES = {"encodings", "pydoc_data"}  # numbers, and the topics once more
FOREIGN = {"site-packages", "dist-packages"} | TESTS | TABLES
KEY, HELD_OUT = "training.json", "held-out.txt"


@dataclass(frozen=True)
class Settings:
    """All that a trained model depends on, besides the version of Python."""

    # width and batches are small because, in so short a time, more tokens do more than more weights
    steps: int = 1500
    seed: int = 0
    batch_size: int = 8
    seqlen: int = 128
    lr: float = 8e-3
    limit_bytes: int = 4 << 20
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 352
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2


@lru_cache(maxsize=1)
def python_text(limit_bytes: int = Settings.limit_bytes) -> str:
    """At most `limit_bytes` of English and of programs, the same each time.

    The help topics and the standard modules, in the order of a hash of their names, which mixes
    the two kinds and the packages. The first 4 MiB are a third of all.
    """
    root, names, raw = Path(os.__file__).parent, list(topics), bytearray()
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - FOREIGN  # it goes into no others
        inside = Path(folder).relative_to(root)
        names += [(inside / file).as_posix() for file in files if file.endswith(".py")]
    for name in sorted(names, key=lambda name: sha256(name.encode()).digest()):
        raw += topics[name].encode() if name in topics else (root / name).read_bytes()
        raw += b"\n\n"
        if len(raw) >= limit_bytes:
            break
    return raw[:limit_bytes].decode(errors="ignore").replace("\r\n", "\n")


def split_text(text: str, split: str) -> str:
    """The first 95% of a text as "train", the rest as "test"; ValueError for other splits."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}; use 'train' or 'test'")
    cut = len(text) * 95 // 100
    return text[:cut] if split == "train" else text[cut:]


def load_text(name: str, split: str = "test") -> str:
    """A text by name: a path, "python" (the built-in one), or a data set of the Hub.

    A file is read whole, whatever the split. A data set is named with its configuration, as in
    ``wikitext/wikitext-2-raw-v1`` or ``roneneldan/TinyStories/default``, and its rows are joined
    by empty lines. Raises ValueError where there is no such file or the data set is out of reach.
    """
    if name == "python":
        return split_text(python_text(), split)
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    remedy = "check the name, or pass a text file, 'python' or DATASET/CONFIG"
    dataset, _, config = name.rpartition("/")
    if not dataset:
        raise ValueError(f"name={name!r} is no file and names no configuration; {remedy}")
    try:
        from datasets import load_dataset

        rows = load_dataset(dataset, config, split=split)
    except ImportError as error:
        raise ValueError(f"name={name!r} is no file; {remedy} (pip install datasets)") from error
    except OSError as error:
        raise ValueError(f"name={name!r} cannot be fetched ({error}); {remedy}") from error
    return "\n\n".join(rows["text"])


def train_tokenizer(text: str, vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE made from a text; it encodes any text, and adds no special tokens.

    Raises ValueError unless `vocab_size` leaves room for all bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}; use at least 257, for all bytes and {EOS}")
    bpe, lines = ByteLevelBPETokenizer(), text.splitlines(keepends=True)
    bpe.train_from_iterator(lines, vocab_size, show_progress=False, special_tokens=[EOS])
    plain = Tokenizer.from_str(bpe.to_str())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=EOS)


def encode(tokenizer: Any, text: str, seqlen: int) -> Tensor:
    """(tokens,) int64; raises ValueError where they are fewer than `seqlen`."""
    # not verbose, or it warns of texts longer than a context
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < seqlen:
        raise ValueError(f"seqlen={seqlen}, but text has {len(ids)} tokens; pass a longer text")
    return ids


def random_windows(ids: Tensor, count: int, seqlen: int, generator: torch.Generator) -> Tensor:
    """(count, seqlen) windows that begin anywhere. ``ids`` is (tokens,)."""
    begins = torch.randint(len(ids) - seqlen + 1, (count, 1), generator=generator)
    return ids[begins + torch.arange(seqlen)]


def batches(
    tokenizer: Any, text: str, nsamples: int, seqlen: int, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Random windows of a text for `prunus.Calibration`, each as ``input_ids`` of (1, seqlen).

    Raises ValueError where the text has fewer than `seqlen` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    windows = random_windows(encode(tokenizer, text, seqlen), nsamples, seqlen, generator)
    return [{"input_ids": window} for window in windows.split(1)]


def token_losses(model: nn.Module, batch: Tensor) -> Tensor:
    """(windows, seqlen - 1) nats of each token but the first. ``batch`` is (windows, seqlen)."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.mT, batch[:, 1:], reduction="none")


@torch.no_grad()
def perplexity(
    model: nn.Module, tokenizer: Any, text: str, seqlen: int, batch_size: int = 8
) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, with the model in eval mode.

    Over consecutive windows of `seqlen` tokens that know nothing of each other: the first token of
    each is not counted, nor are those after the last whole window. Runs where the model is, and
    leaves it in eval mode. Raises ValueError where the text fills no window of two or more.
    """
    if seqlen < 2:
        raise ValueError(f"seqlen={seqlen} leaves no token to predict; use at least 2")
    ids = encode(tokenizer, text, seqlen)
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    device, total = next(model.eval().parameters()).device, torch.zeros((), dtype=torch.float64)
    for batch in track(windows.split(batch_size), "perplexity"):
        total += token_losses(model, batch.to(device)).sum().cpu()
    return float((total / windows[:, 1:].numel()).exp())


def fit(model: nn.Module, ids: Tensor, s: Settings) -> None:
    """AdamW on random windows; a tenth of the steps warms up, the others follow a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), s.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, s.lr, total_steps=s.steps + 1, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(s.seed)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=s.steps)
        for _ in range(s.steps):
            batch = random_windows(ids, s.batch_size, s.seqlen, generator)
            loss = token_losses(model, batch).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(task, advance=1, description=f"training, loss {loss.item():.2f}")


def build(s: Settings) -> transformers.LlamaForCausalLM:
    """A model whose random weights depend on the seed alone."""
    config = transformers.LlamaConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.hidden_size,
        intermediate_size=s.intermediate_size,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.key_value_heads,
        max_position_embeddings=s.seqlen,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        return transformers.LlamaForCausalLM(config)


def train(folder: str | Path, **settings: Any) -> tuple[Any, Any]:
    """The model and tokenizer of a folder, trained first unless it has them already.

    ``settings`` are fields of `Settings`; the same ones give the same weights with the same
    Python. The 5% of the text that were held out are in the folder too, in `HELD_OUT`. Raises
    ValueError where the folder has something else.
    """
    s, folder = Settings(**settings), Path(folder)
    key = json.dumps({"python": platform.python_version(), **asdict(s)}, indent=2)
    if (folder / KEY).is_file() and (folder / KEY).read_text() == key:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return model, transformers.AutoTokenizer.from_pretrained(folder)
    if folder.exists() and any(folder.iterdir()):
        remedy = f"with these settings and this Python (see {KEY}); use another, or delete it"
        raise ValueError(f"folder={str(folder)!r} is not empty and was not trained {remedy}")
    seen, held_out = (split_text(python_text(s.limit_bytes), x) for x in ("train", "test"))
    model, tokenizer = build(s), train_tokenizer(seen, s.vocab_size)
    fit(model, encode(tokenizer, seen, s.seqlen), s)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / HELD_OUT).write_text(held_out, encoding="utf-8")
    (folder / KEY).write_text(key)  # last, so that a folder that has it is whole
    return model.eval(), tokenizer
