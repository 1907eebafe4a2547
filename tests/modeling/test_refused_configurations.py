"""What all configurations have in common is checked alike: a value that cannot work is refused by name."""

import copy

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from ttt_e2e import RecurrentHybridConfig, TTTE2EConfig, TTTLayersConfig

from .helpers import SMALL as TTT_E2E
from .recurrent import SMALL as HYBRID
from .ttt_layers import SMALL as LAYERS

NAN, INF = float("nan"), float("inf")
CONFIGS = {
    TTTE2EConfig: TTT_E2E,
    TTTLayersConfig: LAYERS | {"num_hidden_layers": 2, "mixer_types": ["ttt_linear", "full_attention"]},
    RecurrentHybridConfig: HYBRID | {"num_hidden_layers": 2, "mixer_types": ["mamba2", "full_attention"]},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

REFUSED = [
    *(
        ({name: value}, rf"`{name}` must be at least 1, got {value}")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for value in (0, -4)
    ),
    ({"max_position_embeddings": 0}, r"`max_position_embeddings` must be at least 1, got 0"),
    ({"num_key_value_heads": 0}, r"`num_key_value_heads` must be at least 1, got 0"),
    ({"num_key_value_heads": -2}, r"`num_key_value_heads` must be at least 1, got -2"),
    ({"head_dim": -2}, r"`head_dim` must be at least 1, got -2"),
    ({"head_dim": 5}, r"`head_dim` must be even.*got 5"),
    ({"sliding_window": -3}, r"`sliding_window` must be at least 1, or None, got -3"),
    ({"hidden_act": "silou"}, r"`hidden_act` is 'silou'.*'silu'"),
    *(
        ({"rms_norm_eps": value}, rf"`rms_norm_eps` must be finite and positive, got {value}")
        for value in (-1e-6, 0.0, NAN, INF)
    ),
    *(({"initializer_range": value}, rf"`initializer_range`.*got {value}") for value in (-0.1, NAN, INF)),
    ({"bos_token_id": 97}, r"`bos_token_id` is 97, outside the vocabulary of 97 \(0\.\.96\): set it to"),
    ({"bos_token_id": -1}, r"`bos_token_id` is -1, outside"),
    ({"pad_token_id": -100}, r"`pad_token_id` is -100, outside"),
    ({"eos_token_id": 1000}, r"`eos_token_id` is 1000, outside"),
    ({"eos_token_id": [2, 97]}, r"`eos_token_id` is \[2, 97\], outside"),
    *(
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": value}},
            rf"`rope_parameters` has rope_theta {value}",
        )
        for value in (0, -1.0, NAN, INF, True)
    ),
    *(({"rope_parameters": LINEAR | {"factor": value}}, rf"has factor {value}") for value in (0, 0.0, -2.0, NAN, None)),
    ({"rope_parameters": YARN | {"factor": 0}}, r"has factor 0: it must be a finite and positive number"),
    ({"rope_parameters": YARN | {"attention_factor": -1.0}}, r"has attention_factor -1\.0"),
    ({"rope_parameters": YARN | {"original_max_position_embeddings": 0}}, r"has original_max_position_embeddings 0"),
    ({"rope_parameters": LLAMA3 | {"factor": -8}}, r"has factor -8"),
    ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, r"has high_freq_factor 1\.0, which must be larger"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, r"of rope_type 'linear' lack \['factor'\]"),
    ({"rope_parameters": LINEAR | {"facto": 2}}, r"have \['facto'\], which mean nothing"),
    (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        r"rope_type 'dynamic'; supported",
    ),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, r"has partial_rotary_factor 0\.5"),
]
BY_LAYER_TYPE = [
    ({"full_attention": LINEAR | {"factor": 0}, "sliding_attention": YARN}, r"has factor 0"),
    (
        {"full_attention": LINEAR, "rope_theta": 1e4},
        r"lack those of \['sliding_attention'\]: give a dictionary for each",
    ),
    ({"full_attention": LINEAR, "sliding_attention": YARN, "rope_theta": 1e4}, r"have \['rope_theta'\] beside them"),
    ({"full_attention": LINEAR, "sliding_attention": None}, r"must be dictionaries, got None"),
]
OF_ANOTHER_TYPE = {
    "hidden_size": ["32", 32.0, True, None, [32]],
    "num_attention_heads": [4.0, False],
    "rms_norm_eps": ["1e-6", None, True],
    "attention_bias": [1, "no", None],
    "use_cache": ["no", 0],
    "tie_word_embeddings": ["yes"],
    "bos_token_id": [1.0, "1", True],
    "eos_token_id": [["2"], 2.5],
    "rope_parameters": [1e4, "default", []],
    "hidden_act": [3, None],
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_value_that_cannot_work_is_named(config):
    config(**CONFIGS[config])
    for rope in (LLAMA3, LINEAR, YARN):
        config(**CONFIGS[config] | {"rope_parameters": dict(rope)})
    for changes, message in REFUSED:
        changes = {key: dict(value) if isinstance(value, dict) else value for key, value in changes.items()}
        with pytest.raises(ValueError, match=message):
            config(**CONFIGS[config] | changes)


@pytest.mark.parametrize("config", CONFIGS)
def test_rope_by_layer_type_is_whole_or_refused(config):
    kinds = {"layer_types" if config is TTTE2EConfig else "mixer_types": ["sliding_attention", "full_attention"] * 2}
    fields = CONFIGS[config] | {"num_hidden_layers": 4} | kinds
    right = {"full_attention": dict(YARN), "sliding_attention": dict(LINEAR)}
    if config is RecurrentHybridConfig:
        with pytest.raises(ValueError, match="a recurrent_hybrid model turns all its layers alike"):
            config(**fields, rope_parameters=right)
        return
    assert config(**fields, rope_parameters=right).rope_of_layer_types() == right
    for rope, message in BY_LAYER_TYPE:
        with pytest.raises(ValueError, match=message):
            config(**fields, rope_parameters=copy.deepcopy(rope))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_value_of_another_type_is_named(config):
    for name, values in OF_ANOTHER_TYPE.items():
        for value in values:
            with pytest.raises(StrictDataclassFieldValidationError, match=name):
                config(**CONFIGS[config] | {name: value})


@pytest.mark.parametrize("config", CONFIGS)
def test_special_tokens_that_nobody_chose_are_left_out_of_a_smaller_vocabulary(config):
    """The defaults are those of the tokenizers of the papers' models."""
    sizes = {name: value for name, value in CONFIGS[config].items() if not name.endswith("token_id")}
    assert (config().bos_token_id, config().eos_token_id) == (config.bos_token_id, config.eos_token_id)
    smaller = config(**sizes | {"vocab_size": 1})
    assert (smaller.bos_token_id, smaller.eos_token_id) == (None, None)
    assert config.from_dict(smaller.to_diff_dict()).bos_token_id is None


@pytest.mark.parametrize("value", [-0.1, 1.0, NAN])
def test_a_dropout_that_leaves_nothing_is_refused(value):
    with pytest.raises(ValueError, match=rf"`attention_dropout`.*got {value}"):
        RecurrentHybridConfig(**CONFIGS[RecurrentHybridConfig] | {"attention_dropout": value})


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_that_was_changed_is_checked_again_when_it_is_saved(config, tmp_path):
    changed = config(**CONFIGS[config])
    changed.rms_norm_eps = 0.0
    with pytest.raises(StrictDataclassClassValidationError, match="`rms_norm_eps` must be finite and positive, got 0"):
        changed.save_pretrained(tmp_path)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_code_that_a_hub_folder_names_is_not_promised_by_a_folder_without_it(config):
    assert not hasattr(config(**CONFIGS[config], auto_map={"AutoConfig": "configuration.Config"}), "auto_map")
