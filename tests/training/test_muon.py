"""Muon as the outer optimizer: torch's own two optimizers side by side, and which parameters each of them trains."""

import copy

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from ttt_e2e import RecurrentHybridForCausalLM, TTTLayersForCausalLM
from ttt_e2e.configuration import load_config, system_preset
from ttt_e2e.training import MetaTrainingArguments, muon
from ttt_e2e.training.guards import check_whole_matrices
from ttt_e2e.training.lora import add_lora
from ttt_e2e.training.muon import MuonWithAdamW, muon_of_model, orthogonal

from .helpers import meta_trainer, random_rows, tiny_model

MODELS = {"recurrent_hybrid": RecurrentHybridForCausalLM, "ttt_layers": TTTLayersForCausalLM}


def arguments(folder, **fields):
    return MetaTrainingArguments(
        str(folder), optimizer="muon", use_cpu=True, report_to="none", **({"learning_rate": 0.02} | fields)
    )


def trained_by_muon(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for group in optimizer.parts[-1].param_groups for parameter in group["params"]}


def plain_orthogonal(update):
    """The iteration as it is written in the papers, without a transposed case: (b XX' + c XX'XX') X + a X."""
    a, b, c = 3.4445, -4.7750, 2.0315
    found = update / update.norm()
    for _ in range(5):
        square = found @ found.T
        found = a * found + b * square @ found + c * square @ square @ found
    return found


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_the_iteration_is_the_papers(shape):
    update = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    settings = torch.optim.Muon([torch.zeros(2, 2)]).defaults
    found = orthogonal(update, settings["ns_coefficients"], settings["ns_steps"], settings["eps"])
    torch.testing.assert_close(found, plain_orthogonal(update), rtol=1e-10, atol=1e-12)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    along = torch.diagonal(left.T @ found @ right.T)  # the singular vectors are kept
    torch.testing.assert_close(along.sort().values, values.sort().values, rtol=1e-6, atol=1e-8)


def test_it_iterates_in_a_precision_that_the_device_multiplies_fast(monkeypatch):
    """On a CPU without bfloat16 instructions torch's own iteration takes most of a training step."""
    seen = []
    monkeypatch.setattr(muon, "orthogonal", lambda update, *rest: seen.append(update.dtype) or update)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        matrix = nn.Parameter(torch.ones(2, 3, dtype=dtype))
        matrix.grad = torch.ones_like(matrix)
        muon.PortableMuon([{"params": [matrix]}], lr=0.1).step()
    matrix = nn.Parameter(torch.ones(2, 3, device="meta"))
    matrix.grad = torch.ones_like(matrix)
    muon.PortableMuon([{"params": [matrix]}], lr=0.1).step()
    assert seen == [torch.float64, torch.float32, torch.float32, torch.bfloat16]


