# SPDX-License-Identifier: Apache-2.0
"""The part of LoRA that decides how an adapter starts, and keeps what that takes out of the base weight."""

from __future__ import annotations

from typing import Any

from graft.core.errors import ConfigError
from graft.core.method import Method, Tensors, Use
from graft.methods.lora import attention, init, shift
from graft.methods.lora.start import kind_of


class Started(Method):
    """Starts by `init_lora_weights`, and holds a `Shift` on each layer whose base weight that changes."""

    def init(self) -> None:
        init.initialise(self, self.cfg.init_lora_weights)

    def restart(self, how: bool | str) -> None:
        """Give A and B the values of another start."""
        if not isinstance(how, bool) and how.lower() != "gaussian":
            raise ConfigError(
                f"Unknown initialization init_lora_weights={how!r} for values that start again on layer "
                f"'{self.site.key}': True, False and 'gaussian' are known. For another, add the adapter anew."
            )
        init.initialise(self, how)

    @classmethod
    def changes_base(cls, cfg: Any) -> str | None:
        """Return the setting by which `init` changes the base weight; None if it does not."""
        how = cfg.init_lora_weights
        return f"init_lora_weights={how!r}" if kind_of(how) else None

    def uses_weight(self) -> Use:
        return Use.NOT if self.changes_base(self.cfg) is None else Use.STARTS | Use.CHANGES

    @property
    def keeps_shift(self) -> bool:
        """Return True if the adapter holds what `init` takes out of the base weight."""
        how = self.cfg.init_lora_weights
        return type(how) is str and kind_of(how) is not None and self.site.op.linear

    @property
    def shift_rank(self) -> int:
        """Return the rank of that: LoftQ takes nothing out before it quantizes for the first time."""
        cfg = self.cfg
        return 0 if cfg.init_lora_weights == "loftq" and cfg.loftq_config["loftq_iter"] == 1 else cfg.r

    def stored(self, values: Tensors, cfg: Any) -> Tensors:
        if self.along:
            values = attention.to_file(values)
        if kind_of(cfg.init_lora_weights) is None:  # a caller says so: the file is for the base as it is now
            return {place: t for place, t in values.items() if place[0] != shift.NAME}
        return values

    @property
    def stores_as_held(self) -> bool:
        return type(self).stored is Started.stored and not self.keeps_shift and not self.along

    def restored(self, stored: Tensors, cfg: Any) -> Tensors:
        stored = shift.restored(self, stored) if self.keeps_shift else stored
        return attention.from_file(stored) if self.along else stored

    def loaded(self) -> None:
        if self.keeps_shift:
            shift.loaded(self)
