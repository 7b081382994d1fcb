"""The demo's Mamba-2 language model: a chunked scan for sequences, the package's operators for decode steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cute_ssm.demo.ssd import chunked_scan, recurrence
from cute_ssm.errors import describe

if TYPE_CHECKING:
    from cute_ssm.serving import StatePool

__all__ = ["Cache", "LanguageModel", "ModelConfig", "StateUpdate", "Verification"]

#: A function with the signature of :func:`cute_ssm.selective_state_update`.
StateUpdate = Callable[..., Tensor]
#: A function with the signature of :func:`cute_ssm.checkpointing_ssu`, called with keyword arguments.
Verification = Callable[..., Tensor]

_NORM_EPS = 1e-5


def operator(name: str = "selective_state_update") -> Callable[..., Tensor]:
    """Return an operator of the package by name, imported on first use."""
    import cute_ssm

    found: Callable[..., Tensor] = getattr(cute_ssm, name)
    return found


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a :class:`LanguageModel`.

    Parameters
    ----------
    vocab : int
        Number of tokens.
    layers : int
        Number of Mamba-2 blocks.
    width : int
        Size of the residual stream (``d_model``).
    expand : int
        Ratio of a block's inner size to `width`.
    headdim, dstate, ngroups : int
        Shape of the state: ``expand * width / headdim`` heads of ``(headdim, dstate)``, which share `ngroups` groups of
        B and C.
    conv : int
        Taps of the causal depthwise convolution.
    """

    vocab: int
    layers: int = 4
    width: int = 256
    expand: int = 2
    headdim: int = 64
    dstate: int = 64
    ngroups: int = 1
    conv: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(describe(name, "a positive integer", repr(value)))
        if self.inner % self.headdim:
            raise ValueError(describe("headdim", f"a divisor of expand * width = {self.inner}", self.headdim))
        if self.heads % self.ngroups:
            raise ValueError(describe("ngroups", f"a divisor of the {self.heads} heads", self.ngroups))
        if self.conv < 2:
            raise ValueError(describe("conv", "at least 2 taps", self.conv))

    @property
    def inner(self) -> int:
        """Channels of a block's state-space model."""
        return self.expand * self.width

    @property
    def heads(self) -> int:
        """Heads of a block."""
        return self.inner // self.headdim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.ngroups * self.dstate


@dataclass(frozen=True)
class Cache:
    """Convolution inputs and states of a model: for every layer a pool of slots, one slot per sequence.

    Attributes
    ----------
    conv : list of Tensor
        Last inputs of the convolution ``(slots, channels, conv - 1)``, oldest first.
    ssm : list of Tensor
        States ``(slots, heads, headdim, dstate)``.
    """

    conv: list[Tensor]
    ssm: list[Tensor]

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.ssm[0].shape[0]


