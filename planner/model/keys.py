"""Typed access to the raw keys of a config.json, with errors that name the key, the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.errors import ModelConfigError

LARGEST = 10**7
"""No width, vocabulary or count of a published model reaches this; larger values are typing errors."""
MOST_LAYERS = 2000


class Keys:
    """Read-only view of one JSON object; a key may have several spellings and null means absent."""

    def __init__(self, raw: Mapping[str, Any], name: str, architecture: str = "") -> None:
        self.raw, self.name, self.architecture = raw, name, architecture

    def get(self, *spellings: str) -> Any:
        """First value present and not null under any of `spellings`, else None."""
        return next((self.raw[s] for s in spellings if self.raw.get(s) is not None), None)

    def has(self, *spellings: str) -> bool:
        """True when any of `spellings` holds a value other than null."""
        return self.get(*spellings) is not None

    def error(self, key: str, problem: str) -> ModelConfigError:
        """Error about `key`; `problem` says what is wrong and how to repair it."""
        return ModelConfigError(f"{self.name}: {key}: {problem}")

    def integer(self, *spellings: str, default: int | None = None, minimum: int = 1, maximum: int = LARGEST) -> int:
        """Integer under any of `spellings`; a missing key without `default` is an error."""
        value = self.get(*spellings)
        if value is None:
            if default is None:
                alias = f" (or {', '.join(spellings[1:])})" if len(spellings) > 1 else ""
                raise self.error(spellings[0] + alias, "missing; add it to config.json")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(spellings[0], f"{value!r:.80} is not an integer; give a whole number")
        if not minimum <= value <= maximum:
            raise self.error(spellings[0], f"{value} is outside {minimum} to {maximum:,}; check the config.json")
        return value

    def optional(self, *spellings: str) -> int | None:
        """Positive integer under any of `spellings`, None when absent."""
        return self.integer(*spellings) if self.has(*spellings) else None

    def flag(self, *spellings: str, default: bool = False) -> bool:
        """Boolean under any of `spellings`."""
        value = self.get(*spellings)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(spellings[0], f"{value!r:.80} is not true or false")
        return value

    def text(self, *spellings: str) -> str:
        """String under any of `spellings`, empty when absent."""
        value = self.get(*spellings)
        if value is not None and not isinstance(value, str):
            raise self.error(spellings[0], f"{value!r:.80} is not a string")
        return value or ""

    def items(self, key: str, length: int | None = None) -> list[Any] | None:
        """List under `key`, None when absent; `length` is the number of entries it must have."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or (length is not None and len(value) < length):
            wanted = f"a list of {length} entries" if length is not None else "a list"
            raise self.error(key, f"{value!r:.80} is not {wanted}")
        return value

    def object(self, key: str) -> Keys:
        """Nested object under `key`."""
        value = self.get(key)
        if not isinstance(value, dict):
            raise self.error(key, f"{value!r:.80} is not an object; copy the config.json again")
        return Keys(value, f"{self.name}: {key}", self.architecture)

    def per_layer(self, key: str, layer: int, default: int, *spellings: str) -> int:
        """Integer that some families write once and others once per layer (Hunyuan's `moe_topk`)."""
        value = self.get(key, *spellings)
        if not isinstance(value, list):
            return self.integer(key, *spellings, default=default, minimum=0)
        if layer >= len(value):
            raise self.error(key, f"has {len(value)} entries; give one per layer")
        return Keys({key: value[layer]}, self.name).integer(key, minimum=0)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.integer("hidden_size", "d_model")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.integer("num_hidden_layers", "n_layers", "num_layers", maximum=MOST_LAYERS)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.integer("num_attention_heads", "n_heads", "num_heads")

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads; as many as query heads when no key says otherwise."""
        return self.integer("num_key_value_heads", default=self.num_heads)

    @property
    def head_dim(self) -> int:
        """Width of one head; hidden / heads when no key says otherwise."""
        explicit = self.optional("head_dim", "attention_head_dim")
        if explicit is None and self.hidden % self.num_heads:
            problem = f"{self.num_heads} does not divide hidden_size {self.hidden}; add head_dim"
            raise self.error("num_attention_heads", problem)
        return explicit or self.hidden // self.num_heads

    @property
    def num_mtp(self) -> int:
        """Multi-token-prediction modules."""
        return self.integer("num_nextn_predict_layers", "mtp_num_hidden_layers", default=0, minimum=0, maximum=64)

    @property
    def max_context(self) -> int:
        """Longest context the config declares, 0 when it does not."""
        spellings = ("max_position_embeddings", "max_seq_len", "model_max_length", "n_positions")
        return self.integer(*spellings, default=0, minimum=0, maximum=10**9)

    def window(self, key: str = "sliding_window") -> int | None:
        """Sliding window in tokens; None when absent, disabled, or never shorter than the context."""
        if self.get(key) in (None, 0, -1) or not self.flag("use_sliding_window", default=True):
            return None
        value = self.integer(key)
        return value if not self.max_context or value < self.max_context else None

    def at_layer(self, layer: int) -> Keys:
        """These keys with `moe_topk` taken for one layer where the file lists it per layer."""
        if not isinstance(self.raw.get("moe_topk"), list):
            return self
        return Keys(dict(self.raw) | {"moe_topk": self.per_layer("moe_topk", layer, 1)}, self.name, self.architecture)
