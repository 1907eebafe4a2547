"""Checkpoints of the official PyTorch code of TTT-Linear and TTT-MLP into folders of transformers."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from .. import TTTLayersForCausalLM
from ..data.tokenizer import load_tokenizer
from ..storage.disk import check_disk_space, folder_written_whole, read_json
from ..storage.dtypes import DTYPES, dtype_named
from ..storage.record import check_output
from .ttt_layers_layout import ttt_layers_config_from_official, ttt_layers_from_official

ROOM_FOR_SMALL_FILES = 2**24  # bytes for configuration and tokenizer
# Of a tied model, and tables that the official code computes from its configuration.
DERIVED = ("lm_head.weight", "rotary_emb.inv_freq", "seq_modeling_block.token_idx")


def convert_ttt_layers(
    checkpoint: str | Path, output: str | Path, *, tokenizer: str | None = None, dtype: str = "float32"
) -> int:
    """Convert an official checkpoint into a folder that `AutoModelForCausalLM.from_pretrained` loads.

    The whole model is in memory once (the largest that was published has 1.3 billion parameters).

    Args:
        checkpoint: folder with the official `config.json` and its weights, in `.safetensors` or `.bin` files.
        output: the new folder; may exist if it is empty.
        tokenizer: a folder or an id of the Hub, saved into the output; its ids must fit the vocabulary.
        dtype: of the output: float32, bfloat16 or float16.

    Returns:
        The number of parameters.

    Raises:
        ValueError: the output holds files; the folder is no such checkpoint, or its tensors are not those of its
            configuration.
        OSError: a file is missing, or the disk has no room.
    """
    output = Path(output).expanduser()
    check_output(output, resume=False)
    torch_dtype = dtype_named(dtype, tuple(DTYPES)[1:])
    folder = Path(checkpoint).expanduser()
    config = ttt_layers_config_from_official(official_settings(folder))
    own_tokenizer = None if tokenizer is None else load_tokenizer(tokenizer, config.vocab_size)
    official = official_parameters(folder, config.tie_word_embeddings)
    parameters = {name: tensor.to(torch_dtype) for name, tensor in ttt_layers_from_official(official, config).items()}
    del official
    needed = sum(tensor.nbytes for tensor in parameters.values())
    check_disk_space(output, needed + ROOM_FOR_SMALL_FILES, "the converted model")
    with torch.device("meta"):
        model = TTTLayersForCausalLM(config)
    # `ttt_layers_from_official` is strict; a tied head is left.
    model.load_state_dict(parameters, assign=True, strict=False)
    model.tie_weights()
    model.config.dtype = torch_dtype
    with folder_written_whole(output) as part:
        model.save_pretrained(part)
        if own_tokenizer is not None:
            own_tokenizer.save_pretrained(part)
    return sum(tensor.numel() for tensor in parameters.values())


def official_settings(folder: Path) -> dict:
    """The official `config.json` of a checkpoint's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another kind of model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint={str(folder)!r}: holds no config.json; name the folder of a checkpoint")
    settings = read_json(path, "fetch it again")
    if settings.get("model_type", "ttt") != "ttt":
        raise ValueError(
            f"{path}: model_type={settings['model_type']!r}; only 'ttt', the models of the official TTT-Linear and "
            "TTT-MLP code, can be converted here"
        )
    return settings


def official_parameters(folder: Path, tied: bool) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's folder, without those that follow from others.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"checkpoint={str(folder)!r}: holds neither .safetensors nor pytorch_model*.bin files")
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        is_safe = path.suffix == ".safetensors"
        tensors |= load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    derived = DERIVED if tied else DERIVED[1:]
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(derived)}
