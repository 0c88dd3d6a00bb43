"""The text encoder against transformers' XLM-RoBERTa with the same weights, and the trick with the padding rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import XLMRobertaConfig, XLMRobertaModel

from flagai_altdiff.models import LatentDiffusion
from tests import tiny

PREFIX = "cond_stage_model."


@pytest.fixture
def reference(variant: str) -> XLMRobertaModel:
    """transformers' model with the weights of the tiny checkpoint."""
    config = tiny.tiny_config(tiny.VARIANTS[variant]).cond_stage
    model = XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            layer_norm_eps=config.layer_norm_eps,
            type_vocab_size=1,
            pad_token_id=1,
        ),
        add_pooling_layer=False,
    )
    root = f"{PREFIX}roberta."
    state = {k.removeprefix(root): v for k, v in tiny.tiny_state(variant).items() if k.startswith(root)}
    wanted = set(model.state_dict())
    model.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=True)
    return model.eval()


def read_out(variant: str, reference: XLMRobertaModel, ids: Tensor, mask: Tensor) -> Tensor:
    """What each family makes of the hidden states."""
    state = {k.removeprefix(PREFIX): v for k, v in tiny.tiny_state(variant).items() if k.startswith(PREFIX)}
    with torch.no_grad():
        hidden = reference(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    if variant == "m9":
        return torch.nn.functional.linear(hidden[-1], state["transformation.weight"], state["transformation.bias"])
    normed = torch.nn.functional.layer_norm(hidden[-2], (128,), state["pre_LN.weight"], state["pre_LN.bias"], 1e-5)
    return torch.nn.functional.linear(normed, state["transformation_pre.weight"], state["transformation_pre.bias"])


TEXTS = (tiny.CAT, "", "cat", tiny.SENTENCES[5], "x " * 200)


def test_states_are_those_of_transformers(variant: str, model: LatentDiffusion, reference: XLMRobertaModel) -> None:
    ids = model.tokenize(TEXTS)
    expected = read_out(variant, reference, ids, (ids != 1).long())
    with torch.no_grad():
        torch.testing.assert_close(model.get_learned_conditioning(TEXTS), expected, rtol=1e-4, atol=1e-4)


def test_the_last_layer_counts_in_m9_only(model: LatentDiffusion, variant: str) -> None:
    weight = model.cond_stage_model.get_parameter("roberta.encoder.layer.2.output.dense.weight")
    ids = model.tokenize([tiny.CAT])
    with torch.no_grad():
        before = model.cond_stage_model(ids)
        kept = weight.clone()
        weight.mul_(3)
        after = model.cond_stage_model(ids)
        weight.copy_(kept)
    assert torch.equal(before, after) == (variant == "m18")


@pytest.mark.parametrize("text", ["", "cat", tiny.CAT, "x " * 200])
def test_padding_rows_are_equal_and_right(text: str, model: LatentDiffusion) -> None:
    ids = model.tokenize([text])
    with torch.no_grad():
        short = model.cond_stage_model(ids)
        whole = model.cond_stage_model._states(ids)
    torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-5)
    length = int((ids != 1).sum())
    assert torch.equal(short[0, length:], short[0, length : length + 1].expand(77 - length, -1))


@pytest.mark.parametrize("text", ["a <pad> cat", "<pad> <pad> <pad> a cat on a chair", "a cat <pad>", "<pad>"])
def test_a_prompt_that_says_pad_keeps_its_other_words(
    text: str, variant: str, model: LatentDiffusion, reference: XLMRobertaModel
) -> None:
    """The tokenizer gives a literal <pad> the id of padding; FlagAI attends to it, as to any token before </s>."""
    ids = model.tokenize([text])
    end = int((ids[0] == 2).nonzero()[0])
    mask = (torch.arange(77) <= end).long()[None]
    expected = read_out(variant, reference, ids, mask)
    with torch.no_grad():
        states = model.get_learned_conditioning([text])
    # Words and rows behind them must be there, whatever one makes of the literal <pad> itself.
    loose = read_out(variant, reference, ids, (ids != 1).long())
    close = [torch.allclose(states, want, rtol=1e-3, atol=1e-3) for want in (expected, loose)]
    assert any(close)


def test_texts_of_a_batch_do_not_change_each_other(model: LatentDiffusion) -> None:
    with torch.no_grad():
        together = model.get_learned_conditioning(TEXTS)
        alone = torch.cat([model.get_learned_conditioning([t]) for t in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
