"""Which suites are run, where they come from, and which of their cases are not applicable.

A suite is one file of tests of another project, as it is published there.  It is never kept here, nor changed: the
functions under test are replaced by those of `cute_ssm.compat` before it is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from peer_suites import stand_ins

REFERENCE, KERNEL = BACKENDS = ("reference", "kernel")


@dataclass(frozen=True)
class Peer:
    """A project, and where its tests are.

    Attributes
    ----------
    package, version : str
        On the package index; `version` is that of the signatures that `cute_ssm.compat` follows.
    tests : str
        Where the tests are, in words.
    folders : tuple of str
        What is fetched.
    repository, commit : str, optional
        Of a project whose source distribution has no tests of these functions.
    build : mapping of str to str
        Variables of the environment with which the source distribution answers without a GPU.
    """

    package: str
    version: str
    tests: str
    folders: tuple[str, ...]
    repository: str | None = None
    commit: str | None = None
    build: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """Cases that are not applicable, and why.

    Attributes
    ----------
    cases : str
        Regular expression that is searched for in a case's name.
    reason : str
    error : str, optional
        Regular expression of the error that such a case must end with.  None: such a case is not run.
    """

    cases: str
    reason: str
    error: str | None = None

    def of(self, case: str) -> bool:
        """Return whether the rule is about a case."""
        return re.search(self.cases, case) is not None


@dataclass(frozen=True)
class Suite:
    """A file of tests.

    Attributes
    ----------
    name : str
    peer : str
        Key of `PEERS`.
    file : str
        Within the peer's folder.
    prepare : function
        Puts modules that the file imports into ``sys.modules``, given the peer's folder and the target.
    rules : tuple of Rule
    every : mapping of str to int
        By backend: of each test, the first case and every n-th are run.  A prime meets all values of every parameter.
    light : str, optional
        Regular expression of cases that take the least; of a test that has any, `every` counts these alone.
    seconds : int
        Processor time that a case may take.
    own : function, optional
        Returns the project's own functions under test, by their names in the file.  A case that fails with these too,
        at the same line, is not applicable.
    needs : tuple of str
        Packages that must be installed.
    backends : tuple of str
        How it is run: tests of the host by the reference alone.
    no_grad : bool
        Inputs require grad although nothing is differentiated: cases run in ``torch.no_grad()``.
    """

    name: str
    peer: str
    file: str
    prepare: Callable[..., Mapping[str, ModuleType]]
    rules: tuple[Rule, ...] = ()
    every: Mapping[str, int] = field(default_factory=dict)
    light: str | None = None
    seconds: int = 60
    own: Callable[[], Mapping[str, Callable[..., Any]]] | None = None
    needs: tuple[str, ...] = ("triton", "einops")
    backends: tuple[str, ...] = BACKENDS
    no_grad: bool = False


PEERS = {
    "flashinfer": Peer(
        package="flashinfer-python",
        version="0.7.2.post1",
        tests="repository; neither wheel nor source distribution has any",
        folders=("tests/mamba", "tests/gdn"),
        repository="https://github.com/flashinfer-ai/flashinfer",
        commit="fb28d7242",
    ),
    "fla": Peer(
        package="fla-core",
        version="0.6.0",
        tests="repository; neither wheel nor source distribution has any",
        folders=("fla", "tests/ops"),
        repository="https://github.com/fla-org/flash-linear-attention",
        commit="bc3b101d",
    ),
    "mamba_ssm": Peer(
        package="mamba-ssm",
        version="2.3.2.post1",
        tests="repository; the source distribution has those of training alone",
        folders=("mamba_ssm", "tests/ops"),
        repository="https://github.com/state-spaces/mamba",
        commit="v2.3.2.post1",
    ),
    "vllm": Peer(
        package="vllm",
        version="0.33.0",
        tests="repository and source distribution",
        folders=("tests/kernels/mamba",),
        repository="https://github.com/vllm-project/vllm",
        commit="v0.33.0",
    ),
}

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "flashinfer-ssu-stp", "flashinfer", "tests/mamba/test_selective_state_update_stp.py", stand_ins.flashinfer,
            every={REFERENCE: 16, KERNEL: 64},
        ),
        Suite(
            "flashinfer-ssu-mtp", "flashinfer", "tests/mamba/test_selective_state_update_mtp.py", stand_ins.flashinfer,
            every={REFERENCE: 64, KERNEL: 64}, light=r"\[simple-(1|4)-64-|\[simple-64-8-", seconds=120,
        ),
        Suite(
            "flashinfer-ssu-varlen", "flashinfer", "tests/mamba/test_selective_state_update_varlen.py",
            stand_ins.flashinfer, every={REFERENCE: 4, KERNEL: 8},
        ),
        Suite(
            "flashinfer-checkpointing-ssu", "flashinfer", "tests/mamba/test_checkpointing_ssu.py",
            stand_ins.flashinfer,
            every={REFERENCE: 24, KERNEL: 200},
        ),
        Suite(
            "flashinfer-gdn-decode", "flashinfer", "tests/gdn/test_decode_delta_rule.py", stand_ins.flashinfer,
            rules=(
                Rule("test_verify_kernel_mtp_reuses_compile|compile_cache", "FlashInfer's own cache of kernels"),
                Rule(
                    "test_decode_kernel_bf16_padding_indices", "padding updates slot 0 there, and no slot here",
                    error="Slot 0 .null buffer. should have been updated",
                ),
                Rule(
                    "fp16_inputs_are_converted", "float16 is rounded to bfloat16 there, and not here",
                    error="Tensor-likes are not equal",
                ),
            ),
            every={REFERENCE: 24, KERNEL: 100},
        ),
        Suite(
            "fla-gated-delta-rule", "fla", "tests/ops/test_gdn.py", stand_ins.fla,
            rules=(
                Rule(r"::(?!test_fused_recurrent)", "chunked prefill and fla's own parts, not in cute_ssm.compat"),
            ),
            seconds=120, no_grad=True,
        ),
        Suite(
            "mamba_ssm-state-update", "mamba_ssm", "tests/ops/triton/test_selective_state_update.py",
            stand_ins.mamba_ssm, every={KERNEL: 61}, own=stand_ins.mamba_ssm_own,
        ),
        Suite(
            "vllm-mamba-ssm", "vllm", "tests/kernels/mamba/test_mamba_ssm.py", stand_ins.vllm,
            rules=(
                Rule(
                    r"_with_heads_with_batch_indices\[4096-64-4-True-True-itype1\]",
                    "with the CPU's random numbers, the suite's oracle, which rounds the state to bfloat16 before the "
                    "output, errs by more than the tolerance",
                    "AssertionError",
                ),
            ),
            every={KERNEL: 12}, needs=("einops",),
        ),
        Suite(
            "vllm-tuned-configs", "vllm", "tests/kernels/mamba/test_mamba_ssm_configs.py", stand_ins.vllm, needs=(),
            backends=(REFERENCE,),
        ),
        Suite(
            "vllm-replayssm", "vllm", "tests/kernels/mamba/test_replayssm_standard_decode_mamba2.py", stand_ins.vllm,
            every={KERNEL: 6}, needs=("einops",),
        ),
    )
}  # fmt: skip
