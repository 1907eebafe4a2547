"""What tells models apart where a learned context is concerned: weights, settings, and which adapters are at work."""

import hashlib
import json
from dataclasses import dataclass

import torch


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """What read a text, as texts to compare.

    Returns:
        `weights`: SHA-256 of all weights (names, shapes, dtypes, bytes), those of idle adapters included. `config`: of
        the settings that shape a learned context. `adapters`: the adapters at work, to be shown. `adapted_layers`:
        SHA-256 of which layer has which.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        _add_value(digest, name, value)
    return {"weights": digest.hexdigest(), **settings_fingerprint(model)}


def _add_value(digest, name: str, value: object) -> None:
    """Add a value of a state dict: a tensor, or what quantised layers hold instead, tuples of tensors and settings."""
    if isinstance(value, tuple | list):
        for index, part in enumerate(value):
            _add_value(digest, f"{name}.{index}", part)
        return
    if not isinstance(value, torch.Tensor):
        digest.update(f"{name} {value!r}".encode())
        return
    if value.is_meta:
        raise ValueError(f"The weight `{name}` is offloaded and cannot be fingerprinted: load the model whole.")
    digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
    whole = value.dequantize() if value.is_quantized else value
    digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def settings_fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """The parts of `fingerprint` that need no look at the weights."""
    adapters = active_adapters(model)
    return {
        "config": _digest(model.config.context_settings()),
        "adapters": describe_adapters(adapters),
        "adapted_layers": _digest(adapters),
    }


def active_adapters(model: torch.nn.Module) -> dict[str, str]:
    """By the name of each layer that an adapter wraps: the active adapters, their scaling, and whether they are merged.

    Layers are known by the attributes that PEFT gives them, so that PEFT need not be there.
    """
    found = {}
    for name, module in model.named_modules():
        disabled = getattr(module, "disable_adapters", None)
        if not isinstance(disabled, bool):  # a model of transformers has methods of these names
            continue
        active = [] if disabled else sorted(module.active_adapters)
        merged, scaling = getattr(module, "merged_adapters", []), getattr(module, "scaling", {})
        states = []
        for adapter in sorted({*active, *merged}):
            notes = [f"scaling {scaling[adapter]}"] if adapter in scaling else []
            notes += ["merged"] if adapter in merged else []
            notes += ["disabled"] if disabled else []
            states.append(adapter + (f" ({', '.join(notes)})" if notes else ""))
        found[name] = " and ".join(states) or "none active"
    return found


def describe_adapters(adapters: dict[str, str]) -> str:
    """The different states among `active_adapters`, in one line."""
    return "; ".join(sorted(set(adapters.values()))) or "none"


def _digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class WeightMarks:
    """Cheap marks of a model's weights and adapters, to notice that they changed.

    Attributes:
        versions: change when a parameter is replaced, cast, or written in place.
        samples: a few values of each parameter, because writing through `.data` leaves no other trace.
        adapters: see `active_adapters`.
    """

    versions: tuple
    samples: tuple[torch.Tensor, ...]
    adapters: dict[str, str]

    @classmethod
    def of(cls, model: torch.nn.Module) -> "WeightMarks":
        versions, samples = [], []
        for parameter in model.parameters():
            versions += [id(parameter), parameter.dtype, 0 if parameter.is_inference() else parameter._version]
            values = parameter.data
            if type(values) is torch.Tensor and not values.is_meta:
                samples.append(values.flatten()[:: max(1, values.numel() // 16)].clone())
        return cls(tuple(versions), tuple(samples), active_adapters(model))

    def check(self, model: torch.nn.Module) -> None:
        """Check that nothing changed since these marks were taken.

        Raises:
            ValueError: naming what did.
        """
        now = WeightMarks.of(model)
        if self.adapters != now.adapters:
            raise ValueError(
                f"The model's adapters changed after this context was read (then: {describe_adapters(self.adapters)}; "
                f"now: {describe_adapters(now.adapters)}): save it while the same adapters are active, merged and "
                "scaled as they were."
            )
        same = self.versions == now.versions and all(
            torch.equal(old, new.to(old.device)) for old, new in zip(self.samples, now.samples, strict=True)
        )
        if not same:
            raise ValueError(
                "The model's weights changed after this context was read, so it does not belong to them: read the "
                "text again, then save."
            )