class Block(nn.Module):
    """One Mamba-2 block: projection, causal convolution, state-space model, gated norm, projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.norm = nn.Parameter(torch.ones(c.width))
        self.in_proj = nn.Parameter(torch.empty(c.inner + c.conv_channels + c.heads, c.width))
        self.conv_weight = nn.Parameter(torch.empty(c.conv_channels, c.conv))
        self.conv_bias = nn.Parameter(torch.zeros(c.conv_channels))
        self.A_log = nn.Parameter(torch.empty(c.heads))
        self.dt_bias = nn.Parameter(torch.empty(c.heads))
        self.D = nn.Parameter(torch.ones(c.heads))
        self.gate_norm = nn.Parameter(torch.ones(c.inner))
        self.out_proj = nn.Parameter(torch.empty(c.width, c.inner))

    def reset_parameters(self) -> None:
        """Initialise the weights randomly: decay rates in [1, 16], step sizes log-uniform in [1e-3, 1e-1]."""
        c = self.config
        with torch.no_grad():
            self.in_proj.normal_(std=c.width**-0.5)
            self.conv_weight.uniform_(-(c.conv**-0.5), c.conv**-0.5)
            self.A_log.uniform_(1, 16).log_()
            step = torch.exp(torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)))
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
            self.out_proj.normal_(std=(c.inner * 2 * c.layers) ** -0.5)

    def forward(self, u: Tensor, chunk: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Process sequences ``(batch, time, width)`` from zero states; return output, final conv and SSM states."""
        c = self.config
        batch, time, _ = u.shape
        z, xbc, raw_dt = self._project(u)
        xbc = F.pad(xbc.transpose(1, 2), (c.conv - 1, 0))
        conv = xbc[:, :, time:]
        mixed = F.silu(F.conv1d(xbc, self.conv_weight[:, None], self.conv_bias, groups=c.conv_channels)).transpose(1, 2)
        x, B, C = mixed.split_with_sizes([c.inner, c.ngroups * c.dstate, c.ngroups * c.dstate], dim=-1)
        dt = F.softplus(raw_dt.to(self.dt_bias.dtype) + self.dt_bias)
        x = x.reshape(batch, time, c.heads, c.headdim)
        B, C = (v.reshape(batch, time, c.ngroups, c.dstate) for v in (B, C))
        A = -torch.exp(self.A_log)
        if chunk is None:
            y, ssm = recurrence(x, dt, A, B, C, self.D)
        else:
            y, ssm = chunked_scan(x, dt, A, B, C, self.D, chunk=chunk)
        return self._finish(y.reshape(batch, time, c.inner), z), conv, ssm

    def step(self, u: Tensor, conv: Tensor, ssm: Tensor, slots: Tensor, update: StateUpdate) -> Tensor:
        """Process one token ``(batch, width)`` of the sequences in `slots`; both pools are updated in place."""
        c = self.config
        batch = u.shape[0]
        z, xbc, raw_dt = self._project(u)
        window = torch.cat([conv[slots], xbc[:, :, None]], dim=2)
        conv[slots] = window[:, :, 1:]
        mixed = F.silu(torch.sum(window * self.conv_weight, dim=2) + self.conv_bias)
        x, B, C = mixed.split_with_sizes([c.inner, c.ngroups * c.dstate, c.ngroups * c.dstate], dim=-1)
        head = (c.heads, c.headdim)
        y = torch.empty(batch, *head, dtype=u.dtype, device=u.device)
        update(
            ssm,
            x.view(batch, *head),
            raw_dt[:, :, None].expand(batch, *head),
            (-torch.exp(self.A_log))[:, None, None].expand(*head, c.dstate),
            B.view(batch, c.ngroups, c.dstate),
            C.view(batch, c.ngroups, c.dstate),
            self.D[:, None].expand(head),
            z=None,
            dt_bias=self.dt_bias[:, None].expand(head),
            dt_softplus=True,
            state_batch_indices=slots,
            out=y,
        )
        return self._finish(y.view(batch, c.inner), z)

    def verify(
        self,
        u: Tensor,
        pool: StatePool,
        layer: int,
        slots: Tensor,
        verification: Verification,
        items: dict[str, Tensor],
    ) -> Tensor:
        """Process several tokens ``(batch, time, width)`` of the sequences in `slots`, before any is accepted.

        Their inputs are appended to the pool's history and convolution inputs; the cursors do not move.
        """
        c = self.config
        batch, time, _ = u.shape
        z, xbc, raw_dt = self._project(u)
        conv = pool.conv_state
        if conv is None:
            raise ValueError(describe("pool", "a pool made with conv_shape", "a pool without conv_state"))
        window = torch.cat([conv[layer, slots, :, : c.conv - 1], xbc.transpose(1, 2)], dim=2)
        conv[layer, slots] = window
        mixed = F.silu(F.conv1d(window, self.conv_weight[:, None], self.conv_bias, groups=c.conv_channels))
        parts = mixed.transpose(1, 2).split_with_sizes([c.inner, c.ngroups * c.dstate, c.ngroups * c.dstate], dim=-1)
        dtype = next(iter(pool.history.values())).dtype
        x, B, C = (part.to(dtype, memory_format=torch.contiguous_format) for part in parts)
        head = (c.heads, c.headdim)
        y = torch.empty_like(x)
        verification(
            **pool.arguments(layer),
            x=x.view(batch, time, *head),
            dt=raw_dt[..., None].expand(batch, time, *head),
            A=(-torch.exp(self.A_log))[:, None, None].expand(*head, c.dstate),
            B=B.view(batch, time, c.ngroups, c.dstate),
            C=C.view(batch, time, c.ngroups, c.dstate),
            D=self.D[:, None].expand(head),
            dt_bias=self.dt_bias[:, None].expand(head),
            dt_softplus=True,
            state_batch_indices=slots,
            out=y.view(batch, time, *head),
            **items,
        )
        return self._finish(y.to(u.dtype), z)

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        projected = F.linear(F.rms_norm(u, (c.width,), self.norm, _NORM_EPS), self.in_proj)
        z, xbc, raw_dt = projected.split_with_sizes([c.inner, c.conv_channels, c.heads], dim=-1)
        return z, xbc, raw_dt

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        gated = F.rms_norm(y * F.silu(z), (self.config.inner,), self.gate_norm, _NORM_EPS)
        return F.linear(gated, self.out_proj)


