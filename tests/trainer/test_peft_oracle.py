"""peft is the oracle: loss, gradients and exported weights agree with a peft model of the same adapter."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from riverdelta.core.recipe import Recipe
from riverdelta.core.weights import decode
from riverdelta.trainer.base import Base, Member
from riverdelta.trainer.increment import Inputs, Learner, step, train
from riverdelta.trainer.layout import arrange
from tests.trainer.samples import contents, recipe


def oracle(folder: Path, learner: Learner, like: Recipe) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over the rows' targets and gradients by PEFT's names, computed by transformers and peft alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    peft = get_peft_model(
        model,
        LoraConfig(r=like.lora.rank, lora_alpha=like.lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    _, tensors = decode(learner.weights.dump()[0])
    named = {name.replace(".default", ""): p for name, p in peft.named_parameters() if "lora_" in name}
    assert set(named) == set(tensors)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])
    loss, count = torch.zeros(()), 0
    for row in learner.rows:
        if row is None:
            continue
        logits = peft(input_ids=torch.tensor([row.tokens])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        loss = loss + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        if like.training.near:
            with peft.disable_adapter(), torch.no_grad():
                plain = peft(input_ids=torch.tensor([row.tokens])).logits[0, :-1]
            kept = labels != -100
            apart = torch.nn.functional.kl_div(
                plain[kept].log_softmax(-1), logits[kept].log_softmax(-1), reduction="sum", log_target=True
            )
            loss = loss + like.training.near * apart
        count += int((labels != -100).sum())
    (loss / count).backward()
    return float(loss.detach() / count), {name: p.grad for name, p in named.items()}


@pytest.mark.parametrize(("kind", "near"), [("llama", 0.0), ("qwen3", 0.0), ("gemma3", 0.0), ("gemma3", 0.7)])
def test_loss_and_gradients_are_those_of_peft(
    bases: dict[str, Path], kind: str, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Base.load(bases[kind], threads=1)
    like = recipe(micro_batch=6, passes=1, near=near)
    learner = Learner(base, Inputs(like, 11, contents(6, seed=3)))
    with torch.no_grad():  # B is zero at first and would hide A's gradients
        for number, leaf in enumerate(learner.weights.leaves):
            leaf.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    wanted, gradients = oracle(bases[kind], learner, like)
    seen: dict[str, object] = {}

    def watch(self: Learner, loss: float, tokens: int) -> None:
        seen.update(loss=loss, got=self.weights.views(self._gradient))
        self.place += 1

    monkeypatch.setattr(Learner, "learn", watch)
    step(base, [learner])
    assert seen["loss"] == pytest.approx(wanted, rel=1e-5)
    names = [name for target in learner.weights.shape.targets for name in (target.a_key, target.b_key)]
    for name, got in zip(names, seen["got"], strict=True):
        torch.testing.assert_close(got, gradients[name], rtol=1e-3, atol=1e-5 * float(gradients[name].abs().max() + 1))


def test_the_weights_load_in_peft_and_answer_alike(bases: dict[str, Path], base: Base, tmp_path: Path) -> None:
    made = train(base, Learner(base, Inputs(recipe(passes=4), 5, contents(5))))
    config, tensors = decode(made.weights, made.digest)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, str(tmp_path))
    learner = Learner(base, Inputs(recipe(), 5, contents(5), (), made.weights, made.state))
    row = learner.rows[0]
    assert row is not None
    batch = arrange([[row]], filler=0)
    member = Member(learner.weights.pairs(), batch.tokens_each[0])
    with torch.no_grad():
        hidden = base.hidden(torch.tensor(batch.tokens), torch.tensor(batch.positions), [member], batch.blocks)
        ours = base.logits(hidden)[: len(row.tokens)]
        theirs = loaded(input_ids=torch.tensor([row.tokens])).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
