# SPDX-License-Identifier: Apache-2.0
"""SHADOW (ShadowPEFT), without a paper yet: a small network next to the model, and blocks that read its state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from graft.core.call import Call
from graft.core.effect import Effect, Rewrite
from graft.core.errors import ConfigError, RoutingError
from graft.core.method import COMPARISON, AdaptedLayers, Method, PublishedRate, Tuner
from graft.core.rows import Finish, Run
from graft.methods.shadow import network
from graft.methods.shadow.detached import unload
from graft.methods.shadow.network import ShadowConfig
from graft.methods.shadow.run import FACT, States, surround

OWN = ("shadow_down", "shadow_up", "shadow_update_transform", "shadow_update_gate")
BESIDE = ("shadow_backbone", "shadow_projection", "shadow_head")


class Shadow(Method[ShadowConfig]):
    """SHADOW, a method of PEFT: h' = h + α Up Down (h - s) enters a block; s' = (1 - g) s + g T(y), g = σ(G(y)),
    follows from its output y.
    """

    prefix = "shadow_"
    published_lr = PublishedRate(1e-3, 1e-3, COMPARISON)
    facts = ("shadow_alpha",)
    compresses_targets = False
    has_labelled_loss = True
    keeps_base_dtype = frozenset(BESIDE)
    files = dict.fromkeys((*OWN, *BESIDE), "{0}.default{1}")  # whatever the adapter's name
    tuner_methods = {"last_shadow_loss": property(network.last_loss), "unload_shadow": unload}

    shadow_down: nn.Linear  # (r, hidden)
    shadow_up: nn.Linear  # (hidden, r)
    shadow_update_transform: nn.Sequential  # T
    shadow_update_gate: nn.Sequential  # G
    shadow_dropout: nn.Module

    last = False  # no block reads the state after this one

    @classmethod
    def default_targets(cls, model: nn.Module) -> list[str]:
        """Return the paths of all blocks of the model. Raises AttributeError if it has no stack of blocks."""
        return network.list_block_paths(model)

    @classmethod
    def prepare(cls, cfg: ShadowConfig, model: nn.Module) -> None:
        """Set `cfg.hidden_size` to the width of the model's hidden states.

        Raises ConfigError if its config does not tell it.
        """
        cfg.hidden_size = network.require_width(model)

    @classmethod
    def share(cls, layers: AdaptedLayers) -> dict[str, Any]:
        """Return new modules for each adapter: the shadow network, its projection and, for SEQ_CLS, its head
        (`make_modules`).

        Raises ConfigError for a second adapter if one of them is for SEQ_CLS.
        """
        tasks = (c.task_type for c in (layers.cfg, *layers.other_configs.values()))
        if layers.other_configs and "SEQ_CLS" in tasks:
            raise ConfigError("SHADOW supports one adapter only for SEQ_CLS. Use a separate model.")
        return network.make_modules(layers.model, layers.cfg)

    def check(self) -> str | None:
        """Return a reason against known layers other than hidden_size → hidden_size; else that of `Method.check`."""
        site, d = self.site, self.cfg.hidden_size
        if site.op.known and (site.in_features, site.out_features) != (d, d):
            return (
                f"It makes {site.out_features} numbers of {site.in_features}, and SHADOW adapts what keeps the hidden "
                f"size, {d}, as blocks do: leave target_modules out, and all blocks are adapted"
            )
        return super().check()

    @classmethod
    def split_budget(cls, methods: Sequence[Shadow]) -> None:
        """Mark the method of the last block (`last`): no block reads the state after it."""
        for method in methods[-1:]:
            method.last = True

    @classmethod
    def check_together(cls, methods: Sequence[Method]) -> None:
        """Raise ValueError always: exactly one SHADOW adapter can be active."""
        names = [m.name for m in methods]
        raise ValueError(f"SHADOW supports exactly one active adapter at a time, got {names}. Activate one of them.")

    def describe(self) -> Effect:
        """Return a `Rewrite` of the block with `pre` and `post`, which cannot merge."""
        why = "SHADOW adapts whole blocks by a state that changes from token to token, which no weight does"
        return Rewrite(pre=self.pre, post=self.post, block=True, why_unmergeable=why)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return linear layers `shadow_down` (r, d) and `shadow_up` (d, r) without bias, `shadow_update_transform`,
        and `shadow_update_gate`.

        Transform and gate each are Linear (u, d), GELU, Linear (d, u); u = `update_hidden_size` or, if that is 0 or
        None, r; d is the hidden size. Floating-point tensors are made on the
        default device, in the default dtype.
        """
        cfg, d = self.cfg, self.cfg.hidden_size
        u = cfg.update_hidden_size or cfg.r
        return dict(
            shadow_down=nn.Linear(d, cfg.r, bias=False),
            shadow_up=nn.Linear(cfg.r, d, bias=False),
            shadow_update_transform=nn.Sequential(nn.Linear(d, u), nn.GELU(), nn.Linear(u, d)),
            shadow_update_gate=nn.Sequential(nn.Linear(d, u), nn.GELU(), nn.Linear(u, d)),
        )

    def init_values(self) -> None:
        """Fill Up with zeros, so that the adapter starts as nothing; with `init_weights=False` keep torch's values."""
        if self.cfg.init_weights:
            nn.init.zeros_(self.shadow_up.weight)

    def state(self) -> States:
        """Return the `States` of the call.

        Raises:
            RoutingError: there are none: somebody called the model inside, which does not run the shadow network.
        """
        states: States | None = self.layer.call.fact(FACT)
        if states is None:
            raise RoutingError(
                f"layer '{self.site.key}' of SHADOW adapter '{self.name}' has no state to read. Call the PeftModel (or "
                "its base_model), which runs the shadow network, and not the model inside."
            )
        return states

    def pre(self, h: Tensor) -> Tensor:
        """Return h + α Up dropout(Down (h - s)) in the adapter's dtype, with the state s before this block.

        Raises:
            ValueError: s has another shape than h.
        """
        s, x = self.state().take(self.name, self.site.key, h), h.to(self.dtype)
        if s.shape != h.shape:
            raise ValueError(
                f"the shadow state has shape {tuple(s.shape)}, and layer '{self.site.key}' gets {tuple(h.shape)}: "
                "SHADOW needs blocks that all see the same tokens. Name such blocks in target_modules."
            )
        difference = self.shadow_dropout(self.shadow_down(x - s.to(x)))
        return x + self.cfg.shadow_alpha * self.shadow_up(difference)

    def post(self, h: Tensor, y: Tensor) -> Tensor:
        """Return y unchanged, and set the adapter's state to s + g (T(y) - s), g = σ(G(y)).

        y is cast to the adapter's dtype; the state s is cast to that dtype and moved to y's device. After the last
        block the state is only removed, and a missing one is no error.
        """
        now = self.state().now
        if self.last:
            now.pop(self.name, None)
            return y
        x = y.to(self.dtype)
        s, gate = now[self.name].to(x), self.shadow_update_gate(x).sigmoid()
        now[self.name] = s + gate * (self.shadow_update_transform(x) - s)
        return y

    @classmethod
    @contextmanager
    def surround_run(cls, tuner: Tuner, call: Call, run: Run) -> Iterator[Finish]:
        """Run the shadow networks before the model, or before each step of `generate`; add their losses and caches to
        the output (`surround`).
        """
        with surround(tuner, call, run) as finish:
            yield finish
