"""Reading in pieces."""

import pytest
import torch

from ttt_e2e import TTTE2ECache, TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.evaluation import read_tokens


@pytest.mark.parametrize("step", [3, 8, 100])
def test_size_of_the_pieces_does_not_change_what_was_learned(step):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    special = {"bos_token_id": None, "eos_token_id": None}
    config = TTTE2EConfig(**sizes, **special, num_attention_heads=2, sliding_window=8, mini_batch_size=4)
    model = TTTE2EForCausalLM(config).eval()
    input_ids = torch.randint(40, (2, 31))
    cache = TTTE2ECache(config)
    losses = read_tokens(model, input_ids[:, :30], cache, step)
    assert cache.get_seq_length() == 30
    with torch.no_grad():
        continued = model(input_ids[:, 30:], cache=cache, use_cache=True).logits[:, -1]
        expected = model(input_ids, use_cache=False).logits[:, -1]
        inner = model(input_ids[:, :30], use_cache=False).inner_loss.mean(dim=0)
    assert len(losses) == 29 // 4
    torch.testing.assert_close(torch.tensor(losses), inner, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(continued, expected, atol=1e-5, rtol=1e-4)
