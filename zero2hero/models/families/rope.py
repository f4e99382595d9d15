"""How configurations spell rotary positions, and windows that only some layers have.

transformers 4: `rope_theta`, and `rope_scaling` beside it (its kind under `rope_type`, before that `type`).
transformers 5: everything in `rope_parameters`. What is written has both spellings.
"""

from __future__ import annotations

from typing import Any

from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError, did_you_mean
from zero2hero.nn.rope_scaling import SCALINGS, parameters_of


def read_rope(theirs: dict[str, Any], default_theta: float = 10_000.0) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of our configuration."""
    rope = theirs.get("rope_parameters") or {}
    given = dict(theirs.get("rope_scaling") or rope)
    theta = given.pop("rope_theta", rope.get("rope_theta", theirs.get("rope_theta", default_theta)))
    old_name = given.pop("type", "default")
    kind = given.pop("rope_type", None) or old_name
    partial = given.pop("partial_rotary_factor", None) or theirs.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise UserError(f"config.json: partial_rotary_factor = {partial!r} is not supported: all of a head is rotated")
    if kind != "default" and kind not in SCALINGS:
        raise UserError(
            f"config.json: rotary scaling {kind!r} is not supported; supported: {', '.join(SCALINGS)}."
            f"{did_you_mean(str(kind), SCALINGS)}"
        )
    known = {} if kind == "default" else parameters_of(kind)
    if "original_max_position_embeddings" in known:
        given.setdefault("original_max_position_embeddings", theirs.get("max_position_embeddings"))
    values = {key: value for key, value in given.items() if value is not None}
    _check(kind, values, known)
    return {"rope_theta": float(theta), "rope_scaling": {"rope_type": kind, **values} if known else None}


def _check(kind: str, values: dict[str, Any], known: dict[str, bool]) -> None:
    for key, value in values.items():
        if key not in known:
            raise UserError(f"config.json: {key} = {value!r} is not known for rotary positions of the kind {kind!r}")
        if not isinstance(value, (int, float)) or (not isinstance(value, bool) and value <= 0):
            raise UserError(f"config.json: {key} of rotary scaling should be a positive number, not {value!r}")
    missing = [key for key, needed in known.items() if needed and key not in values]
    if missing:
        raise UserError(f"config.json: rotary scaling {kind!r} needs {', '.join(missing)}")


def spell_rope(config: DecoderConfig) -> dict[str, Any]:
    """Both spellings."""
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, **(config.rope_scaling or {})},
    }


def layer_types(config: DecoderConfig) -> list[str]:
    """Of each layer, whether it has a window."""
    return ["full_attention" if window is None else "sliding_attention" for window in config.windows]


def read_qwen_window(theirs: dict[str, Any]) -> dict[str, Any]:
    """Qwen's window applies only when `use_sliding_window` says so, and not to the first `max_window_layers`."""
    if not theirs.get("use_sliding_window") or theirs.get("sliding_window") is None:
        return {"sliding_window": None, "layer_types": None}
    full = theirs.get("max_window_layers", 28)
    kinds = ["full_attention" if i < full else "sliding_attention" for i in range(theirs["num_hidden_layers"])]
    return {"sliding_window": theirs["sliding_window"], "layer_types": theirs.get("layer_types") or kinds}


def spell_qwen_window(config: DecoderConfig) -> dict[str, Any]:
    """The inverse; readers that do not know `layer_types` go by `max_window_layers`."""
    kinds = layer_types(config)
    windowed = "sliding_attention" in kinds
    spelt: dict[str, Any] = {"use_sliding_window": windowed, "layer_types": kinds}
    if windowed:
        first = kinds.index("sliding_attention")
        spelt["max_window_layers"] = config.extra.get("max_window_layers", first)
    return spelt | {"sliding_window": config.sliding_window if windowed else None}
