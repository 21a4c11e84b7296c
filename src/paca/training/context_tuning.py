"""CPT: tokens of examples that stand before each text, nudged by what is learned, and trained on their answers too."""

from __future__ import annotations

from typing import Any

import torch
from peft import CPTConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from paca.data.tokens import IGNORED
from paca.messages.errors import PacaError


def check_context(adapter: CPTConfig, model: PreTrainedModel) -> None:
    """Refuse tokens that a model does not have, and a context of which nothing is learned.

    Args:
        adapter: PEFT has filled in its defaults.
        model: It is to be put on, without weights.

    Raises:
        PacaError: Names the tokens, or says which types are learned.
    """
    ids, kinds = adapter.cpt_token_ids or [], adapter.cpt_tokens_type_mask or []
    embeddings: Any = model.get_input_embeddings()
    known = embeddings.num_embeddings
    unknown = [str(token) for token in ids if not 0 <= token < known]
    if unknown:
        raise PacaError(f"peft.cpt_token_ids: the model has tokens 0 to {known - 1}, and not {', '.join(unknown)}.")
    if all(kind % 4 == 0 for kind in kinds):
        raise PacaError(
            "peft.cpt_tokens_type_mask leaves nothing to learn: of each example 1, 2 and 3 (5, 6 and 7 of the second, "
            "and so on) mark what is, and 4 (8, ...) its answer, which stays. Give some of these."
        )


def train_on_context(trainer: Any) -> None:
    """Let a trainer's loss be CPT's: the mean over the labels of texts and the answers of the context before them,
    which `opt_loss_decay_factor` makes count less the farther back they are.

    PEFT computes it from all logits, which TRL's trainer never makes. Evaluations are of the texts alone, as of any
    other method.

    Args:
        trainer: Of the run; with another method nothing is done.
    """
    model = trainer.model
    adapter = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(adapter, CPTConfig):
        return
    ids, kinds = adapter.cpt_token_ids or [], adapter.cpt_tokens_type_mask or []
    answers = sorted({kind for kind in kinds if kind > 0 and kind % 4 == 0}, reverse=True)
    decay = (adapter.opt_loss_decay_factor or 0.0) if adapter.opt_weighted_loss_type == "decay" else 1.0
    labels = torch.tensor([token if kind in answers else IGNORED for token, kind in zip(ids, kinds, strict=True)])
    factors = [decay ** (1 + answers.index(kind)) if kind in answers else 1 for kind in kinds]
    weights = torch.tensor(factors[1:], dtype=torch.float32)  # the first token has none before it
    without_loss, count = model._cpt_forward, trainer._get_num_items_in_batch

    def after(context: Tensor, given: Tensor) -> Tensor:
        return torch.cat((context.to(given.device).expand(len(given), -1), given), dim=1)

    def forward(tokens: Any, embeddings: Any, config: Any, task: Any, rows: int, **given: Any) -> Any:
        if not given.get("fused_lm_head"):
            return without_loss(tokens, embeddings, config, task, rows, **given)
        texts = model.word_embeddings(tokens)
        given["labels"] = after(labels if model.training else torch.full_like(labels, IGNORED), given["labels"])
        prompts = model.get_prompt(rows).to(texts.dtype)
        found = model.base_model(inputs_embeds=torch.cat((prompts, texts), dim=1), **given)
        if decay != 1:
            found.log_probs = found.log_probs * after(weights, torch.ones_like(found.log_probs[:, len(weights) :]))
        return found

    def count_all(batches: list[Any], device: torch.device) -> Any:
        return count([{**batch, "labels": after(labels, batch["labels"])} for batch in batches], device)

    vars(model)["_cpt_forward"] = forward
    vars(trainer)["_get_num_items_in_batch"] = count_all
