"""Muon: whole matrices are turned into directions of equal lengths; all else is AdamW's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from flagai_altdiff.errors import ConfigError
from flagai_altdiff.training.config import parse_config
from flagai_altdiff.training.muon import Muon, matrices_of, orthogonal


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_directions_have_equal_lengths(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrix)
    lengths = torch.linalg.svdvals(found)
    assert found.shape == matrix.shape and lengths.min() > 0.5 and lengths.max() < 1.4
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), matrix.flatten(), dim=0)
    assert cosine > 0.5


def test_embeddings_norms_and_thin_weights_are_no_matrices() -> None:
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(20, 16),
            "map": nn.Linear(16, 16),
            "conv": nn.Conv2d(8, 16, 3),
            "norm": nn.LayerNorm(16),
            "thin": nn.Linear(16, 3),
        }
    )
    assert matrices_of(model) == {"map.weight", "conv.weight"}


def test_adamw_for_the_others_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(5)), None
    theirs = nn.Parameter(ours.detach().clone())
    own = Muon([], [ours], 1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    other = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        for parameter in (ours, theirs):
            parameter.grad = torch.sin(torch.arange(5.0) + step)
        own.step()
        other.step()
    torch.testing.assert_close(ours, theirs)


def stepped() -> list[Tensor]:
    """The weights of a small network after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 9), nn.Conv2d(8, 10, 3))
    named = dict(model.named_parameters())
    matrices = matrices_of(model)
    learns, others = ([p for name, p in named.items() if (name in matrices) is wanted] for wanted in (True, False))
    optimizer = Muon(learns, others, 1e-2)
    for step in range(3):
        for parameter in named.values():
            parameter.grad = torch.sin(torch.arange(float(parameter.numel())) + step).view(parameter.shape)
        optimizer.step()
    return [parameter.detach() for parameter in named.values()]


def member(rank: int, folder: str) -> None:
    """One of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(stepped(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_work_and_have_the_same_weights(tmp_path: Path) -> None:
    spawn(member, (str(tmp_path),), nprocs=2)
    alone = stepped()
    for rank in range(2):
        assert all(torch.equal(a, b) for a, b in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True))


def test_it_is_not_for_pieces() -> None:
    data = {"stages": [{"stage": "quality", "optimizer": "muon"}], "machine": {"strategy": "fsdp"}}
    with pytest.raises(ConfigError, match="muon needs whole matrices"):
        parse_config(data)
    parse_config({**data, "machine": {"strategy": "ddp"}})
