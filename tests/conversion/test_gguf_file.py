"""A GGUF file becomes a TTT-E2E model that computes what the model in it computes, with its tokenizer."""

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from ttt_e2e import TTTE2EForCausalLM
from ttt_e2e.cli.main import app
from ttt_e2e.conversion.gguf_file import gguf_file

from ..modeling.helpers import random_ids
from .pretrained import assert_same, random_source

TOKENS = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "th"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def a_source():
    return random_source(LlamaConfig, {"vocab_size": len(TOKENS), "pad_token_id": None, "intermediate_size": 64})


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of a head's channels in GGUF files of Llama models: pairs of RoPE side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, architecture="llama", kind=GGMLQuantizationType.F32):
    """A model with a byte-level tokenizer as llama.cpp's converter writes it."""
    config, writer = model.config, GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        values = tensor.numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(*arguments):
    command = ["convert", "transformer", "--window", "64", "--mini-batch", "8", *map(str, arguments)]
    return CliRunner().invoke(app, command, env={"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.mark.parametrize("named", ["file", "folder"])
@torch.no_grad()
def test_the_model_in_a_file(named, tmp_path):
    source = a_source()
    file = write_gguf(tmp_path / "tiny.gguf", source)
    result = convert("--model", file if named == "file" else tmp_path, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    model = TTTE2EForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_sink_tokens == 4 and model.dtype == torch.float32
    ids = random_ids(2, 50, high=len(TOKENS))
    assert_same(model(ids, test_time_training=False).logits, source(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("mill, 1853").input_ids, skip_special_tokens=True) == "mill, 1853"


@torch.no_grad()
def test_quantised_weights_are_dequantised(tmp_path):
    source = a_source()
    file = write_gguf(tmp_path / "tiny.gguf", source, kind=GGMLQuantizationType.Q8_0)
    assert convert("--model", file, "--output", tmp_path / "out").exit_code == 0
    weight = TTTE2EForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].mlp.up_proj.weight
    exact = source.model.layers[1].mlp.up_proj.weight
    assert 0 < (weight - exact).norm() / exact.norm() < 0.01


def test_files_that_cannot_be_read_leave_nothing(tmp_path, monkeypatch):
    output = tmp_path / "out"
    whole = write_gguf(tmp_path / "tiny.gguf", a_source())
    gpt = write_gguf(tmp_path / "gpt.gguf", a_source(), architecture="gptneox")
    cut, text = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    cut.write_bytes(whole.read_bytes()[:3000])
    text.write_text("no model")
    short = tmp_path / "short.gguf"
    short.write_bytes(whole.read_bytes()[:-5000])
    for file, message in (
        (gpt, "holds a model of architecture 'gptneox'; supported are llama, mistral, qwen2, qwen3"),
        (cut, "is damaged"),
        (short, "is damaged"),
        (text, "is no GGUF file, or damaged; fetch it again"),
        (tmp_path, "5 .gguf files in it; name one of them"),
        (tmp_path / "none.gguf", "there is no such"),
    ):
        result = convert("--model", file, "--output", output)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
        assert not output.exists()
    monkeypatch.setattr("ttt_e2e.conversion.gguf_file.find_spec", lambda name: None)
    result = convert("--model", whole, "--output", output)
    assert result.exit_code == 2 and "pip install 'ttt-e2e[gguf]'" in " ".join(result.output.split())


def test_a_folder_with_a_config_is_no_gguf_file(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    assert gguf_file(tmp_path) == tmp_path / "tiny.gguf"
    (tmp_path / "config.json").write_text("{}")
    assert gguf_file(tmp_path) is None and gguf_file(None) is None
