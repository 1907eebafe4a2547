"""What a model folder gives to someone who uses transformers only; a script, and a module for the comparison.

    python observing.py OUTPUT WORK FOLDER...

saves by folder what `observations` returns. Nothing of ttt_e2e is imported here.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

PROMPT = "the old house stood by the river"
HEADS = (AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoModelForTokenClassification)
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def observations(folder: Path, work: Path) -> dict:
    """Names, texts and tensors by what was done; the same for the same model.

    Args:
        work: an empty folder to write to.
    """
    model = load(folder)
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    seen = {
        "config": type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__,
        "class": type(model).__name__,
        **answers(model, ids),
        "hidden": AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state.detach(),
        "pipeline": written_by_pipeline(folder),
    }
    if model.config.model_type == "ttt_e2e":
        seen |= learned_context(model, ids, work / "context")
        seen |= judged(folder, ids, work / "head")
    seen["trained"] = fine_tuned(model, work / "trainer")
    model.save_pretrained(work / "again")
    AutoTokenizer.from_pretrained(folder).save_pretrained(work / "again")
    seen["after training"] = answers(model.eval(), ids)["logits"]
    return seen


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def answers(model, ids: torch.Tensor) -> dict:
    """Logits, and what is written greedily, also with the model's own argument of `generate`."""
    seen = {"logits": model(ids).logits.detach(), "written": model.generate(ids, **GREEDY)}
    if model.config.model_type == "ttt_e2e":
        for learn_from in ("prompt", "none"):
            seen[f"written, {learn_from}"] = model.generate(ids, learn_from=learn_from, **GREEDY)
    return seen


def written_by_pipeline(folder: Path) -> list[str]:
    write = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    prompts = [PROMPT, "the mill"]
    return [answer["generated_text"] for (answer,) in write(prompts, batch_size=2, **GREEDY)]


def learned_context(model, ids: torch.Tensor, folder: Path) -> dict:
    """Continue from a cache that was saved and loaded again, as the model card says."""
    cache_class = sys.modules[type(model).__module__].TTTE2ECache
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).cache
    cache.save_pretrained(folder)
    cache = cache_class.from_pretrained(folder, model=model)
    return {"written from a context": model.generate(ids, cache=cache, **GREEDY)}


def judged(folder: Path, ids: torch.Tensor, work: Path) -> dict:
    """What heads say of a text, and what their folder, saved there, still has: the language model too."""
    seen = {}
    for auto_class in HEADS:
        head = auto_class.from_pretrained(folder, trust_remote_code=True)
        set_seed(0)
        for name, parameter in head.named_parameters():
            if not name.startswith("model."):
                torch.nn.init.normal_(parameter)
        output = head(ids)
        seen[f"class, {auto_class.__name__}"] = type(head).__name__
        seen[f"scores, {auto_class.__name__}"] = torch.cat([part.flatten() for part in output.to_tuple()[:1]]).detach()
        head.save_pretrained(work)
        again = auto_class.from_pretrained(work, trust_remote_code=True)
        assert torch.allclose(again(ids).to_tuple()[0], output.to_tuple()[0], rtol=1e-5, atol=1e-5)
        seen[f"logits beside {auto_class.__name__}"] = load(work)(ids).logits.detach()
    return seen


def fine_tuned(model, folder: Path) -> list[float]:
    """Losses of two steps of the stock Trainer, with smoothed labels, which it has to shift."""
    set_seed(0)
    ids = torch.randint(3, 90, (4, 25), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        optim="sgd",  # Adam's first steps are as long for rounding errors as for gradients, and differ by machine
        label_smoothing_factor=0.1,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(output: str, work: str, *folders: str) -> None:
    try:
        import ttt_e2e  # noqa: F401
    except ImportError:
        pass
    else:
        raise SystemExit("ttt_e2e is installed here")
    torch.save({folder: observations(Path(folder), Path(work) / Path(folder).name) for folder in folders}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