def test_it_is_torchs_muon_and_torchs_adamw(tmp_path, monkeypatch):
    """Five steps with a falling learning rate, saved and loaded half-way; bit for bit in the precision of torch's."""
    monkeypatch.setattr(muon, "orthogonal", lambda update, *rest: orthogonal(update.bfloat16(), *rest))
    model, twin = tiny_model(), tiny_model()
    own = muon_of_model(
        model, arguments(tmp_path, muon_learning_rate=0.05), [name for name, _ in model.named_parameters()]
    )
    matrices = trained_by_muon(model, own)
    parts = {flag: [p for name, p in twin.named_parameters() if (name in matrices) == flag] for flag in (True, False)}
    pair = [
        torch.optim.AdamW(parts[False], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95)),
        torch.optim.Muon(parts[True], lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 0.7**step) for each in (own, *pair)]
    batches = torch.tensor(random_rows(10)["input_ids"]).split(2)
    for step, batch in enumerate(batches):
        if step == 3:
            state = copy.deepcopy(own.state_dict())
            own.state.clear()
            own.load_state_dict(state)
        for trained, optimizers in ((model, [own]), (twin, pair)):
            trained(batch, labels=batch).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    expected = dict(twin.named_parameters())
    assert own.param_groups[-1]["lr"] == pytest.approx(0.05 * 0.7**5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_matrices_of_blocks_are_muons(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    chosen = trained_by_muon(model, muon_of_model(model, arguments(tmp_path), ()))
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert matrices - chosen == {"model.embed_tokens.weight", "model.lm_head.weight"}
    assert chosen < matrices
    assert any("prime_mlp" in name for name in chosen)


@pytest.mark.parametrize("system", ["mamba2", "gated-delta-net", "ttt-linear", "ttt-mlp", "ttt-kvb"])
def test_what_only_has_the_shape_of_a_matrix_is_adamws(tmp_path, system):
    config = load_config(system_preset(system, "tiny"))
    model = MODELS[config.model_type](config)
    chosen = trained_by_muon(model, muon_of_model(model, arguments(tmp_path), ()))
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert chosen == linear - {"lm_head.weight", "model.lm_head.weight"}
    kinds = ("initial_", "conv", "A_log", "dt_bias", "norm", "embed_tokens")
    assert not any(kind in name for name in chosen for kind in kinds)


def test_a_head_of_any_name_is_adamws(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=32, num_key_value_heads=2, head_dim=8, **sizes))
    model.head_of_another_name, model.lm_head = model.lm_head, None
    model.get_output_embeddings = lambda: model.head_of_another_name
    chosen = trained_by_muon(model, muon_of_model(model, arguments(tmp_path), ()))
    assert chosen and not any("head_of" in name for name in chosen)


def test_excluded_and_frozen_matrices(tmp_path):
    model = tiny_model()
    model.model.layers[0].requires_grad_(False)
    optimizer = muon_of_model(model, arguments(tmp_path, muon_excludes=[r"prime_mlp\.down"]), ())
    chosen = trained_by_muon(model, optimizer)
    assert any("prime_mlp.up" in name for name in chosen) and not any("prime_mlp.down" in name for name in chosen)
    assert not any("layers.0." in name for name in chosen)
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    assert trained == sum(parameter.requires_grad for parameter in model.parameters())


def test_recurrences_take_no_weight_decay(tmp_path):
    model = RecurrentHybridForCausalLM(load_config("tiny-mamba2"))
    for fields in ({"optimizer": "muon"}, {}):
        trainer = meta_trainer(tmp_path, model, random_rows(), **fields)
        names = {parameter: name for name, parameter in model.named_parameters()}
        free = {
            names[parameter].rpartition(".")[2]
            for group in trainer.create_optimizer().param_groups
            for parameter in group["params"]
            if group["weight_decay"] == 0
        }
        assert free == {"A_log", "D", "dt_bias"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adamw", "muon_learning_rate": 0.1}, "muon_learning_rate=0.1 needs optimizer='muon'"),
        ({"optimizer": "adamw", "muon_excludes": ["q_proj"]}, r"muon_excludes=\['q_proj'\] needs optimizer='muon'"),
        ({"optimizer": "mion"}, "optimizer='mion': choose adamw or muon"),
        ({"muon_learning_rate": -1.0}, "muon_learning_rate=-1.0: must be finite and not negative"),
        ({"fsdp": True}, "optimizer='muon' needs whole matrices"),
    ],
)
def test_refused_arguments(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **fields) if "optimizer" not in fields else MetaTrainingArguments(str(tmp_path), **fields)


def test_refused_models(tmp_path):
    with pytest.raises(ValueError, match="no matrix has a name with 'q_porj'"):
        muon_of_model(tiny_model(), arguments(tmp_path, muon_excludes=["q_porj"]), ())
    with pytest.raises(ValueError, match="has no matrix for it to train"):
        muon_of_model(nn.LayerNorm(4), arguments(tmp_path), ())
    check_whole_matrices(tiny_model())


def test_adapters_are_matrices_alone(tmp_path):
    model = add_lora(tiny_model(), "prime", rank=2, alpha=2)
    optimizer = muon_of_model(model, arguments(tmp_path), ())
    assert len(optimizer.parts) == 1
    chosen = trained_by_muon(model, optimizer)
    assert chosen == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in chosen)


def test_one_list_of_groups():
    matrix, vector = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,)))
    optimizer = MuonWithAdamW([{"params": [matrix]}], [{"params": [vector]}], lr=0.1)
    assert [group["params"] for group in optimizer.param_groups] == [[vector], [matrix]]
    assert optimizer.defaults["lr"] == 0.1