class LanguageModel(nn.Module):
    """Mamba-2 blocks between an embedding and an output projection with the same weight.

    Parameters
    ----------
    config : ModelConfig
        Sizes.
    dropout : float
        Dropout on the embedding and on the output of each block, in training mode.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.embedding = nn.Parameter(torch.empty(config.vocab, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.width))

    def reset_parameters(self) -> None:
        """Initialise the weights with torch's global generator."""
        with torch.no_grad():
            self.embedding.normal_(std=0.02)
        for block in self._blocks():
            block.reset_parameters()

    def forward(self, tokens: Tensor, chunk: int | None = 32) -> Tensor:
        """Logits ``(batch, time, vocab)`` after every token of ``(batch, time)``, from zero states.

        Parameters
        ----------
        chunk : int, optional
            Tokens per chunk of the scan; None runs the recurrence token by token.
        """
        return self._logits(self._sequence(tokens, None, None, chunk))

    def new_cache(self, slots: int, state_dtype: torch.dtype | None = None) -> Cache:
        """Allocate zeroed pools of `slots` slots; `state_dtype` defaults to the dtype of the weights."""
        if slots < 1:
            raise ValueError(describe("slots", "a positive number", slots))
        c, like = self.config, self.embedding
        conv = [like.new_zeros(slots, c.conv_channels, c.conv - 1) for _ in range(c.layers)]
        shape = (slots, c.heads, c.headdim, c.dstate)
        ssm = [like.new_zeros(shape, dtype=state_dtype or like.dtype) for _ in range(c.layers)]
        return Cache(conv=conv, ssm=ssm)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: Cache, slots: Tensor, chunk: int | None = 32) -> Tensor:
        """Process prompts ``(batch, time)`` from zero states into `slots`, and return the last token's logits."""
        self._check_slots(tokens, cache, slots)
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(describe("tokens", "(batch, time) with at least one token", tuple(tokens.shape)))
        return self._logits(self._sequence(tokens, cache, slots, chunk)[:, -1])

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: Cache, slots: Tensor, update: StateUpdate | None = None) -> Tensor:
        """Process one token ``(batch,)`` of the sequences in `slots` and return its logits ``(batch, vocab)``.

        Parameters
        ----------
        update : callable, optional
            Default: :func:`cute_ssm.selective_state_update`.
        """
        self._check_slots(tokens, cache, slots)
        if tokens.ndim != 1:
            raise ValueError(describe("tokens", "(batch,)", tuple(tokens.shape)))
        update = update or operator()
        u = self.embedding[tokens]
        for index, block in enumerate(self._blocks()):
            u = u + block.step(u, cache.conv[index], cache.ssm[index], slots, update)
        return self._logits(u)

    def new_pool(self, slots: int, tokens: int, window: int, state_dtype: torch.dtype) -> StatePool:
        """Make a pool for `verify`, with `tokens` tokens per step and up to `window` pending ones.

        Its history is float16, the most precise input dtype of `checkpointing_ssu`.
        """
        from cute_ssm.serving import StatePool

        c = self.config
        return StatePool.mamba2(
            c.layers,
            slots,
            nheads=c.heads,
            dim=c.headdim,
            dstate=c.dstate,
            ngroups=c.ngroups,
            window=window,
            tokens=tokens,
            state_dtype=state_dtype,
            input_dtype=torch.float16,
            history="double",
            conv_shape=(c.conv_channels, c.conv),
            conv_dtype=self.embedding.dtype,
            device=self.embedding.device,
        )

    @torch.no_grad()
    def prefill_pool(self, tokens: Tensor, pool: StatePool, slots: Tensor, chunk: int | None = 32) -> None:
        """Process prompts ``(batch, time)`` from zero states into newly reset slots of a pool."""
        u = self.embedding[tokens]
        for index, block in enumerate(self._blocks()):
            out, conv, ssm = block(u, chunk)
            if pool.conv_state is not None:
                pool.conv_state[index, slots, :, : conv.shape[2]] = conv.to(pool.conv_state.dtype)
            pool.state[index, slots] = ssm.to(pool.state.dtype)
            u = u + out

    @torch.no_grad()
    def verify(
        self, tokens: Tensor, pool: StatePool, slots: Tensor, verification: Verification | None = None
    ) -> Tensor:
        """Process tokens ``(batch, time)`` of the sequences in `slots`, and return the logits after each of them.

        Call ``pool.commit`` afterwards with the numbers of accepted tokens.

        Parameters
        ----------
        verification : callable, optional
            Default: :func:`cute_ssm.checkpointing_ssu`.
        """
        if tokens.ndim != 2 or tokens.shape[1] != pool.tokens:
            raise ValueError(describe("tokens", f"(batch, {pool.tokens})", tuple(tokens.shape)))
        items, writes = pool.build_work_items(slots)
        listed = {"work_items": items, "num_writes": writes}
        verification = verification or operator("checkpointing_ssu")
        u = self.embedding[tokens]
        for index, block in enumerate(self._blocks()):
            u = u + block.verify(u, pool, index, slots, verification, listed)
        return self._logits(u)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _sequence(self, tokens: Tensor, cache: Cache | None, slots: Tensor | None, chunk: int | None) -> Tensor:
        u = F.dropout(self.embedding[tokens], self.dropout, self.training)
        for index, block in enumerate(self._blocks()):
            out, conv, ssm = block(u, chunk)
            if cache is not None and slots is not None:
                cache.conv[index][slots] = conv.to(cache.conv[index].dtype)
                cache.ssm[index][slots] = ssm.to(cache.ssm[index].dtype)
            u = u + F.dropout(out, self.dropout, self.training)
        return u

    def _logits(self, u: Tensor) -> Tensor:
        return F.linear(F.rms_norm(u, (self.config.width,), self.norm, _NORM_EPS), self.embedding)

    @staticmethod
    def _check_slots(tokens: Tensor, cache: Cache, slots: Tensor) -> None:
        """Check that slots are distinct and in range; on a GPU only their number, as reading them would synchronise."""
        if slots.shape != tokens.shape[:1]:
            raise ValueError(describe("slots", f"one slot for each of {tokens.shape[0]} sequences", tuple(slots.shape)))
        if slots.device.type != "cpu":
            return
        if slots.numel() and (int(slots.min()) < 0 or int(slots.max()) >= cache.slots):
            raise ValueError(describe("slots", f"values in [0, {cache.slots})", slots.tolist()))
        if len(set(slots.tolist())) != slots.numel():
            raise ValueError(describe("slots", "distinct slots", slots.tolist()))
