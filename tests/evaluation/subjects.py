"""Small random models of every kind that is evaluated, and what to compare them with."""

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from ttt_e2e import RecurrentHybridConfig, RecurrentHybridForCausalLM, TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.evaluation import Subject

VOCAB, WINDOW, BATCH = 40, 8, 4
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# Large weights, so that the tokens before matter and a mistake shows.
COMMON = SIZES | SPECIAL | {"initializer_range": 0.3, "sliding_window": WINDOW}


def learner(**changes) -> TTTE2EForCausalLM:
    fields = COMMON | {"num_hidden_layers": 4, "num_suffix_layers": 2, "mini_batch_size": BATCH}
    return TTTE2EForCausalLM(TTTE2EConfig(**fields | changes))


def hybrid() -> RecurrentHybridForCausalLM:
    mixers = ["mamba2", "gated_delta_net", "sliding_attention"]
    mamba = {"mamba_head_dim": 8, "mamba_state_size": 8, "mamba_chunk_size": 8}
    delta = {"linear_num_key_heads": 2, "linear_key_head_dim": 8}
    fields = COMMON | mamba | delta | {"mixer_types": mixers, "num_hidden_layers": len(mixers)}
    return RecurrentHybridForCausalLM(RecurrentHybridConfig(**fields))


def mistral(**changes) -> MistralForCausalLM:
    fields = COMMON | {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8}
    return MistralForCausalLM(MistralConfig(**fields | changes))


def without_key_cache() -> Mamba2ForCausalLM:
    """A model of transformers whose forward knows no `cache`."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8}
    heads = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, **heads, **SPECIAL))


MODELS = {"ours": learner, "hybrid": hybrid, "mistral": mistral, "mamba2": without_key_cache}


def subject(kind: str, **arguments) -> Subject:
    torch.manual_seed(0)
    return Subject(kind, MODELS[kind](), arguments=arguments)


def random_documents(count: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def losses_by_hand(model: PreTrainedModel, ids: torch.Tensor, **arguments) -> torch.Tensor:
    """-log p of each next token, from the logits of one pass, float64 [rows, length - 1]."""
    log_probabilities = model.eval()(ids, **arguments).logits.double().log_softmax(-1)
    return torch.stack(
        [
            torch.stack([-log_probabilities[row, t, token] for t, token in enumerate(ids[row, 1:])])
            for row in range(len(ids))
        ]
    )
