"""The same training in three people's trainers, on however many processes, and in a plain loop.

    python -m torch.distributed.run --standalone --nproc-per-node 2 \
        tests/distributed/trainer_workers.py DIRECTORY accelerate lightning

The trainers take turns in the same processes, because starting these is most of the work. Rank r
writes masks, weights and records to ``DIRECTORY/TRAINER/rank{r}.pt``. Each rank trains on its part
of every global batch and calibrates on batches of its own.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

import prunus
from prunus.core.wrappers import clean_parameters

EPOCHS, STEPS, BATCH, CALIBRATION = 2, 4, 8, 8
RECIPE = """
modifiers:
  - prune:
      pruner: {name: obs, block_size: 4, num_grads: 8, damp: 1e-3}
      layers: ["net.0", "net.2"]
      sparsity: {from: 0.2, to: 0.6, curve: cubic}
      window: {from: 0ep, to: 75%, every: 2step}
  - prune:
      pruner: wanda
      layers: ["net.4"]
      sparsity: {from: 0.2, to: 0.5, curve: cubic}
      window: {from: 1step, to: 75%, every: 2step}
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        parts = nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
        self.net = nn.Sequential(*parts).double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.net(x)
        return {"loss": nn.functional.mse_loss(out, y), "logits": out}


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 8, generator=generator, dtype=torch.float64)
        self.y = torch.randn(count, 2, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[i], "y": self.y[i]}


DATA = Rows(STEPS * BATCH, 2)


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch)["loss"]


def calibration(rank: int, world_size: int) -> prunus.Calibration:
    """Every `world_size`-th batch; all of them for one process."""
    rows = Rows(CALIBRATION * 4, 3)
    whole = list(DataLoader(rows, batch_size=4))
    return prunus.Calibration(whole[rank::world_size], forward=loss_of)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-2)


def by_loop(directory: Path, rank: int, world_size: int) -> prunus.Session:
    """One process that sees all the data; no trainer."""
    model = Net()
    optimizer = optimizer_of(model)
    data = calibration(rank, world_size)
    with prunus.attach(
        model, optimizer, RECIPE, steps_per_epoch=STEPS, epochs=EPOCHS, calibration=data
    ) as session:
        for _ in range(EPOCHS):
            for batch in DataLoader(DATA, batch_size=BATCH):
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    return session


def by_accelerate(directory: Path, rank: int, world_size: int) -> prunus.Session:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world_size
    model = Net()
    loader = DataLoader(DATA, batch_size=BATCH // world_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    with prunus.attach(
        model,
        optimizer,
        RECIPE,
        steps_per_epoch=len(loader),
        epochs=EPOCHS,
        calibration=calibration(rank, world_size),
        output_dir=directory / "records",
    ) as session:
        for _ in range(EPOCHS):
            for batch in loader:
                accelerator.backward(loss_of(model, batch))
                optimizer.step()
                optimizer.zero_grad()
    return session


def by_lightning(directory: Path, rank: int, world_size: int) -> prunus.Session:
    import lightning.pytorch as pl

    from prunus.integrations.lightning import PrunusCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return Net.forward(self, x, y)

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            return loss_of(self, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    callback = PrunusCallback(
        RECIPE, calibration=calibration(rank, world_size), output_dir=directory / "records"
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp",
        use_distributed_sampler=False,
        max_epochs=EPOCHS,
        default_root_dir=directory,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sampler = DistributedSampler(DATA, world_size, rank, shuffle=False)
    trainer.fit(Module(), DataLoader(DATA, batch_size=BATCH // world_size, sampler=sampler))
    assert trainer.world_size == world_size
    assert callback.session is not None
    return callback.session


def by_transformers(directory: Path, rank: int, world_size: int) -> prunus.Session:
    from transformers import Trainer, TrainingArguments

    from prunus.integrations.transformers import PrunusCallback

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(DATA)

    args = TrainingArguments(
        str(directory / "trainer"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH // world_size,
        max_grad_norm=0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    callback = PrunusCallback(
        RECIPE, calibration=calibration(rank, world_size), output_dir=directory / "records"
    )
    model = Net()
    optimizer = optimizer_of(model)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    InOrder(
        model, args, train_dataset=DATA, callbacks=[callback], optimizers=(optimizer, constant)
    ).train()
    assert args.world_size == world_size
    assert callback.session is not None
    return callback.session


TRAINERS = {
    "accelerate": by_accelerate,
    "lightning": by_lightning,
    "transformers": by_transformers,
}


def outcome(session: prunus.Session) -> dict[str, Any]:
    weights = clean_parameters(session.model)
    return {
        "masks": dict(session.masks),
        "weights": {name: p.detach() for name, p in weights.items()},
        "events": [e for e in session.recorder.events if e["event"] == "prune"],
    }


def main() -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for trainer in sys.argv[2:]:
        directory = Path(sys.argv[1]) / trainer
        directory.mkdir(parents=True, exist_ok=True)
        answer = outcome(TRAINERS[trainer](directory, rank, world_size))
        torch.save(answer, directory / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
